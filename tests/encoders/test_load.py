from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rayclust.encoders import weights
from rayclust.encoders.load import dimension_of, load_encoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError, DataError
from tests.encoders.networks import noise, tiny_clip, tiny_timm


def test_every_family(tmp_path: Path) -> None:
    torch.save(tiny_timm().state_dict(), tmp_path / "vit.pt")
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
    for name, file in (("timm/test_vit", "vit.pt"), ("open_clip/tiny-clip", "clip.pt"), ("pixels", None)):
        config = EncoderConfig(name=name, pretrained=file and str(tmp_path / file))
        encoder = load_encoder(config)
        assert encoder.name == name
        rows = encoder.encode_images(noise(2, encoder.preprocess.shape[0]))
        assert rows.shape == (2, encoder.dimension)
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_a_local_copy_of_a_uri(tmp_path: Path) -> None:
    torch.save(tiny_timm().state_dict(), tmp_path / "copy")
    config = EncoderConfig(name="timm/test_vit", pretrained="s3://bucket/vit.pt")
    assert load_encoder(config, weights=tmp_path / "copy").dimension == 64
    with pytest.raises(ConfigError, match="pass a local copy"):
        load_encoder(config)


def test_files_that_are_not_there() -> None:
    with pytest.raises(DataError, match=r"absent\.pt: cannot be read"):
        load_encoder(EncoderConfig(name="timm/test_vit", pretrained="./absent.pt"))


def test_published_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "hub_answers", lambda: False)
    for name, repository in (
        ("timm/vit_base_patch16_224.dino", "timm/vit_base_patch16_224.dino"),
        ("open_clip/ViT-B-32", "timm/vit_base_patch32_clip_224.openai"),
    ):
        with pytest.raises(ConfigError, match=f"from the Hugging Face repository {repository} on a machine"):
            load_encoder(EncoderConfig(name=name))


def test_published_weights_that_are_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save(tiny_timm().state_dict(), tmp_path / "w.bin")
    monkeypatch.setattr(weights.HubFile, "path", lambda _: tmp_path / "w.bin")
    assert load_encoder(EncoderConfig(name="timm/test_vit.r160_in1k")).dimension == 64


def test_pixels_need_no_library_of_networks() -> None:
    code = (
        "import sys; from rayclust.encoders.load import load_encoder as load;"
        "from rayclust.encoders.settings import EncoderConfig;"
        "load(EncoderConfig(name='pixels')); sys.exit('timm' in sys.modules or 'open_clip' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "width"),
    [("open_clip/ViT-B-32", 512), ("open_clip/ViT-L-14.openai", 768), ("timm/resnet18", 512),
     ("timm/vit_tiny_patch16_224.x", 192), ("timm/no_such_network", None), ("open_clip/no-such-network", None)],
)  # fmt: skip
def test_the_width_of_a_network_is_known_without_its_weights(name: str, width: int | None) -> None:
    assert dimension_of(EncoderConfig(name=name)) == width
    assert dimension_of(EncoderConfig(name="pixels", image_size=4, grayscale=True)) == 16


def test_an_encoder_that_is_not_named_is_not_loaded() -> None:
    for name in ("auto", "unknown"):
        with pytest.raises(ConfigError, match="name the encoder"):
            load_encoder(EncoderConfig(name=name))
