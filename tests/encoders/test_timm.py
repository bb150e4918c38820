from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from rayclust.encoders.decode import decode
from rayclust.encoders.options import EncoderConfig
from rayclust.encoders.timm import TimmEncoder, build_timm, timm_hub_file
from rayclust.errors import ConfigError
from tests.encoders.networks import noise, seen, tiny_timm


def built(folder: Path, state: Any, name: str = "timm/test_vit", **options: Any) -> TimmEncoder:
    torch.save(state, folder / "w.pt")
    return build_timm(EncoderConfig(name=name, pretrained="w.pt", **options), folder / "w.pt", "cpu")


def rows_of(network: Any, encoder: TimmEncoder, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        rows = network(seen(images, encoder.mean, encoder.std)).numpy()
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_rows_are_timms_own(tmp_path: Path, name: str) -> None:
    network = tiny_timm(name)
    encoder = built(tmp_path, network.state_dict(), f"timm/{name}")
    images = noise(3, encoder.preprocess.shape[0])
    assert encoder.preprocess.shape == (*network.pretrained_cfg["input_size"][1:], 3)
    assert np.allclose(encoder.encode_images(images), rows_of(network, encoder, images), atol=1e-5)
    assert encoder.dimension == network.num_features


def test_safetensors_and_torch_files_give_the_same_bytes(tmp_path: Path) -> None:
    state = tiny_timm().state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    config = EncoderConfig(name="timm/test_vit", pretrained="w.safetensors")
    safe, images = build_timm(config, tmp_path / "w.safetensors", "cpu"), noise(2, 160)
    assert np.array_equal(safe.encode_images(images), built(tmp_path, state).encode_images(images))


def test_checkpoints_of_training_scripts(tmp_path: Path) -> None:
    images, state = noise(2, 160), tiny_timm().state_dict()
    plain = built(tmp_path, state).encode_images(images)
    other = {key: torch.zeros_like(value) for key, value in state.items()}

    def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {prefix + key: value for key, value in tensors.items()}

    head = {"head.weight": torch.ones(5, 64), "head.bias": torch.ones(5)}
    for checkpoint in (
        {"model": state | head},  # MAE, DeiT
        {"teacher": under("backbone.", state) | under("head.", head), "args": argparse.Namespace()},  # DINO
        {
            "encoder": under("module.", other),
            "target_encoder": under("module.", state | {"fc.fc1.weight": head["head.weight"]}),
        },
        {
            "state_dict": under("module.base_encoder.", other | head)
            | under("module.momentum_encoder.", state | head)
            | {"module.predictor.0.weight": torch.ones(3, 3)}
        },  # MoCo v3
    ):
        assert np.array_equal(built(tmp_path, checkpoint).encode_images(images), plain)


def test_other_image_sizes(tmp_path: Path) -> None:
    encoder = built(tmp_path, tiny_timm().state_dict(), image_size=96)
    assert encoder.preprocess.shape == (96, 96, 3)
    wide = built(tmp_path, tiny_timm("test_resnet").state_dict(), "timm/test_resnet", image_size=(64, 128))
    assert wide.encode_images(np.zeros((1, 64, 128, 3), np.uint8)).shape == (1, wide.dimension)
    with pytest.raises(ConfigError, match=r"encoder\.image_size = 3: timm/test_vit does not take it"):
        built(tmp_path, tiny_timm().state_dict(), image_size=3)


def test_the_architecture_says_how_it_sees_unless_told(tmp_path: Path) -> None:
    own = built(tmp_path, tiny_timm().state_dict()).preprocess
    assert (own.resize, own.interpolation, own.crop_fraction) == ("crop", "bicubic", 0.95)
    told = built(tmp_path, tiny_timm().state_dict(), resize="crop", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
    assert told.preprocess.crop_fraction == 1.0
    assert (told.mean, told.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
    assert built(tmp_path, tiny_timm().state_dict(), resize="squash").preprocess.resize == "squash"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/test_vitt", {}, "encoder.name = timm/test_vitt: timm has no such architecture; near: test_vit"),
        ("timm/test_vit.nope", {}, "encoder.pretrained = nope: not a tag of timm/test_vit; it has: r160_in1k"),
        (
            "timm/test_vit",
            {"options": {"no_such": 1}},
            "encoder.options = {'no_such': 1}: timm/test_vit cannot be built so",
        ),
        ("timm/test_vit2", {}, "encoder.pretrained = w.pt: does not fit timm/test_vit2: missing: "),
    ],
)
def test_mistakes_give_one_clear_line(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, tiny_timm().state_dict(), name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tags_say_where_their_weights_are() -> None:
    for config in (
        EncoderConfig(name="timm/vit_small_patch16_224", pretrained="dino"),
        EncoderConfig(name="timm/vit_small_patch16_224.dino"),
    ):
        file = timm_hub_file(config)
        assert (file.repository, file.names[0]) == ("timm/vit_small_patch16_224.dino", "model.safetensors")
        assert file.name == "timm/vit_small_patch16_224.dino"
    assert timm_hub_file(EncoderConfig(name="timm/mobilenetv2_100")).name == "timm/mobilenetv2_100.ra_in1k"


def test_weights_on_no_hub_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="are on no hub: fetch gcvit_base"):
        timm_hub_file(EncoderConfig(name="timm/gcvit_base.in1k"))
    with pytest.raises(ConfigError, match="timm knows no weights of timm/test_vit_relpos"):
        timm_hub_file(EncoderConfig(name="timm/test_vit_relpos"))


@pytest.mark.parametrize(
    ("weights", "data", "settings"),
    [
        ("a", "imagenette_val3k", {"image_size": 224}),
        ("a", "cifar10_test", {"image_size": 160}),
        ("b", "imagenette_val3k", {"image_size": 224}),
    ],
)
def test_photographs_give_their_stored_features(
    shared_data: Path, weights: str, data: str, settings: dict[str, Any]
) -> None:
    path = shared_data / "encoder" / f"mobilenetv2_100_{weights}.safetensors"
    if weights == "a":
        settings = settings | {"options": {"pad_type": "same"}, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config = EncoderConfig(name="timm/mobilenetv2_100", pretrained=str(path), resize="squash", **settings)
    encoder = build_timm(config, path, "cpu")
    files = pq.read_table(shared_data / data / "images.parquet", columns=["image"])["image"][::100].to_pylist()[:30]
    images = np.stack([decode(file, encoder.preprocess) for file in files])
    stored = np.load(shared_data / data / f"features_mnv2{weights}_f16.npy")[::100][:30].astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    assert (encoder.encode_images(images) * stored).sum(1).min() > 0.9998
