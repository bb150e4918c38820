from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rayclust.encoders.colours import flatten
from rayclust.encoders.undecodable import Undecodable


def pixel(image: Image.Image) -> object:
    return flatten(image, "RGB").getpixel((0, 0))


def test_alpha_lies_on_white() -> None:
    # 0.2 of 100 and 0.8 of 255.
    assert pixel(Image.new("RGBA", (1, 1), (100, 0, 255, 51))) == (224, 204, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (3, 1), np.array([0, 0x80FF, 0xFFFF], order).tobytes())
    assert np.asarray(flatten(image, "L")).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # fractions
        ([0.0, 3.0, 200.0], [0, 3, 200]),  # bytes
        ([0.0, 257.0, 65535.0], [0, 1, 255]),  # 16 bits
        ([-1.0, 0.0, 1.0], [0, 128, 255]),  # anything else is stretched
        ([0.0, np.nan, 1.0], [0, 0, 255]),
        ([0.25, np.inf, 1.0], [64, 255, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
    ],
)
def test_floating_samples(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert np.asarray(flatten(image, "L")).tolist() == [expected]


def test_integers_of_32_bits_above_16_bits_are_stretched() -> None:
    image = Image.fromarray(np.array([[0, 500_000, 1_000_000]], np.int32))
    assert np.asarray(flatten(image, "L")).tolist() == [[0, 128, 255]]


def test_nothing_finite_is_refused() -> None:
    with pytest.raises(Undecodable, match="not_finite"):
        flatten(Image.fromarray(np.full((2, 2), np.inf, np.float32)), "RGB")


def test_plain_modes_pass_unchanged() -> None:
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    assert flatten(image, "RGB") is image


def test_inks_of_a_tiff_are_not_inverted() -> None:
    assert pixel(Image.new("CMYK", (1, 1), (255, 0, 0, 0))) == (0, 255, 255)
