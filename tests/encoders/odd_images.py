"""A table of odd and bad image files, each with what must come of it.

`odd_images()` gives (name, bytes, expected): four colours (top left, top right, bottom left, bottom right) when the
file decodes, or the reason when it does not. Limits are those of `Preprocess`.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from rayclust.encoders.decode import Reason
from tests.encoders import picture_files as make
from tests.encoders.picture_files import HEIGHT, QUARTERS, RGB, WIDTH, chunk, declared, frames, jpeg, luma, png, saved

Quarters = tuple[RGB, RGB, RGB, RGB]
Case = tuple[str, bytes, Quarters | Reason]
BLACK: Quarters = ((0, 0, 0),) * 4  # type: ignore[assignment]
WHITE_ONLY: Quarters = ((255, 255, 255),) * 4  # type: ignore[assignment]
GREY: Quarters = tuple(luma(colour) for colour in QUARTERS)  # type: ignore[assignment]


@dataclass(frozen=True)
class OddImage:
    name: str
    """kind/file name; unique, and fit to be a path."""
    data: bytes
    expected: Quarters | Reason

    @property
    def decodes(self) -> bool:
        return not isinstance(self.expected, str)


@cache
def odd_images() -> tuple[OddImage, ...]:
    cases = (*_jpegs(), *_pngs(), *_others(), *_foreign(), *_truncated(), *_damaged(), *_bombs())
    return tuple(OddImage(*case) for case in cases)


def quarters(pixels: NDArray[np.uint8]) -> Quarters:
    """The colours in the middle of the four quarters of UInt8[H W 3]."""
    rows, columns = pixels.shape[0] // 4, pixels.shape[1] // 4
    places = ((rows, columns), (rows, 3 * columns), (3 * rows, columns), (3 * rows, 3 * columns))
    means = (pixels[y - 1 : y + 1, x - 1 : x + 1].reshape(-1, 3).mean(0) for y, x in places)
    return tuple(tuple(round(float(value)) for value in mean) for mean in means)  # type: ignore[return-value]


def _jpegs() -> Iterator[Case]:
    yield "jpeg/baseline.jpg", jpeg(), QUARTERS
    yield "jpeg/progressive.jpg", jpeg(progressive=True), QUARTERS
    yield "jpeg/optimized.jpeg", jpeg(optimize=True), QUARTERS
    yield "jpeg/restart_markers.jpg", jpeg(restart_marker_rows=1), QUARTERS
    yield "jpeg/upper_case.JPG", jpeg(), QUARTERS
    yield "jpeg/grey.jpg", saved(make.picture().convert("L"), "JPEG", quality=95), GREY
    yield "jpeg/cmyk_adobe.jpg", saved(make.picture().convert("CMYK"), "JPEG", quality=95, subsampling=0), QUARTERS
    yield "jpeg/cmyk_plain.jpg", make.plain_cmyk(), QUARTERS
    yield "jpeg/ycck_adobe.jpg", make.ycck(), QUARTERS
    for orientation in range(1, 9):
        data = make.turned(orientation, quality=95, subsampling=0)
        yield f"jpeg/orientation_{orientation}.jpg", data, QUARTERS
    yield (
        "jpeg/orientation_99.jpg",
        declared(
            make.turned(6, quality=95),
            b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06",
            b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x63",
        ),
        _quarter_turned(),
    )
    yield "jpeg/exif_garbage.jpg", make.with_segment(jpeg(), 0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"), QUARTERS
    yield "jpeg/exif_thumbnail.jpg", make.with_segment(jpeg(), 0xE1, b"Exif\0\0" + jpeg()), QUARTERS
    yield "jpeg/comment.jpg", make.with_segment(jpeg(), 0xFE, b"\xff\xd9 not the end"), QUARTERS
    remark = b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10x"
    yield "jpeg/bad_remark.jpg", make.with_segment(jpeg(), 0xED, remark), QUARTERS
    yield "jpeg/trailing_junk.jpg", jpeg() + b"junk" * 1000, QUARTERS
    yield "jpeg/named_png.png", jpeg(), QUARTERS
    yield (
        "jpeg/multi_picture.mpo.jpg",
        saved(make.picture(), "MPO", save_all=True, append_images=[make.picture()], quality=95, subsampling=0),
        QUARTERS,
    )
    yield "jpeg/colour_profile.jpg", jpeg(icc_profile=b"\0" * 128 + b"not a profile"), QUARTERS
    yield "jpeg/thin.jpg", saved(make.picture(2, 4000), "JPEG", quality=95, subsampling=0), QUARTERS


def _quarter_turned() -> Quarters:
    """What the file of orientation 6 shows when its orientation is not obeyed."""
    top_left, top_right, bottom_left, bottom_right = QUARTERS
    return top_right, bottom_right, top_left, bottom_left


def _pngs() -> Iterator[Case]:
    picture, clear = make.picture(), make.clear_bottom_right()
    yield "png/rgb.png", saved(picture, "PNG"), QUARTERS
    yield "png/named_jpg.jpg", saved(picture, "PNG"), QUARTERS
    yield "png/without_suffix", saved(picture, "PNG"), QUARTERS
    yield "png/interlaced.png", make.adam7(), QUARTERS
    yield "png/grey.png", saved(picture.convert("L"), "PNG"), GREY
    yield "png/palette.png", saved(picture.quantize(4), "PNG"), QUARTERS
    yield "png/palette_clear_index.png", saved(_palette_with_clear(), "PNG", transparency=3), QUARTERS
    yield "png/palette_clear_table.png", saved(_palette_with_clear(), "PNG", transparency=b"\xff\xff\xff\x00"), QUARTERS
    yield "png/alpha.png", saved(clear, "PNG"), QUARTERS
    yield "png/alpha_half.png", saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"), ((127, 127, 127),) * 4
    yield "png/alpha_none.png", saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG"), ((255, 255, 255),) * 4
    yield "png/grey_alpha.png", saved(Image.new("LA", (8, 8), (0, 128)), "PNG"), ((127, 127, 127),) * 4
    yield "png/rgb_clear_colour.png", saved(_black_for_white(), "PNG", transparency=(0, 0, 0)), QUARTERS
    yield "png/one_bit.png", saved(Image.new("1", (9, 7), 1), "PNG"), ((255, 255, 255),) * 4
    yield "png/two_bit.png", png([b"\x1b" * 4] * 4, depth=2, colour=0), ((127, 127, 127),) * 4
    grey16 = (np.asarray(picture.convert("L")).astype(np.uint16) * 256 + 99).astype(">u2")
    yield "png/grey_16_bit.png", png(grey16.view(np.uint8), depth=16, colour=0), GREY
    yield "png/rgb_16_bit.png", make.deep(alpha=False), QUARTERS
    yield "png/rgba_16_bit.png", make.deep(alpha=True), QUARTERS
    yield "png/animated.png", frames("PNG"), QUARTERS
    yield "png/colour_profile.png", saved(picture, "PNG", icc_profile=b"\0" * 200), QUARTERS
    yield "png/orientation_6.png", make.turned(6, "PNG"), QUARTERS
    yield (
        "png/text.png",
        png(make.pixels().reshape(HEIGHT, -1), depth=8, colour=2, extra=chunk(b"tEXt", b"a\0b")),
        QUARTERS,
    )
    remark = chunk(b"tEXt", b"a\0b")[:-1] + b"x"
    yield "png/bad_remark.png", png(make.pixels().reshape(HEIGHT, -1), depth=8, colour=2, extra=remark), QUARTERS
    yield "png/one_pixel.png", saved(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"), ((9, 99, 199),) * 4
    yield "png/trailing_junk.png", saved(picture, "PNG") + b"junk" * 99, QUARTERS
    yield "png/long.png", saved(make.picture(6000, 2), "PNG"), QUARTERS


def _palette_with_clear() -> Image.Image:
    """The quarters as indices 0 to 3, the last being black and to be made transparent."""
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[:16, 24:], indices[16:, :24], indices[16:, 24:] = 1, 2, 3
    image = Image.fromarray(indices, "P")
    image.putpalette([value for colour in QUARTERS[:3] for value in colour] + [0, 0, 0])
    return image


def _black_for_white() -> Image.Image:
    array = make.pixels().copy()
    array[16:, 24:] = 0
    return Image.fromarray(array)


def _others() -> Iterator[Case]:
    picture, clear = make.picture(), make.clear_bottom_right()
    yield "gif/still.gif", saved(picture, "GIF"), QUARTERS
    yield "gif/animated.gif", frames("GIF"), QUARTERS
    yield "gif/many_frames.gif", frames("GIF", count=300), QUARTERS
    yield "gif/clear.gif", saved(_palette_with_clear(), "GIF", transparency=3), QUARTERS
    yield "gif/without_trailer.gif", saved(picture, "GIF")[:-1], QUARTERS
    yield "webp/lossy.webp", saved(picture, "WEBP", quality=95), QUARTERS
    yield "webp/lossless.webp", saved(picture, "WEBP", lossless=True), QUARTERS
    yield "webp/alpha.webp", saved(clear, "WEBP", lossless=True, exact=True), QUARTERS
    yield "webp/animated.webp", frames("WEBP", lossless=True), QUARTERS
    yield "webp/orientation_8.webp", make.turned(8, "WEBP", lossless=True), QUARTERS
    yield "bmp/colour.bmp", saved(picture, "BMP"), QUARTERS
    yield "bmp/palette.bmp", saved(picture.quantize(4), "BMP"), QUARTERS
    yield "bmp/one_bit.bmp", saved(Image.new("1", (9, 7), 1), "BMP"), ((255, 255, 255),) * 4
    yield "ppm/colour.ppm", saved(picture, "PPM"), QUARTERS
    yield "ppm/grey.pgm", saved(picture.convert("L"), "PPM"), GREY
    yield "ppm/words.ppm", b"P3 2 2 255 " + b" ".join(b"%d %d %d" % colour for colour in QUARTERS) + b"\n", QUARTERS
    yield "ico/icon.ico", saved(make.picture(32, 32), "ICO", sizes=[(32, 32)]), QUARTERS
    yield from _tiffs()
    if features.check("avif"):
        yield "avif/colour.avif", saved(picture, "AVIF", quality=95, subsampling="4:4:4"), QUARTERS
        yield "avif/orientation_6.avif", make.turned(6, "AVIF", quality=95, subsampling="4:4:4"), QUARTERS
    if features.check("jpg_2000"):
        yield "jp2/colour.jp2", saved(picture, "JPEG2000"), QUARTERS


def _tiffs() -> Iterator[Case]:
    picture = make.picture()
    grey = np.asarray(picture.convert("L"))
    yield "tiff/plain.tif", saved(picture, "TIFF"), QUARTERS
    yield "tiff/lzw.tiff", saved(picture, "TIFF", compression="tiff_lzw"), QUARTERS
    yield "tiff/jpeg.tif", saved(picture, "TIFF", compression="jpeg", quality=95), QUARTERS
    yield "tiff/deflate_alpha.tif", saved(make.clear_bottom_right(), "TIFF", compression="tiff_deflate"), QUARTERS
    yield "tiff/cmyk.tif", saved(picture.convert("CMYK"), "TIFF"), QUARTERS
    yield "tiff/lab.tif", saved(Image.new("LAB", (8, 8), (128, 128, 128)), "TIFF"), ((119, 119, 119),) * 4
    yield "tiff/one_bit.tif", saved(Image.new("1", (9, 7), 1), "TIFF", compression="group4"), ((255, 255, 255),) * 4
    yield "tiff/pages.tif", frames("TIFF"), QUARTERS
    yield "tiff/orientation_3.tif", make.turned(3, "TIFF"), QUARTERS
    yield "tiff/orientation_6.tif", make.turned(6, "TIFF"), QUARTERS
    yield "tiff/sixteen_bit.tif", saved(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), GREY
    yield "tiff/thirty_two_bit.tif", saved(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"), GREY
    yield "tiff/fractions.tif", saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"), GREY
    ramp = (grey.astype(np.float32) - grey.min()) / (255 - grey.min())
    stretched = tuple((round((c[0] - grey.min()) / (255 - grey.min()) * 255),) * 3 for c in GREY)
    yield "tiff/wide_range.tif", saved(Image.fromarray(ramp * 2e6 - 1e6), "TIFF"), stretched  # type: ignore[misc]
    yield "tiff/sixteen_white_is_zero.tif", make.tiff(1, 16, photometric=0), WHITE_ONLY
    yield "tiff/eight_white_is_zero.tif", make.tiff(1, 8, photometric=0), WHITE_ONLY
    yield "tiff/signed_white_is_zero.tif", make.tiff(1, 16, sample=2, photometric=0), "unsupported"
    for name, bands, bits, sample in (("five", 5, 8, 1), ("two", 2, 8, 1), ("ten_wide", 10, 16, 1)):
        yield f"tiff/{name}_bands.tif", make.tiff(bands, bits, sample=sample), "unsupported"
    yield "tiff/floating_colours.tif", make.tiff(3, 32, sample=3, photometric=2), "unsupported"
    yield "tiff/float64.tif", make.tiff(1, 64, sample=3), "unsupported"
    yield "tiff/float16.tif", make.tiff(1, 16, sample=3), "unsupported"
    yield "tiff/raw_sensor.tif", make.tiff(1, 16, photometric=32803), "unsupported"
    yield "tiff/lerc.tif", make.tiff(3, 8, photometric=2, compression=34887), "unsupported"
    yield "truncated/five_bands.tif", make.tiff(5, 8)[:-9], "truncated"
    yield "tiff/not_a_number.tif", saved(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), "not_finite"
    some = np.full((8, 8), 0.5, np.float32)
    some[0, 0] = np.nan
    yield "tiff/one_not_a_number.tif", saved(Image.fromarray(some), "TIFF"), ((127, 127, 127),) * 4


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
    yield "foreign/next_boxed.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 60, "unsupported"
    yield "foreign/drawing_late.svg", b"<?xml version='1.0'?><!--" + b"x" * 2000 + b"--><svg/>", "unsupported"
    yield "foreign/sequence.hif", b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc" + b"\0" * 60, "unsupported"
    yield "foreign/camera.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + b"\0" * 60, "unsupported"
    yield "foreign/camera.orf", b"IIRO\x08\0\0\0" + b"\0" * 60, "unsupported"
    yield "foreign/light.exr", b"\x76\x2f\x31\x01" + b"\0" * 60, "unsupported"
    yield "foreign/any.pam", b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 3\nMAXVAL 255\nENDHDR\n" + b"\0" * 12, "unsupported"
    yield "foreign/floats.pfm", b"PF\n2 2\n-1.0\n" + b"\0" * 48, "unsupported"
    frame = jpeg().index(b"\xff\xc0")
    yield "unread/twelve_bits.jpg", jpeg()[: frame + 4] + b"\x0c" + jpeg()[frame + 5 :], "unsupported"
    yield "unread/five_inks.jpg", jpeg()[: frame + 9] + b"\5" + jpeg()[frame + 10 :], "unsupported"
    boxes = saved(make.picture(), "JPEG2000")
    size = boxes.index(b"\xff\x51") + 38
    yield "unread/five_bands.jp2", boxes[:size] + b"\0\5" + boxes[size + 2 :], "unsupported"
    bmp = saved(make.picture(), "BMP")
    yield "unread/compression.bmp", bmp[:30] + b"\4" + bmp[31:], "unsupported"
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
