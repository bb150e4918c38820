from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import timm

from rayclust.encoders.backbones import BACKBONES, Backbone, backbone_table
from rayclust.encoders.load import hub_file
from rayclust.encoders.options import EncoderConfig

TEMI = [
    "dino_resnet50",
    "dino_vits16",
    "dino_vitb16",
    "timm_resnet50",
    "timm_vit_small_patch16_224",
    "timm_vit_base_patch16_224",
    "timm_vit_large_patch16_224",
    "convnext_small",
    "convnext_base",
    "convnext_large",
    "msn_vit_small",
    "msn_vit_base",
    "msn_vit_large",
    "mocov3_vit_small",
    "mocov3_vit_base",
    "clip_ViT-B/16",
    "clip_ViT-L/14",
    "clip_RN50",
    "mae_vit_base",
    "mae_vit_large",
    "mae_vit_huge",
]


def test_all_of_temis_names_are_there() -> None:
    assert [backbone.temi for backbone in BACKBONES[:21]] == TEMI


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.temi)
def test_each_exists(backbone: Backbone) -> None:
    config = EncoderConfig(name=backbone.name, pretrained=backbone.tag or backbone.file, options=backbone.options)
    if config.family == "timm":
        assert timm.is_model(config.architecture)
        assert backbone.tag is None or f"{config.architecture}.{backbone.tag}" in timm.list_models(pretrained=True)
    else:
        assert (config.architecture, backbone.tag) in open_clip.list_pretrained()
    assert (hub_file(config) is None) == (backbone.tag is None)
    assert bool(backbone.tag) != bool(backbone.file)


def test_the_table_is_in_the_documents() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert backbone_table() in page.read_text(encoding="utf-8")
