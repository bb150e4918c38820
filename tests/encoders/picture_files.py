"""Small picture files of many kinds, made in code; all show the same four coloured quarters."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

RGB = tuple[int, int, int]
RED, GREEN, BLUE, WHITE = (220, 30, 40), (40, 190, 60), (30, 60, 210), (255, 255, 255)
QUARTERS: tuple[RGB, RGB, RGB, RGB] = (RED, GREEN, BLUE, WHITE)
"""Top left, top right, bottom left, bottom right."""
WIDTH, HEIGHT = 48, 32


@cache
def pixels(width: int = WIDTH, height: int = HEIGHT) -> Any:
    picture = np.zeros((height, width, 3), np.uint8)
    rows, columns = height // 2, width // 2
    picture[:rows, :columns], picture[:rows, columns:] = RED, GREEN
    picture[rows:, :columns], picture[rows:, columns:] = BLUE, WHITE
    return picture


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(pixels(width, height))


def luma(colour: RGB) -> RGB:
    grey = round((299 * colour[0] + 587 * colour[1] + 114 * colour[2]) / 1000)
    return grey, grey, grey


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def jpeg(**options: Any) -> bytes:
    return saved(picture(), "JPEG", quality=95, subsampling=0, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    rows: Any, *, depth: int, colour: int, size: tuple[int, int] | None = None, extra: bytes = b"", interlace: int = 0
) -> bytes:
    """A PNG written by hand; `rows` are the bytes of each row, without filter bytes."""
    rows = [bytes(row) for row in rows]
    height = len(rows) if size is None else size[1]
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width = len(rows[0]) * 8 // (depth * samples) if size is None else size[0]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def adam7() -> bytes:
    """An interlaced RGB PNG."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    image = pixels()
    body = b"".join(
        b"\0" + row.tobytes() for y, x, down, right in passes for row in image[y::down, x::right] if row.size
    )
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def deep(alpha: bool) -> bytes:
    """16 bits per sample, colour, as PNG; the low bytes are noise."""
    image = pixels().astype(np.uint16) * 256 + 77
    if alpha:
        image = np.concatenate([image, np.full((*image.shape[:2], 1), 65535, np.uint16)], axis=2)
    return png(image.astype(">u2").reshape(HEIGHT, -1).view(np.uint8), depth=16, colour=6 if alpha else 2)


def tiff(bands: int, bits: int, *, sample: int = 1, photometric: int = 1, compression: int = 1) -> bytes:
    """A TIFF of 8 by 8 zeros of any kind of sample."""
    size = 8 * bands * bits
    tags: Any = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    tags.update({256: 8, 257: 8, 258: (bits,) * bands, 259: compression, 262: photometric, 273: 0, 277: bands, 278: 8})
    tags.update({279: size, 339: (sample,) * bands})  # the offset in 273 is counted from the end of the directory
    return b"II*\0\x08\0\0\0" + tags.tobytes(8) + bytes(size)


def ycck() -> bytes:
    """A four-channel JPEG whose colours are stored as luma and chroma, inverted, as Adobe's programs write."""
    inks = np.asarray(Image.fromarray(255 - pixels()).convert("YCbCr"))
    stored = np.concatenate([inks, np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=2)
    data = saved(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=95, subsampling=0)
    marker = data.index(b"Adobe\x00d")
    return data[: marker + 11] + b"\x02" + data[marker + 12 :]


def plain_cmyk() -> bytes:
    """A four-channel JPEG without Adobe's marker, so its inks are not inverted."""
    image = picture().convert("CMYK")
    data = saved(Image.fromarray(255 - np.asarray(image), "CMYK"), "JPEG", quality=95, subsampling=0)
    marker = data.index(b"\xff\xee")
    return data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big") :]


def turned(orientation: int, name: str = "JPEG", **options: Any) -> bytes:
    """A file that shows the quarters only when its EXIF orientation is obeyed."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture() if undo is None else picture().transpose(undo)
    return saved(image, name, exif=exif, **options)


def with_segment(data: bytes, code: int, body: bytes) -> bytes:
    """A JPEG with one more segment after its first two bytes."""
    return data[:2] + bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def frames(name: str, count: int = 3, **options: Any) -> bytes:
    """An animation whose first frame shows the quarters and whose others are black."""
    rest = [Image.new("RGB", (WIDTH, HEIGHT), (i, 0, 0)) for i in range(count - 1)]
    return saved(picture(), name, save_all=True, append_images=rest, **options)


def clear_bottom_right() -> Image.Image:
    """The quarters, the white one being fully transparent black instead."""
    image = np.concatenate([pixels(), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=2)
    image[HEIGHT // 2 :, WIDTH // 2 :] = 0
    return Image.fromarray(image)


def declared(data: bytes, find: bytes, replace: bytes) -> bytes:
    """A file whose header lies: the first `find` becomes `replace`."""
    at = data.index(find)
    return data[:at] + replace + data[at + len(find) :]


def png_declared(width: int, height: int) -> bytes:
    return png([b"\0" * 8], depth=8, colour=0, size=(width, height))


def jpeg_declared(width: int, height: int) -> bytes:
    return declared(jpeg(), struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", height, width))


def one_bit_bomb(side: int) -> bytes:
    """A real picture of side² pixels in a few kilobytes."""
    return saved(Image.new("1", (side, side)), "PNG", compress_level=9)


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"
