from __future__ import annotations

import pytest

from rayclust.encoders.containers import MAX_SCANS, picture_only, recognise
from rayclust.encoders.undecodable import Undecodable
from tests.encoders import picture_files as make
from tests.encoders.odd_images import odd_images

WHOLE = {"JPEG": make.jpeg(), **{name: make.saved(make.picture(), name) for name in ("PNG", "GIF", "WEBP")}}


def refusal(data: bytes, name: str) -> str:
    with pytest.raises(Undecodable) as caught:
        picture_only(data, name)
    return caught.value.reason


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_are_known_by_content(name: str) -> None:
    assert recognise(make.saved(make.picture(), name)) == name


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_pass(name: str) -> None:
    picture_only(WHOLE[name], name)


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_no_beginning_of_a_file_is_whole(name: str) -> None:
    whole = WHOLE[name]
    for end in range(9, len(whole)):
        assert refusal(whole[:end], name) == "truncated"


def test_an_end_marker_inside_a_thumbnail_is_not_the_end() -> None:
    data = make.with_segment(make.jpeg(), 0xE1, b"Exif\0\0" + make.jpeg())
    picture_only(data, "JPEG")
    assert refusal(data[:-2], "JPEG") == "truncated"


def test_scans_are_counted() -> None:
    picture_only(make.scan_bomb(MAX_SCANS // 2), "JPEG")
    assert refusal(make.scan_bomb(MAX_SCANS + 1), "JPEG") == "bomb"


def test_every_byte_of_the_pixels_of_a_png_is_checked() -> None:
    whole = WHOLE["PNG"]
    start = whole.index(b"IDAT") + 4
    for place in range(start, start + int.from_bytes(whole[start - 8 : start - 4], "big")):
        changed = whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        assert refusal(changed, "PNG") == "corrupt"


def test_remarks_are_left_out() -> None:
    remark = make.chunk(b"tEXt", b"a\0b")
    plain, remarked = (make.png([b"\0" * 8] * 8, depth=8, colour=0, extra=extra) for extra in (b"", remark[:-1] + b"x"))
    assert picture_only(remarked, "PNG") == plain
    assert picture_only(plain, "PNG") is plain
    jpeg = make.jpeg()
    for code in (0xE2, 0xED, 0xFE):
        assert picture_only(make.with_segment(jpeg, code, b"Photoshop 3.0\0garbage"), "JPEG") == jpeg
    exif = make.with_segment(jpeg, 0xE1, b"Exif\0\0")
    assert picture_only(exif, "JPEG") is exif


def test_a_gif_needs_only_its_first_frame() -> None:
    whole = make.frames("GIF", count=9)
    first = len(make.saved(make.picture(), "GIF"))
    picture_only(whole[: first + 60], "GIF")


def test_details_name_what_was_seen() -> None:
    details = {}
    for case in odd_images():
        if case.name.startswith("foreign/"):
            with pytest.raises(Undecodable) as caught:
                recognise(case.data)
            details[case.name.removeprefix("foreign/")] = caught.value.detail
    assert details["page.jpg"] == "an HTML page, often the error page of a failed download"
    assert details["archive.jpg"] == "a zip archive"
    assert details["phone.heic"] == "a HEIC image"
    assert details["text.jpg"] == "plain text"
    assert details["zeros.jpg"] == "4096 zero bytes"
    assert details["drawing_xml.png"] == "an SVG drawing"
