"""The bad half of the table of odd images: foreign, truncated, damaged and explosive files."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from rayclust.encoders.undecodable import Reason
from tests.encoders import picture_files as make
from tests.encoders.picture_files import HEIGHT, QUARTERS, RGB, WIDTH, chunk, declared, jpeg, png, saved

Quarters = tuple[RGB, RGB, RGB, RGB]
Case = tuple[str, bytes, Quarters | Reason]
BLACK: Quarters = ((0, 0, 0),) * 4  # type: ignore[assignment]


def bad_files() -> Iterator[Case]:
    yield from _foreign()
    yield from _truncated()
    yield from _damaged()
    yield from _bombs()


def _foreign() -> Iterator[Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a.jpg", jpeg())
    yield "foreign/nothing.jpg", b"", "empty"
    yield "foreign/one_byte.jpg", b"\xff", "not_an_image"
    yield "foreign/zeros.jpg", b"\0" * 4096, "not_an_image"
    yield "foreign/ones.jpg", b"\xff" * 4096, "not_an_image"
    yield "foreign/noise.jpg", np.random.default_rng(7).bytes(4096), "not_an_image"
    yield "foreign/text.jpg", b"This is not an image.\n" * 40, "not_an_image"
    yield "foreign/portable_text.jpg", b"Please find the picture attached", "not_an_image"
    yield "foreign/page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"
    yield "foreign/page_with_drawing.png", b"<html><body><svg width='1'/></body></html>", "not_an_image"
    yield "foreign/message.png", b'{"error": "not found"}', "not_an_image"
    yield "foreign/drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"
    yield "foreign/drawing_xml.png", b"<?xml version='1.0'?>\n<svg width='9'/>", "unsupported"
    yield "foreign/archive.jpg", archive.getvalue(), "not_an_image"
    yield "foreign/packed.jpg", b"\x1f\x8b\x08\0" + b"\0" * 60, "not_an_image"
    yield "foreign/table.jpg", b"PAR1" + b"\0" * 60 + b"PAR1", "not_an_image"
    yield "foreign/array.png", b"\x93NUMPY\x01\0" + b"\0" * 60, "not_an_image"
    yield "foreign/sound.webp", b"RIFF" + struct.pack("<I", 60) + b"WAVE" + b"\0" * 56, "not_an_image"
    yield "foreign/document.jpg", b"%PDF-1.7\n", "unsupported"
    yield "foreign/document.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported"
    yield "foreign/layers.jpg", b"8BPS\0\1" + b"\0" * 60, "unsupported"
    yield "foreign/phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 60, "unsupported"
    yield "foreign/film.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isommp42" + b"\0" * 60, "unsupported"
    yield "foreign/next.jxl", b"\xff\x0a" + b"\0" * 60, "unsupported"
    yield "foreign/scan.dcm", b"\0" * 128 + b"DICM" + b"\0" * 60, "unsupported"


def _truncated() -> Iterator[Case]:
    """Files cut at many places: within the signature, the header, the pixels and just before the end."""
    for name, whole in (
        ("jpeg", jpeg()),
        ("progressive", jpeg(progressive=True)),
        ("png", saved(make.picture(), "PNG")),
        ("webp", saved(make.picture(), "WEBP", lossless=True)),
    ):
        places = {2, 3, 7, len(whole) - 1, *(round(len(whole) * share / 22) for share in range(1, 22))}
        for place in sorted(places):
            # Two bytes of "RIFF" are the beginning of many things.
            reason: Reason = "not_an_image" if name == "webp" and place < 12 else "truncated"
            yield f"truncated/{name}_{place:04d}.{name}", whole[:place], reason
    gif, tiff, bmp = (saved(make.picture(), name) for name in ("GIF", "TIFF", "BMP"))
    for share in range(1, 10):
        yield f"truncated/gif_{share}.gif", gif[: len(gif) * share // 10], "truncated"
        yield f"truncated/bmp_{share}.bmp", bmp[: len(bmp) * share // 10], "truncated"
    yield "truncated/tiff_half.tif", tiff[: len(tiff) // 2], "truncated"
    yield "truncated/ppm_half.ppm", saved(make.picture(), "PPM")[:900], "truncated"
    yield "truncated/zero_filled.jpg", jpeg()[:700] + b"\0" * 2000, "truncated"
    yield "truncated/without_end_marker.jpg", jpeg()[:-2], "truncated"


def _damaged() -> Iterator[Case]:
    whole = saved(make.picture(), "PNG")
    first, data = whole.index(b"IHDR"), whole.index(b"IDAT")
    yield "damaged/checksum.png", whole[: data + 9] + bytes([whole[data + 9] ^ 1]) + whole[data + 10 :], "corrupt"
    yield "damaged/header_checksum.png", whole[: first + 14] + b"\x07" + whole[first + 15 :], "corrupt"
    yield "damaged/chunk_name.png", whole[:data] + b"\0\0\0\0" + whole[data + 4 :], "corrupt"
    yield "damaged/pixels.png", _png_of(chunk(b"IDAT", b"no deflate stream")), "corrupt"
    yield "damaged/few_rows.png", _png_of(chunk(b"IDAT", zlib.compress(b"\0" * 500))), "truncated"
    yield "damaged/no_pixels.png", _png_of(b""), "corrupt"
    yield (
        "damaged/colour_type.png",
        declared(png([b"\0" * 8], depth=8, colour=0), _header(8, 1, 0), _header(8, 1, 5)),
        "corrupt",
    )
    yield "damaged/zero_width.png", make.png_declared(0, 8), "corrupt"
    yield "damaged/zero_size.jpg", make.jpeg_declared(0, 0), "corrupt"
    yield (
        "damaged/zero_size.gif",
        declared(saved(make.picture(), "GIF"), struct.pack("<HH", WIDTH, HEIGHT), struct.pack("<HH", 0, 0)),
        QUARTERS,
    )
    yield "damaged/only_markers.jpg", b"\xff\xd8\xff\xd9", "corrupt"
    yield "damaged/segment_length.jpg", b"\xff\xd8\xff\xe0\x00\x00" + jpeg()[2:], "corrupt"
    yield "damaged/without_tables.jpg", _without(jpeg(), 0xDB), "corrupt"
    yield "damaged/without_codes.jpg", _without(jpeg(), 0xC4), QUARTERS
    yield "damaged/without_frame.jpg", _without(jpeg(), 0xC0), "corrupt"
    webp = bytearray(saved(make.picture(), "WEBP", lossless=True))
    webp[24:40] = b"\xff" * 16
    yield "damaged/pixels.webp", bytes(webp), "corrupt"
    yield "damaged/header.bmp", b"BM" + b"\xff" * 200, "truncated"
    yield "damaged/header.tif", b"II*\0" + b"\xff" * 200, "corrupt"
    yield "damaged/directory_loop.tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0" + b"\0" * 50, "corrupt"
    yield "damaged/header.ico", b"\0\0\1\0" + b"\xff" * 100, "corrupt"
    yield "damaged/words.ppm", b"P6 many few 255\n" + b"\0" * 100, "corrupt"
    yield "damaged/no_frame.gif", b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";", "corrupt"
    yield "damaged/codes.gif", _gif_with(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\x00"), "corrupt"
    yield "damaged/few_codes.gif", _gif_with(b"\x00"), "truncated"


def _header(width: int, height: int, colour: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))


def _png_of(middle: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _header(WIDTH, HEIGHT, 2) + middle + chunk(b"IEND", b"")


def _gif_with(blocks: bytes) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 64, 64, 0) + b"\x02" + blocks + b";"


def _without(data: bytes, code: int) -> bytes:
    """A JPEG without its segments of one kind."""
    while (at := data.find(bytes([0xFF, code]))) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    return data


def _bombs() -> Iterator[Case]:
    yield "bomb/declared.png", make.png_declared(40_000, 40_000), "too_many_pixels"
    yield "bomb/declared_most.png", make.png_declared(2**31 - 1, 2**31 - 1), "too_many_pixels"
    yield "bomb/declared.jpg", make.jpeg_declared(65_500, 65_500), "too_many_pixels"
    yield "bomb/one_bit.png", make.one_bit_bomb(12_000), "too_many_pixels"
    screen = struct.pack("<HH", WIDTH, HEIGHT)
    yield "bomb/screen.gif", declared(saved(make.picture(), "GIF"), screen, b"\xff\xff\xff\xff"), "too_many_pixels"
    yield (
        "bomb/declared.bmp",
        declared(saved(make.picture(), "BMP"), struct.pack("<ii", WIDTH, HEIGHT), struct.pack("<ii", 60_000, 60_000)),
        "too_many_pixels",
    )
    yield "bomb/declared.ppm", b"P6 60000 60000 255\n" + b"\0" * 100, "too_many_pixels"
    yield "bomb/declared.tif", _tiff_declared(60_000, 60_000), "too_many_pixels"
    yield "bomb/canvas.webp", _webp_declared(16_384, 16_384), "too_many_pixels"
    text = b"Comment\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    yield "bomb/text.png", png([b"\0" * 8] * 8, depth=8, colour=0, extra=chunk(b"zTXt", text)), BLACK
    text = b"Comment\0\1\0\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    yield "bomb/long_text.png", png([b"\0" * 8] * 8, depth=8, colour=0, extra=chunk(b"iTXt", text)), BLACK
    profile = b"p\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    yield "bomb/profile.png", png([b"\0" * 8] * 8, depth=8, colour=0, extra=chunk(b"iCCP", profile)), BLACK
    yield "bomb/rows.png", png([b"\0" * 8] * 3_000_000, depth=8, colour=0, size=(8, 8)), BLACK
    yield "bomb/scans.jpg", make.scan_bomb(5_000), "bomb"


def _tiff_declared(width: int, height: int) -> bytes:
    tags = ((256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
            (278, 4, height), (279, 4, 100))  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 200


def _webp_declared(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", 0x12)[:4] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    still = saved(make.picture(), "WEBP", lossless=True)[12:]
    frame = b"ANMF" + struct.pack("<I", 16 + len(still)) + bytes(6) + (WIDTH - 1).to_bytes(3, "little")
    frame += (HEIGHT - 1).to_bytes(3, "little") + bytes(4) + still
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body
