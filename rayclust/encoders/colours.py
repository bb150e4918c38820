"""Every colour model of an image file to plain RGB or grey, 8 bits.

Transparency lies on white. Sixteen bits are scaled, not clipped. Embedded colour profiles are left alone, as the
encoders' own training pipelines did.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from rayclust.arrays import FloatArray
from rayclust.encoders.undecodable import Undecodable

_STORED_16 = {"I;16", "I;16L", "I;16B", "I;16N"}


def flatten(image: Image.Image, mode: Literal["RGB", "L"]) -> Image.Image:
    """An image without alpha, palette or deep samples.

    Args:
        image: loaded; any mode of Pillow.
        mode: colour or grey (ITU-R 601 luma).

    Returns:
        An image of `mode` and the same size.

    Raises:
        Undecodable: `not_finite`, a floating image without one finite value.
    """
    if image.mode in _STORED_16:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        image = Image.fromarray(_stretched(np.asarray(image).astype(np.float64)))
    elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow reads every four-channel JPEG as Adobe's, whose inks are inverted; files of others are not.
        image = ImageChops.invert(image)
    elif image.has_transparency_data:
        image = _on_white(image)
    return image if image.mode == mode else image.convert(mode)


def _on_white(image: Image.Image) -> Image.Image:
    colours = image if image.mode == "RGBA" else image.convert("RGBA")
    ground = Image.new("RGB", image.size, (255, 255, 255))
    ground.paste(colours, mask=colours.getchannel("A"))
    return ground


def _stretched(values: FloatArray) -> NDArray[np.uint8]:
    """Values of unknown range to 0..255: fractions, bytes and 16 bits keep their meaning, all else is stretched."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise Undecodable("not_finite", "a floating image without one finite value")
    low, high = float(finite.min()), float(finite.max())
    for scale in (1.0, 255.0, 65535.0):
        if low >= 0 and high <= scale:
            low, high = 0.0, scale
            break
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny)
    pixels: NDArray[np.uint8] = np.rint(scaled * 255.0).astype(np.uint8)
    return pixels
