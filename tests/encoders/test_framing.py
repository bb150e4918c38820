from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rayclust.encoders.framing import kept_box, stored_box, turn_of


def test_squash_keeps_everything() -> None:
    assert kept_box((40, 20), (8, 8), "squash", 1.0) == (0, 0, 40, 20)


def test_crop_keeps_the_middle_square() -> None:
    assert kept_box((40, 20), (10, 10), "crop", 1.0) == (10, 0, 30, 20)
    assert kept_box((20, 40), (10, 10), "crop", 1.0) == (0, 10, 20, 30)


def test_crop_fraction_keeps_less() -> None:
    # 224/0.875 = 256: the image is scaled by 2, and 16 of 256 go on each side.
    assert kept_box((128, 128), (224, 224), "crop", 0.875) == (8, 8, 120, 120)


def test_crop_to_a_rectangle() -> None:
    # 10 by 20 wanted of 40 by 40: the width decides, half of the height goes.
    assert kept_box((40, 40), (10, 20), "crop", 1.0) == (0, 10, 40, 30)


def test_very_long_images_keep_a_box_inside() -> None:
    for size in ((1, 100_000), (100_000, 1), (3, 7919)):
        left, top, right, bottom = kept_box(size, (224, 224), "crop", 0.9)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_of_the_file_show_what_the_upright_box_shows(orientation: int) -> None:
    stored = Image.fromarray(np.arange(7 * 5, dtype=np.uint8).reshape(7, 5))
    turn, upright = turn_of(orientation)
    assert upright is not None
    shown = stored.transpose(upright)
    box = (1.0, 2.0, 4.0, 5.0)
    part = stored.crop(tuple(int(edge) for edge in stored_box(box, stored.size, turn))).transpose(upright)
    assert np.array_equal(np.asarray(part), np.asarray(shown.crop((1, 2, 4, 5))))


@pytest.mark.parametrize("orientation", [1, 0, 9, None, "6", (6,)])
def test_other_orientations_change_nothing(orientation: object) -> None:
    assert turn_of(orientation) == ((False, False, False), None)
