"""Decode the bytes of one image file to the pixels that an encoder takes.

Pillow decodes. What it leaves out is done here. It is too lenient in places: a JPEG without its end marker decodes to a
picture with a grey half, and a PNG with damaged rows to a garbled one, so both are walked by their markers and lengths
first. It is too strict in others: a damaged or explosive comment costs a good picture, so metadata is cut out.
"""

from __future__ import annotations

import ctypes
import io
import logging
import math
import operator
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, TiffImagePlugin, UnidentifiedImageError, _imaging

from rayclust.errors import DataError

MAX_SCANS: Final = 200
"""Scans allowed in one JPEG; encoders write about ten, and each costs a pass over all pixels."""

Reason = Literal[
    "empty",  # no bytes
    "too_large",  # more bytes than `max_bytes`
    "not_an_image",  # text, HTML, an archive or anything else that is not a picture
    "unsupported",  # a picture or document of a format that is not read: SVG, PDF, HEIC, PSD, JPEG XL, video
    "truncated",  # the file ends before its picture does
    "corrupt",  # the bytes contradict their own format
    "zero_size",  # the header declares no pixels
    "too_many_pixels",  # the header declares more than `max_pixels`
    "bomb",  # metadata or scans that cost far more than a picture does
    "not_finite",  # a floating-point picture without one finite value
    "out_of_memory",  # the decoder could not allocate memory
]
"""Written to `rejects/` and to counts; the words do not change between versions."""

Box = tuple[float, float, float, float]
"""(left, top, right, bottom), pixels."""

