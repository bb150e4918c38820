from __future__ import annotations

import numpy as np
import pytest

from rayclust.encoders.decode import decode
from rayclust.encoders.pixels import PixelEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.errors import ShapeError
from tests.encoders import picture_files as make
from tests.encoders.networks import noise


def encoder(**options: object) -> PixelEncoder:
    return PixelEncoder(EncoderConfig(name="pixels", **options))  # type: ignore[arg-type]


def test_pixels_run_from_zero_to_one_in_order() -> None:
    rows = encoder(image_size=1, normalize=False).encode_images(np.array([[[[0, 51, 255]]]], np.uint8))
    assert rows.tolist() == [pytest.approx([0, 0.2, 1])]


def test_grey_is_one_channel() -> None:
    grey = encoder(image_size=4, grayscale=True)
    assert (grey.dimension, grey.preprocess.shape) == (16, (4, 4, 1))
    assert grey.encode_images(np.full((2, 4, 4, 1), 7, np.uint8)).tolist() == [[0.25] * 16] * 2


def test_colours_may_be_shifted_and_scaled() -> None:
    shifted = encoder(image_size=1, normalize=False, mean=(0.2, 0.0, 0.0), std=(2.0, 1.0, 1.0))
    assert shifted.encode_images(np.array([[[[255, 0, 51]]]], np.uint8)).tolist() == [pytest.approx([0.4, 0, 0.2])]


def test_black_images_stay_zero_and_others_have_length_one() -> None:
    rows = encoder(image_size=3).encode_images(np.concatenate([noise(4, 3), np.zeros((1, 3, 3, 3), np.uint8)]))
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 1, 0])
    assert rows.dtype == np.float32


def test_rows_do_not_depend_on_the_batch() -> None:
    pixels, images = encoder(image_size=8), noise(9, 8)
    rows = pixels.encode_images(images)
    assert all(np.array_equal(pixels.encode_images(images[i : i + 1])[0], rows[i]) for i in range(9))


def test_defaults_squash_to_32() -> None:
    assert encoder().preprocess.shape == (32, 32, 3)
    assert decode(make.jpeg(), encoder().preprocess).shape == (32, 32, 3)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ShapeError):
        encoder(image_size=8).encode_images(noise(1, 9))
