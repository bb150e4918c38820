from __future__ import annotations

import pytest
from pydantic import ValidationError

from rayclust.encoders.options import EncoderConfig, is_hub_tag


@pytest.mark.parametrize("tag", ["openai", "laion2b_s32b_b82k", "dino", "augreg_in21k_ft_in1k", "v1.5"])
def test_tags(tag: str) -> None:
    assert is_hub_tag(tag)


@pytest.mark.parametrize(
    "path", ["/w/a.safetensors", "a.pt", "W.PTH", "s3://b/w", "./w", "~w", "vits16_800ep.pth.tar", "c:\\w.bin", "dir/w"]
)
def test_files(path: str) -> None:
    assert not is_hub_tag(path)


@pytest.mark.parametrize(
    ("name", "pretrained", "architecture", "tag", "uri"),
    [
        ("open_clip/ViT-L-14", None, "ViT-L-14", None, None),
        ("open_clip/ViT-L-14", "openai", "ViT-L-14", "openai", None),
        ("open_clip/ViT-L-14.openai", None, "ViT-L-14", "openai", None),
        ("open_clip/ViT-L-14.openai", "s3://b/w.bin", "ViT-L-14", "openai", "s3://b/w.bin"),
        ("timm/vit_small_patch16_224", "w.pth", "vit_small_patch16_224", None, "w.pth"),
        ("timm/vit_small_patch16_224.dino", "dino", "vit_small_patch16_224", "dino", None),
        ("pixels", None, "", None, None),
    ],
)
def test_parts_of_a_name(
    name: str, pretrained: str | None, architecture: str, tag: str | None, uri: str | None
) -> None:
    config = EncoderConfig(name=name, pretrained=pretrained)
    assert (config.architecture, config.tag, config.weights_uri) == (architecture, tag, uri)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "clip/ViT"}, "must be open_clip/<architecture>, timm/<architecture> or pixels"),
        ({"name": "timm/"}, "must be open_clip/<architecture>"),
        ({"name": "timm/resnet50", "grayscale": True}, "only pixels can do without colour"),
        ({"name": "timm/resnet50.a1_in1k", "pretrained": "tv_in1k"}, "contradicts the tag"),
        ({"std": (0.5, 0.0, 0.5)}, "must not hold 0"),
        ({"image_size": 0}, "must be from 1 to 16384"),
        ({"image_size": (224, 99999)}, "must be from 1 to 16384"),
        ({"crop_fraction": 0}, "greater than 0"),
        ({"threads": 0}, "greater than or equal to 1"),
        ({"resize": "pad"}, "crop"),
        ({"wieghts": "x"}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(**options)  # type: ignore[arg-type]


def test_settings_survive_json() -> None:
    config = EncoderConfig(
        name="timm/resnet50", options={"pad_type": "same"}, image_size=(224, 160), mean=(0.5, 0.5, 0.5)
    )
    assert EncoderConfig.model_validate_json(config.model_dump_json()) == config
