"""Image files as containers: which format bytes are, whether the file is whole, and where its picture is.

These checks read markers and lengths only, before any pixel is decoded. Decoders are lenient where a data set must not
be: a JPEG without its end marker decodes to a picture with a grey half, a PNG with a damaged row to a garbled one. They
are strict where it need not be: a damaged or explosive remark costs a good picture. So remarks are left out.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Final

from rayclust.encoders.undecodable import Undecodable

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\x00\x00\x01\x00", "ICO"),
)
_UNSUPPORTED: Final[tuple[tuple[bytes, str], ...]] = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"v/1\x01", "an OpenEXR image"),
    (b"#?RADIANCE", "a Radiance image"),
    (b"SIMPLE  =", "a FITS file"),
    (b"\x1aE\xdf\xa3", "a Matroska video"),
)
_FOREIGN: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x7fELF", "a program"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PAR1", "a parquet table"),
    (b"RIFF", "a RIFF file that is not WebP"),
    (b"{", "JSON or text"),
)
_PORTABLE = re.compile(rb"P[1-7fFy]\s")
_SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE)
_HTML = re.compile(rb"<(!doctype html|html|head|body)[\s>]", re.IGNORECASE)
_MARKER_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
_MARKER = re.compile(rb"\xff+[^\x00\xff]", re.DOTALL)
_STANDALONE = {0x01, 0xD8, *range(0xD0, 0xD8)}
# Comments and application segments but JFIF, Exif and Adobe, which say how to read the picture.
_REMARKS = {0xFE, 0xEF, *range(0xE2, 0xEE)}
# Chunks that PNG calls ancillary and a picture still needs: transparency and Exif.
_NEEDED = {b"tRNS", b"eXIf"}
Spans = list[tuple[int, int]]

MAX_SCANS = 200
"""Scans allowed in one JPEG; encoders write about ten, and each costs a pass over all pixels."""


def recognise(data: bytes) -> str:
    """The format of an image file, by content; the name it goes by does not matter.

    Args:
        data: the whole file, or at least its first 1,024 bytes.

    Returns:
        Pillow's word for the format: JPEG PNG GIF WEBP BMP TIFF AVIF JPEG2000 ICO or PPM.

    Raises:
        Undecodable: `empty`, `truncated` inside the signature, `unsupported` or `not_an_image`.
    """
    if not data:
        raise Undecodable("empty", "0 bytes")
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
        if len(data) > 1 and signature.startswith(data):
            raise Undecodable("truncated", f"{len(data)} bytes, not even the signature of a {name} file")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    if _PORTABLE.match(data):
        return "PPM"
    raise _foreign(data)


def picture_only(data: bytes, name: str) -> bytes:
    """The file without its remarks, refused if it ends before its first picture does.

    Args:
        data: the whole file.
        name: its format, from `recognise`. JPEG, PNG, GIF and WebP are walked; decoders notice the others themselves.

    Returns:
        For JPEG and PNG what the picture and its orientation need, without comments, profiles and further pictures;
        `data` itself where nothing is left out.

    Raises:
        Undecodable: `truncated`, `corrupt` or `bomb`.
    """
    walk = {"JPEG": _walk_jpeg, "PNG": _walk_png, "GIF": _walk_gif, "WEBP": _walk_riff}.get(name)
    remarks = walk(data) if walk is not None else []
    if not remarks:
        return data
    begins, ends = [0, *(end for _, end in remarks)], [*(begin for begin, _ in remarks), len(data)]
    return b"".join(data[begin:end] for begin, end in zip(begins, ends, strict=True))


def _iso_media(data: bytes) -> str:
    box = data[8 : max(16, min(int.from_bytes(data[:4], "big"), 256))]
    brands = {box[i : i + 4] for i in range(0, len(box) - 3, 4)}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    heic = brands & {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
    raise Undecodable("unsupported", "a HEIC image" if heic else "a video (ISO media file)")


def _foreign(data: bytes) -> Undecodable:
    head = data[:1024]
    for prefix, what in _UNSUPPORTED:
        if head.startswith(prefix):
            return Undecodable("unsupported", what)
    if _HTML.search(head):
        return Undecodable("not_an_image", "an HTML page, often the error page of a failed download")
    if _SVG.search(head):
        return Undecodable("unsupported", "an SVG drawing")
    for prefix, what in _FOREIGN:
        if head.lstrip().startswith(prefix):
            return Undecodable("not_an_image", what)
    if data[128:132] == b"DICM":
        return Undecodable("unsupported", "a DICOM file")
    if not any(data):
        return Undecodable("not_an_image", f"{len(data)} zero bytes")
    return Undecodable("not_an_image", "plain text" if _is_text(head) else f"unknown bytes {head[:8].hex(' ')}")


def _is_text(head: bytes) -> bool:
    try:
        text = head[: len(head) - 4 if len(head) == 1024 else None].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c.isspace() for c in text)


def _walk_jpeg(data: bytes) -> Spans:
    """Follows the segments to the end-of-image marker; entropy-coded data is searched for the next marker."""
    position, scans, pattern, remarks = 2, 0, _MARKER, []
    while True:
        marker = pattern.search(data, position)
        if marker is None:
            raise Undecodable("truncated", f"JPEG of {len(data)} bytes without its end marker")
        position, code, pattern = marker.end(), data[marker.end() - 1], _MARKER
        if code == 0xD9:
            break
        if code in _STANDALONE:
            continue
        position = _after_segment(data, position)
        if code in _REMARKS:
            remarks.append((marker.start(), position))
        if code == 0xDA:
            pattern, scans = _MARKER_AFTER_SCAN, scans + 1
            if scans > MAX_SCANS:
                raise Undecodable("bomb", f"JPEG with more than {MAX_SCANS} scans")
    if scans == 0:
        raise Undecodable("corrupt", "JPEG without a scan")
    return remarks


def _after_segment(data: bytes, position: int) -> int:
    length = int.from_bytes(data[position : position + 2], "big")
    if position + max(length, 2) > len(data):
        raise Undecodable("truncated", f"JPEG of {len(data)} bytes that ends inside a segment")
    if length < 2:
        raise Undecodable("corrupt", f"JPEG segment of length {length} at byte {position}")
    return position + length


def _walk_png(data: bytes) -> Spans:
    """Follows the chunks to IEND and checks the sums of those that carry the picture."""
    position, view, remarks = 8, memoryview(data), []
    while True:
        if position + 12 > len(data):
            raise Undecodable("truncated", f"PNG of {len(data)} bytes without its end chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        if not kind.isalpha():
            raise Undecodable("corrupt", f"PNG chunk without a name at byte {position}")
        end = position + 12 + length
        if end > len(data):
            raise Undecodable("truncated", f"PNG of {len(data)} bytes that ends inside a chunk")
        if kind[:1].islower() and kind not in _NEEDED:
            remarks.append((position, end))
        elif zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise Undecodable("corrupt", f"PNG chunk {kind.decode()} at byte {position} has a wrong checksum")
        if kind == b"IEND":
            return remarks
        position = end


def _walk_gif(data: bytes) -> Spans:
    """Follows the blocks to the end of the first frame; later frames are not looked at."""
    try:
        position = 13 + _palette_bytes(data[10])
        while data[position] == 0x21:
            position = _after_blocks(data, position + 2)
        if data[position] != 0x2C:
            raise Undecodable("corrupt", f"GIF without a frame at byte {position}")
        position += 10 + _palette_bytes(data[position + 9])
        _after_blocks(data, position + 1)
    except IndexError:
        raise Undecodable("truncated", f"GIF of {len(data)} bytes that ends inside its first frame") from None
    return []


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, position: int) -> int:
    while data[position]:
        position += 1 + data[position]
    return position + 1


def _walk_riff(data: bytes) -> Spans:
    declared = int.from_bytes(data[4:8], "little") + 8
    if declared > len(data):
        raise Undecodable("truncated", f"WebP of {len(data)} bytes that declares {declared}")
    return []
