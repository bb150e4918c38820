from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rayclust.encoders.base import Encoder, TorchEncoder, unit_rows, unknown_architecture
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.options import EncoderConfig
from rayclust.encoders.pixels import PixelEncoder
from rayclust.errors import ConfigError, ShapeError
from tests.encoders.networks import noise

COLOUR = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


class SmallEncoder(TorchEncoder):
    """One convolution, averaged."""

    def __init__(self, config: EncoderConfig | None = None, size: int = 12, network: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        network = network or nn.Sequential(nn.Conv2d(3, 7, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.batches: list[int] = []
        super().__init__(network, config or EncoderConfig(name="timm/small"), Preprocess(size), COLOUR, "cpu")

    def _image_tower(self) -> Callable[[Tensor], Tensor]:
        def tower(x: Tensor) -> Tensor:
            self.batches.append(len(x))
            rows: Tensor = self._network(x)
            return rows

        return tower


def test_rows_are_those_of_the_network() -> None:
    encoder, images = SmallEncoder(), noise(5, 12)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(COLOUR[0]).view(3, 1, 1)) / torch.tensor(
        COLOUR[1]
    ).view(3, 1, 1)
    with torch.no_grad():
        expected = encoder._network(x)
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
        assert isinstance(encoder, Encoder)
        assert not encoder.has_text
        with pytest.raises(ConfigError, match="has no text tower; take an open_clip one"):
            encoder.encode_texts(["a cat"])


def test_zero_rows_stay_zero() -> None:
    assert unit_rows(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0, 0], pytest.approx([0.6, 0.8])]


def test_near_names_are_offered() -> None:
    config = EncoderConfig(name="timm/resnet5")
    assert str(unknown_architecture(config, ["resnet50", "vit"])).endswith("no such architecture; near: resnet50")
    assert str(unknown_architecture(config, ["zzz"])).endswith("timm has no such architecture")
