from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayclust.report import thumbnails
from tests.report.pages import photo


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == "WEBP"
    return image.convert("RGB")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (171, 128)), ((480, 640), (128, 171)), ((1000, 100), (150, 100)), ((3000, 200), (192, 128))],
)
def test_the_shorter_side_fits_and_panoramas_are_cropped(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert opened(thumbnails.thumbnail(photo(0, size), 128)).size == expected


def test_small_pictures_are_neither_enlarged_nor_changed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    small = opened(thumbnails.thumbnail(encode(Image.fromarray(pixels), "PNG")))
    np.testing.assert_array_equal(np.asarray(small), pixels)


def test_the_same_picture_gives_the_same_bytes() -> None:
    assert thumbnails.thumbnail(photo(3)) == thumbnails.thumbnail(photo(3))
    thumbnails.placeholder.cache_clear()
    first = thumbnails.placeholder(64)
    thumbnails.placeholder.cache_clear()
    assert thumbnails.placeholder(64) == first


def test_exif_orientation_is_followed() -> None:
    upright = Image.new("RGB", (60, 40), "red")
    upright.paste("blue", (0, 0, 60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    small = opened(thumbnails.thumbnail(encode(lying, "JPEG", exif=exif, quality=95)))
    assert small.size == (60, 40)
    red, _, blue = small.getpixel((30, 5))
    assert blue > 200 > red


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (50, 50), "white")
    image.paste("black", (0, 0, 25, 50))
    data = encode(image.convert(mode), "TIFF")
    small = opened(thumbnails.thumbnail(data))
    assert max(small.getpixel((5, 25))) < 30
    assert min(small.getpixel((45, 25))) > 225


def test_transparent_pixels_are_white_and_deep_greys_fill_the_range() -> None:
    clear = encode(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG")
    assert min(opened(thumbnails.thumbnail(clear)).getpixel((20, 20))) > 250
    ramp = np.tile(np.linspace(0, 4095, 64, dtype=np.uint16), (64, 1))
    deep = opened(thumbnails.thumbnail(encode(Image.fromarray(ramp), "PNG")))
    assert deep.getpixel((63, 30))[0] > 250


def _bomb() -> bytes:
    """A PNG whose header promises 40,000 × 40,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", photo(0)[:200], photo(0, form="PNG")[:60], b"GIF89a" + bytes(20), b"<svg/>", _bomb()],
    ids=["empty", "text", "cut jpeg", "cut png", "gif header", "svg", "bomb"],
)
def test_what_cannot_be_read_gets_the_placeholder(data: bytes) -> None:
    assert thumbnails.thumbnail(data, 48) == thumbnails.placeholder(48)


def test_cuts_at_any_place_never_raise() -> None:
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = photo(1, form=form)
        for share in range(20):
            assert thumbnails.data_url(thumbnails.thumbnail(data[: len(data) * share // 20], 16)) is not None


def test_real_photographs_stay_small_and_true(shared_data: Path) -> None:
    table = pq.ParquetFile(shared_data / "imagenette_val3k" / "images.parquet")
    photos = next(table.iter_batches(batch_size=20, columns=["image"])).column("image").to_pylist()
    for data in photos:
        small = thumbnails.thumbnail(data)
        assert 1_000 < len(small) < 12_000
        plain = Image.open(io.BytesIO(data)).convert("RGB").resize((128, 128), Image.Resampling.BOX)
        difference = np.abs(np.asarray(opened(small), dtype=int) - np.asarray(plain, dtype=int))
        assert difference.mean() < 12


def test_a_data_url_is_made_of_web_pictures_alone() -> None:
    for data, kind, size in (
        (photo(0), "image/jpeg", (64, 48)),
        (photo(0, form="PNG"), "image/png", (64, 48)),
        (thumbnails.placeholder(32), "image/webp", (32, 32)),
    ):
        found = thumbnails.data_url(data)
        assert found == (f"data:{kind};base64,{base64.b64encode(data).decode()}", *size)
    assert thumbnails.data_url(photo(0, form="TIFF")) is None
    assert thumbnails.data_url(b"<svg onload=alert(1)>") is None
    assert thumbnails.data_url(None) is None


def test_a_long_picture_is_cropped_as_far_as_is_asked_for():
    buffer = io.BytesIO()
    Image.new("RGB", (400, 100), "red").save(buffer, "PNG")
    for aspect, wanted in ((1.5, (75, 50)), (3.0, (150, 50)), (8.0, (200, 50))):
        assert Image.open(io.BytesIO(thumbnails.thumbnail(buffer.getvalue(), 50, aspect))).size == wanted
