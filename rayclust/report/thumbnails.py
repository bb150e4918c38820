"""Thumbnails for the page, with Pillow alone: a file that cannot be read gets a placeholder."""

from __future__ import annotations

import base64
import io
import warnings
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageOps

MAX_PIXELS = 200_000_000
"""Larger images get the placeholder: they may be decompression bombs."""
MAX_ASPECT = 1.5
"""A thumbnail is at most so many times longer than wide, unless asked for otherwise."""
QUALITY = 76

_MEDIA_TYPES = {"WEBP": "image/webp", "JPEG": "image/jpeg", "PNG": "image/png"}
# Pillow's decoders raise any of these on damaged files; SyntaxError for a broken PNG
_DECODING = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, ArithmeticError, EOFError)
_REFUSED = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)


def thumbnail(data: bytes, size: int = 128, max_aspect: float = MAX_ASPECT) -> bytes:
    """Shrink an image: upright, RGB, on white where it was transparent, and never enlarged.

    Args:
        data: an encoded image of any kind that Pillow reads; of an animation the first frame is taken.
        size: pixels on the shorter side, at least 1.
        max_aspect: how many times as many the longer side may have, at least 1; the rest is cropped at both ends.

    Returns:
        An encoded webp, the same bytes for the same image; a neutral placeholder where `data` is not a readable image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return placeholder(size)
                image.draft("RGB", (4 * size, 4 * size))  # JPEG decodes at a fraction of its size
                upright: Image.Image = ImageOps.exif_transpose(image)
                if upright.mode.startswith(("I", "F")):
                    # Stretch deep greys over the range that they fill: a 16-bit scan that uses 12 bits is not black.
                    values = np.nan_to_num(np.asarray(upright, dtype=np.float64), posinf=0.0, neginf=0.0)
                    low, high = values.min(), values.max()
                    grey = np.zeros_like(values) if high == low else (values - low) / (high - low)
                    upright = Image.fromarray((grey * 255).round().astype(np.uint8))
                elif upright.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in upright.info:
                    ground = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(ground, upright.convert("RGBA"))
                upright = upright.convert("RGB")
            # Scale by the shorter side; of a long image the middle is kept.
            short, long = sorted(upright.size)
            scale = min(1.0, size / short)
            shape = [max(1, round(min(side, max_aspect * short) * scale)) for side in upright.size]
            fit = upright.resize if long <= max_aspect * short else partial(ImageOps.fit, upright)
            small = fit((shape[0], shape[1]), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            tiny = min(small.size) < 48  # too few pixels to lose any
            small.save(buffer, "WEBP", quality=QUALITY, method=4, lossless=tiny)
            return buffer.getvalue()
    except (*_DECODING, *_REFUSED):
        return placeholder(size)


@lru_cache(maxsize=8)
def placeholder(size: int = 128) -> bytes:
    """Draw the square placeholder of a missing picture: grey hills and a sun, framed, as webp with a clear ground."""
    scale = 4 * max(16, size)
    image = Image.new("RGBA", (scale, scale), (128, 134, 142, 40))
    pen = ImageDraw.Draw(image)
    ink, line = (128, 134, 142, 190), max(1, scale // 40)
    box = [scale * 0.28, scale * 0.32, scale * 0.72, scale * 0.68]
    pen.rounded_rectangle(box, radius=scale // 24, outline=ink, width=line)
    pen.ellipse([scale * 0.36, scale * 0.39, scale * 0.43, scale * 0.46], fill=ink)
    hills = (0.31, 0.63), (0.42, 0.52), (0.50, 0.60), (0.59, 0.48), (0.69, 0.61)
    pen.line([(scale * x, scale * y) for x, y in hills], fill=ink, width=line, joint="curve")
    buffer = io.BytesIO()
    image.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def data_url(data: bytes | None) -> tuple[str, int, int] | None:
    """Return a thumbnail as a data URL, its width and height in pixels; None unless it is webp, jpeg or png."""
    if not data:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=tuple(_MEDIA_TYPES)) as image:
                source = f"data:{_MEDIA_TYPES[image.format or '']};base64,{base64.b64encode(data).decode('ascii')}"
                return source, image.width, image.height
    except (*_DECODING, *_REFUSED):
        return None