_SIGNATURES: Final[dict[str, tuple[bytes, ...]]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"),
    "JPEG2000": (b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "ICO": (b"\x00\x00\x01\x00",),
}
_ERROR_PAGE: Final = "an HTML page, often the error page of a failed download"
_OTHER_FORMATS: Final = "an image of a format that is not read: EXR, HDR, DDS, FITS, XCF, QOI, JPEG XR or raw"
# Searched in this order in the first 4,096 bytes: formats that are read, which have no reason, then all others.
_PATTERNS: Final[tuple[tuple[bytes, Reason | None, str], ...]] = (
    (rb"\ARIFF.{4}WEBP", None, "WEBP"),
    (rb"\A.{4}ftyp(.{4}){0,60}?avi[fs]", None, "AVIF"),
    (rb"\AP[7F]\s", "unsupported", "a PAM or a colour PFM image"),
    (rb"\AP[1-6fy]\s", None, "PPM"),
    (rb"\A%PDF", "unsupported", "a PDF document"),
    (rb"\A%!PS", "unsupported", "a PostScript document"),
    (rb"\A8BPS", "unsupported", "a Photoshop file"),
    (rb"\A(\xff\x0a|\0\0\0\x0cJXL )", "unsupported", "a JPEG XL image"),
    (rb"\A.{4}ftyp(.{4}){0,60}?(hei[cxms]|hevc|mif1|msf1)", "unsupported", "a HEIC image"),
    (rb"\A.{4}ftypcrx ", "unsupported", _OTHER_FORMATS),
    (rb"\A.{4}ftyp", "unsupported", "a video (ISO media file)"),
    (rb"\A(\x76\x2f\x31\x01|#\?RADIANCE|DDS |SIMPLE  =|gimp xcf|qoif)", "unsupported", _OTHER_FORMATS),
    (rb"\A(II\xbc|IIRO|IIU\0|FUJIFILMCCD-RAW)", "unsupported", _OTHER_FORMATS),
    (rb"(?i)<(!doctype )?(html|head|body)\b", "not_an_image", _ERROR_PAGE),
    (rb"(?i)<svg[\s/>]", "unsupported", "an SVG drawing"),
    (rb"\A\s*PK(\x03\x04|\x05\x06)", "not_an_image", "a zip archive"),
    (rb"\A\s*\x1f\x8b", "not_an_image", "gzip data"),
    (rb"\A\s*RIFF", "not_an_image", "a RIFF file that is not WebP"),
    (rb"\A\s*\{", "not_an_image", "JSON or text"),
    (rb"\A.{128}DICM", "unsupported", "a DICOM file"),
    (rb"\A[\t\n\r -~\x80-\xf4]+\Z", "not_an_image", "plain text"),
)

# By EXIF orientation: whether x and y of the file are swapped, whether its x and its y run backwards, and what Pillow
# calls the operation that makes the image upright.
_UPRIGHT: Final = (False, False, False, None)
_ORIENTATIONS: Final[dict[int, tuple[bool, bool, bool, Image.Transpose | None]]] = {
    2: (False, True, False, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (False, True, True, Image.Transpose.ROTATE_180),
    4: (False, False, True, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (True, False, False, Image.Transpose.TRANSPOSE),
    6: (True, False, True, Image.Transpose.ROTATE_270),
    7: (True, True, True, Image.Transpose.TRANSVERSE),
    8: (True, True, False, Image.Transpose.ROTATE_90),
}
_FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos", "nearest")}
# What Pillow's readers raise on damaged files, found by feeding them such; anything else is a mistake of ours.
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class Undecodable(DataError):  # noqa: N818 - a state of the bytes, and a word that callers read
    """Bytes that are not an image, or not a whole one within the limits.

    Args:
        reason: one of `Reason`.
        detail: what was found, one line, the same on every run.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class Preprocess:
    """How a file becomes pixels: size, resizing and limits."""

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
    """Most pixels a header may declare; at most `settings.PIXEL_CEILING`."""
    jpeg_draft: bool = False
    """Let JPEGs decode at 1/2, 1/4 or 1/8 when that is still twice the wanted size: faster, but features move."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of what `decode` returns."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width, 1 if self.grayscale else 3


def decode(data: bytes, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Decode one image file; the first frame of an animation, upright by its EXIF orientation.

    The result depends on nothing but the arguments; see `flatten` for colours. A file is taken whole or not at all.

    Args:
        data: the whole file, of any name: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, ICO or a portable map.
        preprocess: size and limits.

    Returns:
        UInt8[H W 3], or [H W 1] with `grayscale`; owned and contiguous.

    Raises:
        Undecodable: with one of the reasons in `Reason`.
    """
    if len(data) > preprocess.max_bytes:
        raise Undecodable("too_large", f"{len(data)} bytes, more than the limit of {preprocess.max_bytes}")
    name = recognise(data)
    picture = without_metadata(data, name)
    with quiet_pillow():
        try:
            with Image.open(io.BytesIO(picture), formats=(name,)) as image:
                _check_size(image.size, preprocess.max_pixels)  # of the header, before any pixel is decoded
                if preprocess.jpeg_draft and name == "JPEG":
                    shorter = 2 * math.ceil(max(preprocess.shape[:2]) / preprocess.crop_fraction)
                    image.draft(None, (shorter, shorter))
                image.load()
                _check_size(image.size, preprocess.max_pixels)
                orientation = 1
                with suppress(*_FAILURES):  # a damaged EXIF block does not cost the image
                    value = image.getexif().get(ExifTags.Base.Orientation, 1)
                    orientation = value if isinstance(value, int) else 1
                flat = flatten(image, "L" if preprocess.grayscale else "RGB")
            # Scale along the axes of the file, then turn the small result.
            is_swapped, _, _, transpose = _ORIENTATIONS.get(orientation, _UPRIGHT)
            box = visible_box(flat.size, preprocess, orientation)
            size = preprocess.shape[:2] if is_swapped else preprocess.shape[1::-1]
            small = flat.resize(size, _FILTERS[preprocess.interpolation], box)
            if transpose is not None:
                small = small.transpose(transpose)
            return np.array(small, dtype=np.uint8).reshape(preprocess.shape)
        except Undecodable:
            raise
        except _FAILURES as error:
            raise _undecodable(error, picture, name) from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise Undecodable("zero_size", f"{width}×{height} pixels")
    if width * height > max_pixels:
        raise Undecodable("too_many_pixels", f"{width}×{height} pixels, more than the limit of {max_pixels}")


def _undecodable(error: BaseException, data: bytes, name: str) -> Undecodable:
    """Turn an error of Pillow into a reason and a detail."""
    # Pillow names objects by address in some messages: rejects must be the same bytes on every run.
    text = " ".join(re.sub(r"<[^>]*>| at 0x[0-9a-f]+", "", str(error)).split())[:200]
    if isinstance(error, Image.DecompressionBombError):
        return Undecodable("too_many_pixels", text)
    if isinstance(error, MemoryError):
        return Undecodable("out_of_memory", f"while decoding a {name} file")
    if isinstance(error, UnidentifiedImageError) and (unread := _unread_kind(data, name)) is not None:
        return unread
    if isinstance(error, UnidentifiedImageError):
        # Pillow reads a GIF up to its first frame for this; one that ends with its trailer was not cut.
        is_cut = name == "GIF" and not data.endswith(b";")
        return Undecodable("truncated" if is_cut else "corrupt", f"the header of a {name} file cannot be read")
    if text.startswith("Unsupported"):
        return Undecodable("unsupported", f"{name}: {text}")
    if re.search("truncated|not enough image data|Not enough|unexpected end|EOF", text, re.IGNORECASE):
        return Undecodable("truncated", f"{name}: {text}")
    return Undecodable("corrupt", f"{name}: {text or type(error).__name__}")


def _unread_kind(data: bytes, name: str) -> Undecodable | None:
    """Return what the header declares that Pillow does not read; None where it declares nothing of the kind."""
    if name == "TIFF":
        tags = TiffImagePlugin
        with suppress(*_FAILURES):
            file = io.BytesIO(data)
            directory = tags.ImageFileDirectory_v2(file.read(16 if 43 in data[2:4] else 8))  # 43: BigTIFF
            file.seek(directory.next)
            directory.load(file)
            offsets = directory.get(tags.STRIPOFFSETS) or directory[tags.TILEOFFSETS]
            counts = directory.get(tags.STRIPBYTECOUNTS) or directory[tags.TILEBYTECOUNTS]
            if (end := max(map(operator.add, offsets, counts))) > len(data):
                return Undecodable("truncated", f"TIFF of {len(data)} bytes whose picture ends at byte {end}")
            bands, bits = directory.get(tags.SAMPLESPERPIXEL, 1), directory.get(tags.BITSPERSAMPLE, (1,))[0]
            samples = {1: "", 2: " signed", 3: " floating", 5: " complex", 6: " complex"}
            sample = samples[directory.get(tags.SAMPLEFORMAT, (1,))[0]]
            colours, compression = directory[tags.PHOTOMETRIC_INTERPRETATION], directory.get(tags.COMPRESSION, 1)
            what = f"{bands} bands of {bits}{sample} bits, photometric {colours}, compression {compression}"
            return Undecodable("unsupported", f"TIFF of {what}")
    if name == "JPEG2000" and (size := re.search(rb"\xff\x51.{36}(..)", data, re.DOTALL)) is not None:
        components = int.from_bytes(size[1], "big")
        return Undecodable("unsupported", f"JPEG 2000 of {components} components") if components > 4 else None
    position = 2
    while name == "JPEG" and position + 10 <= len(data):
        # Segments up to the frame's header, which holds precision, height, width and the number of components.
        code, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            bits, components = data[position + 4], data[position + 9]
            is_read = bits == 8 and components in (1, 3, 4)
            return None if is_read else Undecodable("unsupported", f"JPEG of {components} components of {bits} bits")
        position += 1 if code == 0xFF else 2 + length
    return None


def recognise(data: bytes) -> str:
    """Return Pillow's word for the format of an image file, by its first 4,096 bytes; its name does not matter.

    Raises:
        Undecodable: `empty`, `truncated` inside the signature, `unsupported` or `not_an_image`.
    """
    if not data:
        raise Undecodable("empty", "0 bytes")
    for name, signatures in _SIGNATURES.items():
        if data.startswith(signatures):
            return name
        if len(data) > 1 and any(signature.startswith(data) for signature in signatures):
            raise Undecodable("truncated", f"{len(data)} bytes, not even the signature of a {name} file")
    for pattern, reason, what in _PATTERNS:
        if re.search(pattern, data[:4096], re.DOTALL):
            if reason is None:
                return what
            raise Undecodable(reason, what)
    unknown = f"unknown bytes {data[:8].hex(' ')}" if any(data) else f"{len(data)} zero bytes"
    raise Undecodable("not_an_image", unknown)


def without_metadata(data: bytes, name: str) -> bytes:
    """Cut metadata out of a file, except its orientation; refuse a file that ends before its picture does.

    Args:
        data: the whole file.
        name: its format, from `recognise`. JPEG and PNG are cut, they and WebP checked; Pillow checks the others.

    Raises:
        Undecodable: `truncated`, `corrupt` or `bomb`.
    """
    spans: list[tuple[int, int]] = []
    if name == "JPEG":
        spans = _metadata_of_jpeg(data)
    elif name == "PNG":
        spans = _metadata_of_png(data)
    elif name == "WEBP" and (declared := int.from_bytes(data[4:8], "little") + 8) > len(data):
        raise Undecodable("truncated", f"WebP of {len(data)} bytes that declares {declared}")
    if not spans:
        return data
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(data)]
    return b"".join(data[start:end] for start, end in zip(starts, ends, strict=True))


def _metadata_of_jpeg(data: bytes) -> list[tuple[int, int]]:
    """Follow a JPEG's segments to its end-of-image marker; return (start, end) of those that hold metadata."""
    position, scans, code, spans = 2, 0, 0, list[tuple[int, int]]()
    while code != 0xD9:
        # Entropy-coded data behind a scan's header may hold stuffed zeros and restart markers: neither ends it.
        pattern = rb"\xff+[^\x00\xff\xd0-\xd7]" if code == 0xDA else rb"\xff+[^\x00\xff]"
        marker = re.compile(pattern, re.DOTALL).search(data, position)
        if marker is None:
            raise Undecodable("truncated", f"JPEG of {len(data)} bytes without its end marker")
        position, code = marker.end(), data[marker.end() - 1]
        if code == 0x01 or 0xD0 <= code <= 0xD9:
            continue  # a marker without a segment
        length = int.from_bytes(data[position : position + 2], "big")
        if position + max(length, 2) > len(data):
            raise Undecodable("truncated", f"JPEG of {len(data)} bytes that ends inside a segment")
        if length < 2:
            raise Undecodable("corrupt", f"JPEG segment of length {length} at byte {position}")
        position += length
        # Comments and application segments, but JFIF (E0), Exif (E1) and Adobe (EE) say how to read the picture.
        if code in (0xFE, 0xEF) or 0xE2 <= code <= 0xED:
            spans.append((marker.start(), position))
        if code == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise Undecodable("bomb", f"JPEG with more than {MAX_SCANS} scans")
    if scans == 0:
        raise Undecodable("corrupt", "JPEG without a scan")
    return spans


def _metadata_of_png(data: bytes) -> list[tuple[int, int]]:
    """Follow a PNG's chunks to IEND and check the sums of those that it needs; return (start, end) of the others."""
    position, spans = 8, list[tuple[int, int]]()
    while True:
        if position + 12 > len(data):
            raise Undecodable("truncated", f"PNG of {len(data)} bytes without its end chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        if not kind.isalpha():
            raise Undecodable("corrupt", f"PNG chunk without a name at byte {position}")
        end = position + 12 + length
        if end > len(data):
            raise Undecodable("truncated", f"PNG of {len(data)} bytes that ends inside a chunk")
        # PNG calls transparency and Exif ancillary (a lower-case first letter); a picture still needs them.
        if kind[:1].islower() and kind not in (b"tRNS", b"eXIf"):
            spans.append((position, end))
        elif zlib.crc32(memoryview(data)[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise Undecodable("corrupt", f"PNG chunk {kind.decode()} at byte {position} has a wrong checksum")
        if kind == b"IEND":
            return spans
        position = end


def flatten(image: Image.Image, mode: Literal["RGB", "L"]) -> Image.Image:
    """Convert a loaded image of any mode of Pillow to plain RGB or grey (ITU-R 601 luma), 8 bits.

    Transparency lies on white. Sixteen bits are scaled, not clipped. Floating and 32-bit samples within 0..1, 0..255 or
    0..65535 keep their meaning, all others are stretched; in a TIFF, zero may be white. Colour profiles are ignored, as
    the encoders' own training pipelines did.

    Raises:
        Undecodable: `not_finite`, a floating image without one finite value.
    """
    # Where zero is white in a TIFF (photometric interpretation 0), Pillow turns samples of 8 bits and fewer alone.
    is_inverted = image.mode[0] in "IF" and getattr(image, "tag_v2", {}).get(262) == 0
    if image.mode in {"I;16", "I;16L", "I;16B", "I;16N"}:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        values = np.asarray(image).astype(np.float64)
        # The range of the samples: a usual one that holds them, else their own.
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            raise Undecodable("not_finite", "a floating image without one finite value")
        low, high = float(finite.min()), float(finite.max())
        low, high = next(((0.0, top) for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top), (low, high))
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny)
        image = Image.fromarray(np.rint(scaled * 255.0).astype(np.uint8))
    elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow reads every four-channel JPEG as Adobe's, whose inks are inverted; files of others are not.
        image = ImageChops.invert(image)
    elif image.has_transparency_data:
        colours = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, (255, 255, 255))
        image.paste(colours, mask=colours.getchannel("A"))
    image = ImageChops.invert(image) if is_inverted else image
    return image if image.mode == mode else image.convert(mode)


def visible_box(size: tuple[int, int], preprocess: Preprocess, orientation: int = 1) -> Box:
    """Compute the part of an image, along the axes of its file, that is scaled to the wanted size.

    Scaling only what is kept bounds memory for very long images. The arithmetic is that of scaling everything to whole
    pixels and then cutting at whole pixels, in the upright image.

    Args:
        size: (width, height) of the image in the file.
        preprocess: size wanted, and how.
        orientation: EXIF's; any but 2 to 8 means upright.
    """
    if preprocess.resize == "squash":
        return 0.0, 0.0, float(size[0]), float(size[1])
    is_swapped, is_reversed_x, is_reversed_y, _ = _ORIENTATIONS.get(orientation, _UPRIGHT)
    width, height = size[::-1] if is_swapped else size
    rows, columns, _ = preprocess.shape
    # 1. Whole pixels of the scaled image: the shorter side fits, the other keeps the aspect.
    tall, wide = (math.floor(side / preprocess.crop_fraction) for side in (rows, columns))
    if tall * width >= wide * height:
        wide = tall * width // height
    else:
        tall = wide * height // width
    # 2. Its centre, back on the scale of the upright image.
    x, y = width / wide, height / tall
    column, row = round((wide - columns) / 2), round((tall - rows) / 2)
    left, top, right, bottom = column * x, row * y, min((column + columns) * x, width), min((row + rows) * y, height)
    # 3. On the axes of the file.
    if is_swapped:
        left, top, right, bottom = top, left, bottom, right
    if is_reversed_x:
        left, right = max(size[0] - right, 0.0), size[0] - left
    if is_reversed_y:
        top, bottom = max(size[1] - bottom, 0.0), size[1] - top
    return left, top, right, bottom


_quiet_lock, _quiet_state, _quiet_depth = threading.Lock(), ExitStack(), 0


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence warnings, log lines of Pillow and libtiff's own writing to stderr; safe when several threads decode.

    `warnings.catch_warnings` alone restores the wrong filters when threads overlap, so the first thread in sets them
    and the last one out restores them.
    """
    global _quiet_depth
    with _quiet_lock:
        _quiet_depth += 1
        if _quiet_depth == 1:
            _quiet_state.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            logger = logging.getLogger("PIL")
            _quiet_state.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
            with suppress(AttributeError, OSError):  # of a Pillow without libtiff
                library = ctypes.CDLL(_imaging.__file__)
                for set_handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                    _quiet_state.callback(set_handler, set_handler(None))
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_state.close()
