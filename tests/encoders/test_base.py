from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rayclust.encoders.decode import Preprocess
from rayclust.encoders.network import TorchEncoder, unknown_architecture
from rayclust.encoders.pixels import PixelEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ConfigError, ShapeError
from tests.encoders.networks import noise, seen

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


@pytest.mark.parametrize("tag", ["openai", "laion2b_s32b_b82k", "dino", "augreg_in21k_ft_in1k", "v1.5"])
def test_tags_are_no_files(tag: str) -> None:
    config = EncoderConfig(name="timm/resnet50", pretrained=tag)
    assert (config.tag, config.weights_uri) == (tag, None)


@pytest.mark.parametrize(
    "path", ["/w/a.safetensors", "a.pt", "W.PTH", "s3://b/w", "./w", "~w", "vits16_800ep.pth.tar", "c:\\w.bin", "dir/w"]
)
def test_files_are_no_tags(path: str) -> None:
    config = EncoderConfig(name="timm/resnet50", pretrained=path)
    assert (config.tag, config.weights_uri) == (None, path)


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
        ({"name": "clip/ViT"}, "must be auto, open_clip/<architecture>, timm/<architecture>, pixels, run, or "),
        ({"name": "timm/"}, "must be auto, open_clip/<architecture>"),
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


class SmallEncoder(TorchEncoder):
    """One convolution, averaged."""

    def __init__(self, config: EncoderConfig | None = None, size: int = 12, network: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        network = network or nn.Sequential(nn.Conv2d(3, 7, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.batches: list[int] = []
        network.register_forward_hook(lambda _, inputs, __: self.batches.append(len(inputs[0])))
        super().__init__(
            network, config or EncoderConfig(name="timm/small"), Preprocess(size), mean=MEAN, std=STD, device="cpu"
        )


def test_rows_are_those_of_the_network() -> None:
    encoder, images = SmallEncoder(), noise(5, 12)
    with torch.no_grad():
        expected = encoder.network(seen(images, MEAN, STD))
    expected /= expected.norm(dim=1, keepdim=True)
    rows = encoder.encode_images(images)
    assert (rows.dtype, rows.shape, encoder.dimension) == (np.float32, (5, 7), 7)
    assert np.allclose(rows, expected.numpy(), atol=1e-6)


def test_a_row_depends_on_its_image_alone() -> None:
    encoder, images = SmallEncoder(), noise(11, 12)
    rows = encoder.encode_images(images)
    order = np.random.default_rng(1).permutation(11)
    assert np.array_equal(encoder.encode_images(images[order]), rows[order])
    assert all(np.array_equal(encoder.encode_images(images[i : i + 1])[0], rows[i]) for i in range(11))
    assert set(encoder.batches) == {1}


def test_chunks_have_one_size_and_are_cut_from_the_first() -> None:
    encoder, images = SmallEncoder(EncoderConfig(name="timm/small", batch_size=4)), noise(11, 12)
    rows = encoder.encode_images(images)
    assert encoder.batches == [1, 4, 4, 4]  # the first found out the width
    assert np.allclose(rows, SmallEncoder().encode_images(images), atol=1e-6)
    # A chunk's rows do not depend on what follows, nor on how full it is.
    assert np.array_equal(encoder.encode_images(images[:8]), rows[:8])
    assert np.array_equal(encoder.encode_images(images[:6]), rows[:6])


def test_raw_rows_on_request() -> None:
    images = noise(3, 12)
    raw = SmallEncoder(EncoderConfig(name="timm/small", normalize=False)).encode_images(images)
    unit = SmallEncoder().encode_images(images)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    assert np.allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)


def test_nothing_in_nothing_out() -> None:
    assert SmallEncoder().encode_images(noise(0, 12)).shape == (0, 7)


def test_read_only_pixels_are_taken() -> None:
    images = np.frombuffer(noise(2, 12).tobytes(), np.uint8).reshape(2, 12, 12, 3)
    assert SmallEncoder().encode_images(images).shape == (2, 7)


def test_settings_of_the_process_come_back() -> None:
    threads = torch.get_num_threads()
    encoder = SmallEncoder(EncoderConfig(name="timm/small", threads=threads + 1))
    inside: list[int] = []
    tower = encoder._tower
    encoder._tower = lambda x: (inside.append(torch.get_num_threads()), tower(x))[1]
    encoder.encode_images(noise(1, 12))
    assert inside == [threads + 1]
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_bf16_is_near_fp32() -> None:
    images = noise(6, 12)
    rows, half = (
        SmallEncoder(EncoderConfig(name="timm/small", precision=p)).encode_images(images)  # type: ignore[arg-type]
        for p in ("auto", "bf16")
    )
    assert half.dtype == np.float32
    assert not np.array_equal(rows, half)
    assert (rows * half).sum(1).min() > 0.999


def test_fp16_is_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.precision = fp16: only for GPUs"):
        SmallEncoder(EncoderConfig(name="timm/small", precision="fp16"))


@pytest.mark.parametrize(
    "images", [noise(1, 13), noise(1, 12).astype(np.float32), noise(1, 12)[0], noise(1, 12)[..., :1]]
)
def test_other_shapes_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"uint8 \(B, 12, 12, 3\) are needed"):
        SmallEncoder().encode_images(images)


def test_sizes_that_a_network_does_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.image_size = 2: timm/small does not take it"):
        SmallEncoder(size=2)


def test_networks_must_give_one_row() -> None:
    with pytest.raises(ConfigError, match=r"encoder.name = timm/small: gives \(7, 10, 10\) per image, not one row"):
        SmallEncoder(network=nn.Conv2d(3, 7, 3))


def test_texts_need_a_text_tower() -> None:
    for encoder in (SmallEncoder(), PixelEncoder(EncoderConfig(name="pixels"))):
        assert not encoder.has_text
        with pytest.raises(ConfigError, match="has no text tower; take an open_clip one"):
            encoder.encode_texts(["a cat"])


def test_zero_rows_stay_zero() -> None:
    zeros = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(zeros[0].bias, -1e9)  # type: ignore[arg-type, union-attr]
    assert not SmallEncoder(network=zeros).encode_images(noise(2, 12)).any()


def test_near_names_are_offered() -> None:
    config = EncoderConfig(name="timm/resnet5")
    assert str(unknown_architecture(config, ["resnet50", "vit"])).endswith("no such architecture; near: resnet50")
    assert str(unknown_architecture(config, ["zzz"])).endswith("timm has no such architecture")
