"""Bytes of one image file to the pixels an encoder takes."""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from rayclust.encoders.colours import flatten
from rayclust.encoders.containers import picture_only, recognise
from rayclust.encoders.framing import kept_box, stored_box, turn_of
from rayclust.encoders.quiet import quiet_pillow
from rayclust.encoders.undecodable import Undecodable
from rayclust.errors import ConfigError

__all__ = ["PIXEL_CEILING", "Preprocess", "Undecodable", "decode"]

PIXEL_CEILING: Final = 178_956_970
"""The largest `max_pixels`: above it Pillow itself refuses to open a file."""

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
# What Pillow's readers raise on damaged files, found by feeding them such; anything else is a mistake of ours.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Preprocess:
    """How a file becomes pixels: size, way of resizing, limits."""

    size: int | tuple[int, int]
    """Side of the square, or (height, width), pixels."""
    resize: Literal["crop", "squash"] = "crop"
    """crop: scale until the shorter side fits, keep the centre. squash: scale both sides, whatever the aspect."""
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    """Resampling filter; widened when shrinking, so that nothing aliases."""
    crop_fraction: float = 1.0
    """For crop: the side kept, as a share of the shorter side; 0.875 scales to 256 and keeps 224. In (0, 1]."""
    grayscale: bool = False
    """One channel instead of three."""
    max_bytes: int = 100_000_000
    """Largest file, bytes."""
    max_pixels: int = 100_000_000
    """Most pixels a header may declare; at most `PIXEL_CEILING`."""
    jpeg_draft: bool = False
    """Let JPEGs decode at 1/2, 1/4 or 1/8 when that is still twice the wanted size. Five times faster on photographs of
    12 megapixels, but features move (cosine 0.996 to 0.9996), so it is off."""

    def __post_init__(self) -> None:
        if min(self.shape[:2]) < 1:
            raise ConfigError(f"image_size = {self.size}: must be at least 1")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"crop_fraction = {self.crop_fraction}: must be above 0 and at most 1")
        if not 1 <= self.max_pixels <= PIXEL_CEILING:
            raise ConfigError(f"max_pixels = {self.max_pixels}: must be from 1 to {PIXEL_CEILING}")
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes = {self.max_bytes}: must be at least 1")
        if self.interpolation not in _FILTERS:
            raise ConfigError(f"interpolation = {self.interpolation}: must be one of {' '.join(_FILTERS)}")
        if self.resize not in ("crop", "squash"):
            raise ConfigError(f"resize = {self.resize}: must be crop or squash")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of what `decode` returns."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width, 1 if self.grayscale else 3


def decode(data: bytes, preprocess: Preprocess) -> NDArray[np.uint8]:
    """One image file to pixels; the first frame of an animation, upright by its EXIF orientation.

    The result depends on nothing but the arguments. Palettes, grey, CMYK, alpha (on white), 16-bit and floating samples
    become 8-bit RGB; colour profiles are left alone. A file is taken whole or not at all.

    Args:
        data: the whole file, of any name: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, ICO or a portable map.
        preprocess: size and limits.

    Returns:
        UInt8[H W 3], or [H W 1] with `grayscale`; owned and contiguous.

    Raises:
        Undecodable: with one of the reasons of `rayclust.encoders.undecodable`.
    """
    if len(data) > preprocess.max_bytes:
        raise Undecodable("too_large", f"{len(data)} bytes, more than the limit of {preprocess.max_bytes}")
    name = recognise(data)
    picture = picture_only(data, name)
    with quiet_pillow():
        try:
            return _decode(picture, name, preprocess)
        except _FAILURES as error:
            if isinstance(error, Undecodable):
                raise
            raise _explained(error, name) from error


def _decode(data: bytes, name: str, p: Preprocess) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=(name,)) as image:
        _check_size(image.size, p.max_pixels)
        if p.jpeg_draft and name == "JPEG":
            shorter = 2 * math.ceil(max(p.shape[:2]) / p.crop_fraction)
            image.draft(None, (shorter, shorter))
        image.load()
        _check_size(image.size, p.max_pixels)
        turn, upright = turn_of(_orientation(image))
        flat = flatten(image, "L" if p.grayscale else "RGB")
    height, width, _ = p.shape
    turned = turn[0]
    box = kept_box(flat.size[::-1] if turned else flat.size, (height, width), p.resize, p.crop_fraction)
    box = stored_box(box, flat.size, turn)
    small = flat.resize((height, width) if turned else (width, height), _FILTERS[p.interpolation], box)
    if upright is not None:
        small = small.transpose(upright)
    return np.array(small, dtype=np.uint8).reshape(p.shape)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise Undecodable("zero_size", f"{width}×{height} pixels")
    if width * height > max_pixels:
        raise Undecodable("too_many_pixels", f"{width}×{height} pixels, more than the limit of {max_pixels}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; a damaged EXIF block does not cost the image."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _FAILURES:
        return 1
    return value if isinstance(value, int) else 1


def _explained(error: BaseException, name: str) -> Undecodable:
    # Pillow names objects by address in some messages: rejects must be the same bytes on every run.
    text = " ".join(re.sub(r"<[^>]*>| at 0x[0-9a-f]+", "", str(error)).split())[:200]
    if isinstance(error, Image.DecompressionBombError):
        return Undecodable("too_many_pixels", text)
    if isinstance(error, MemoryError):
        return Undecodable("out_of_memory", f"while decoding a {name} file")
    if isinstance(error, UnidentifiedImageError):
        return Undecodable("corrupt", f"the header of a {name} file cannot be read")
    if "Decompressed data too large" in text or "Too much memory used for text" in text:
        return Undecodable("bomb", f"{name}: {text}")
    if re.search("truncated|not enough image data|Not enough|unexpected end|EOF", text, re.IGNORECASE):
        return Undecodable("truncated", f"{name}: {text}")
    return Undecodable("corrupt", f"{name}: {text or type(error).__name__}")
