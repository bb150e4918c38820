"""Which part of a stored image is shown, and which way up."""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from PIL import Image

Box = tuple[float, float, float, float]
"""(left, top, right, bottom), pixels."""
Turn = tuple[bool, bool, bool]
"""Whether the axes of the file are swapped, and whether its x and its y then run backwards."""

_TURNS: Final[dict[Any, tuple[Turn, Image.Transpose]]] = {
    2: ((False, True, False), Image.Transpose.FLIP_LEFT_RIGHT),
    3: ((False, True, True), Image.Transpose.ROTATE_180),
    4: ((False, False, True), Image.Transpose.FLIP_TOP_BOTTOM),
    5: ((True, False, False), Image.Transpose.TRANSPOSE),
    6: ((True, False, True), Image.Transpose.ROTATE_270),
    7: ((True, True, True), Image.Transpose.TRANSVERSE),
    8: ((True, True, False), Image.Transpose.ROTATE_90),
}


def turn_of(orientation: Any) -> tuple[Turn, Image.Transpose | None]:
    """What an EXIF orientation (2 to 8) does to the file's axes, and what makes the image upright; else nothing."""
    return _TURNS.get(orientation, ((False, False, False), None))


def kept_box(
    shown: tuple[int, int], target: tuple[int, int], resize: Literal["crop", "squash"], crop_fraction: float
) -> Box:
    """The part of the upright image that is scaled to the wanted size.

    Scaling only what is kept bounds memory for very long images. The arithmetic is that of scaling everything to whole
    pixels and then cutting at whole pixels.

    Args:
        shown: (width, height) of the upright image.
        target: (height, width) wanted.
        resize: crop or squash.
        crop_fraction: for crop, the share of the shorter side that is kept; in (0, 1].

    Returns:
        A box inside the upright image.
    """
    width, height = shown
    if resize == "squash":
        return 0.0, 0.0, float(width), float(height)
    rows, columns = target
    tall, wide = math.floor(rows / crop_fraction), math.floor(columns / crop_fraction)
    if tall * width >= wide * height:
        wide = tall * width // height
    else:
        tall = wide * height // width
    left, top = round((wide - columns) / 2), round((tall - rows) / 2)
    x, y = width / wide, height / tall
    return left * x, top * y, min((left + columns) * x, width), min((top + rows) * y, height)


def stored_box(box: Box, size: tuple[int, int], turn: Turn) -> Box:
    """A box of the upright image in the coordinates of the file, whose (width, height) is `size`."""
    left, top, right, bottom = box
    swap, back_x, back_y = turn
    if swap:
        left, top, right, bottom = top, left, bottom, right
    if back_x:
        left, right = max(size[0] - right, 0.0), size[0] - left
    if back_y:
        top, bottom = max(size[1] - bottom, 0.0), size[1] - top
    return left, top, right, bottom
