from __future__ import annotations

import logging
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from rayclust.encoders.decode import (
    MAX_SCANS,
    Box,
    Preprocess,
    Reason,
    Undecodable,
    decode,
    flatten,
    quiet_pillow,
    recognise,
    visible_box,
    without_metadata,
)
from rayclust.errors import DataError
from tests import references
from tests.encoders import picture_files as make
from tests.encoders.odd_images import OddImage, odd_images, quarters

SQUASH = Preprocess(32, resize="squash")
WHOLE = {"JPEG": make.jpeg(), **{name: make.saved(make.picture(), name) for name in ("PNG", "GIF", "WEBP")}}


def lossless(height: int, width: int) -> tuple[bytes, Image.Image]:
    """Noise far from 0 and 255: the order of the two passes, which Pillow chooses, would show where bytes overflow."""
    noise = np.random.default_rng(height * width).integers(64, 192, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    return make.saved(image, "PNG"), image


# The table of odd and bad files


@pytest.mark.parametrize("case", odd_images(), ids=lambda case: case.name)
def test_odd_images(case: OddImage, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case.decodes:
            pixels = decode(case.data, SQUASH)
            assert pixels.shape == (32, 32, 3)
            assert np.abs(np.array(quarters(pixels)) - np.array(case.expected)).max() <= 6
        else:
            with pytest.raises(Undecodable) as caught:
                decode(case.data, SQUASH)
            assert caught.value.reason == case.expected, caught.value.detail
            assert "\n" not in caught.value.detail
            assert " at 0x" not in caught.value.detail
    assert capfd.readouterr() == ("", "")


def test_the_table_is_large_and_its_names_are_unique() -> None:
    names = [case.name for case in odd_images()]
    assert len(set(names)) == len(names) >= 200
    assert sum(not case.decodes for case in odd_images()) >= 120


def test_the_result_is_owned_contiguous_and_the_same_every_time() -> None:
    cases = [case for case in odd_images() if case.decodes]
    first = [decode(case.data, SQUASH) for case in cases]
    assert all(pixels.flags.owndata or pixels.base.flags.owndata for pixels in first)
    assert all(pixels.flags.c_contiguous and pixels.flags.writeable for pixels in first)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda case: decode(case.data, SQUASH), cases))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    for case in odd_images():
        if case.expected == "too_many_pixels":
            with pytest.raises(Undecodable, match="too_many_pixels"):
                decode(case.data, SQUASH)


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    for case in odd_images():
        if len(case.data) > 20_000 or not case.decodes:
            continue
        for _ in range(4):
            data = bytearray(case.data)
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            try:
                decode(bytes(data), SQUASH)
            except Undecodable as error:
                assert error.reason in get_args(Reason)  # noqa: PT017 - most of them do not raise


def test_limits_are_exact() -> None:
    data = make.saved(make.picture(), "PNG")
    count = make.WIDTH * make.HEIGHT
    decode(data, replace(SQUASH, max_bytes=len(data), max_pixels=count))
    with pytest.raises(Undecodable, match=f"too_large: {len(data)} bytes, more than the limit of {len(data) - 1}"):
        decode(data, replace(SQUASH, max_bytes=len(data) - 1))
    with pytest.raises(Undecodable, match=f"too_many_pixels: 48×32 pixels, more than the limit of {count - 1}"):
        decode(data, replace(SQUASH, max_pixels=count - 1))


def test_undecodable_is_an_error_of_the_data_and_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(Undecodable("empty", "0 bytes")))  # noqa: S301 - our own bytes
    assert isinstance(error, DataError)
    assert (error.reason, error.detail, str(error)) == ("empty", "0 bytes", "empty: 0 bytes")


# Size and orientation


@pytest.mark.parametrize("shape", [(40, 57), (57, 40), (33, 33), (20, 90), (8, 11)])
def test_crop_equals_the_slow_form(shape: tuple[int, int]) -> None:
    data, image = lossless(*shape)
    expected = references.center_cropped(np.asarray(image), 16, 16)
    assert np.abs(decode(data, Preprocess(16)) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(40, 57), (8, 11)])
def test_squash_equals_the_slow_form(shape: tuple[int, int]) -> None:
    data, image = lossless(*shape)
    expected = references.resized(np.asarray(image), 16, 24)
    assert np.abs(decode(data, Preprocess((16, 24), resize="squash")) - expected).max() <= 1


@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("shape", [(333, 500), (480, 123), (224, 224), (100, 90)])
def test_crop_equals_the_usual_pipeline(shape: tuple[int, int], fraction: float) -> None:
    data, image = lossless(*shape)
    resized = transforms.resize(image, int(224 / fraction), InterpolationMode.BICUBIC)
    expected = np.asarray(transforms.center_crop(resized, [224, 224])).astype(int)
    difference = np.abs(decode(data, Preprocess(224, crop_fraction=fraction)) - expected)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 0.001


def test_an_image_of_the_wanted_size_is_not_touched() -> None:
    data, image = lossless(24, 24)
    assert np.array_equal(decode(data, Preprocess(24)), np.asarray(image))


def test_grayscale_gives_one_channel() -> None:
    pixels = decode(make.saved(make.picture(), "PNG"), replace(SQUASH, grayscale=True))
    assert pixels.shape == (32, 32, 1)
    assert abs(int(pixels[8, 8, 0]) - make.luma(make.RED)[0]) <= 1


def test_drafts_stay_close() -> None:
    rows, columns = np.mgrid[:1200, :1600]
    waves = np.stack([np.sin(rows / 90), np.cos(columns / 70), np.sin((rows + columns) / 110)], axis=-1)
    data = make.saved(Image.fromarray(((waves + 1) * 127).astype(np.uint8)), "JPEG", quality=92)
    full, draft = (decode(data, Preprocess(64, jpeg_draft=drafted)).astype(int) for drafted in (False, True))
    assert np.abs(full - draft).mean() < 1.5


@pytest.mark.parametrize(
    ("shown", "target", "resize", "fraction", "expected"),
    [
        ((40, 20), (8, 8), "squash", 1.0, (0, 0, 40, 20)),
        ((40, 20), (10, 10), "crop", 1.0, (10, 0, 30, 20)),
        ((20, 40), (10, 10), "crop", 1.0, (0, 10, 20, 30)),
        # 224/0.875 = 256: the image is scaled by 2, and 16 of 256 go on each side.
        ((128, 128), (224, 224), "crop", 0.875, (8, 8, 120, 120)),
        # 10 by 20 wanted of 40 by 40: the width decides, half of the height goes.
        ((40, 40), (10, 20), "crop", 1.0, (0, 10, 40, 30)),
    ],
)
def test_visible_boxes_worked_by_hand(
    shown: tuple[int, int], target: tuple[int, int], resize: Any, fraction: float, expected: Box
) -> None:
    assert visible_box(shown, Preprocess(target, resize, crop_fraction=fraction)) == expected


def test_very_long_images_keep_a_box_inside() -> None:
    for size in ((1, 100_000), (100_000, 1), (3, 7919)):
        left, top, right, bottom = visible_box(size, Preprocess(224, crop_fraction=0.9))
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_files_give_the_pixels_of_upright_ones(orientation: int, resize: str) -> None:
    p = Preprocess((20, 12), resize=resize)  # type: ignore[arg-type]
    upright = decode(make.turned(1, "PNG"), p).astype(int)
    assert np.abs(decode(make.turned(orientation, "PNG"), p) - upright).max() <= 1


@pytest.mark.parametrize("orientation", [0, *range(1, 9), 99])
def test_boxes_of_the_file_show_what_the_upright_box_shows(orientation: int) -> None:
    stored = Image.fromarray(np.arange(7 * 5, dtype=np.uint8).reshape(7, 5))
    stored.getexif()[ExifTags.Base.Orientation] = orientation
    # The shorter side of 5 is kept at its scale; of 5 as of 7 pixels the third and fourth are in the middle.
    wanted = ImageOps.exif_transpose(stored).crop((2, 2, 4, 4))
    box = visible_box(stored.size, Preprocess(2, crop_fraction=0.4), orientation)
    part = stored.crop(tuple(int(edge) for edge in box))
    part.getexif()[ExifTags.Base.Orientation] = orientation
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(part)), np.asarray(wanted))


# Formats, and whether a file is whole


def refusal(data: bytes, name: str) -> str:
    with pytest.raises(Undecodable) as caught:
        without_metadata(data, name)
    return caught.value.reason


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_are_recognised_by_content(name: str) -> None:
    data = make.saved(make.picture(), name)
    assert recognise(data) == name
    assert len(without_metadata(data, name)) <= len(data)


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
    assert details["film.mp4"] == "a video (ISO media file)"
    assert details["text.jpg"] == "plain text"
    assert details["zeros.jpg"] == "4096 zero bytes"
    assert details["ones.jpg"] == "unknown bytes ff ff ff ff ff ff ff ff"
    assert details["drawing_xml.png"] == "an SVG drawing"


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (make.tiff(5, 8), "TIFF of 5 bands of 8 bits, photometric 1, compression 1"),
        (
            make.tiff(3, 32, sample=3, photometric=2),
            "TIFF of 3 bands of 32 floating bits, photometric 2, compression 1",
        ),
        (make.tiff(1, 64, sample=3), "TIFF of 1 bands of 64 floating bits, photometric 1, compression 1"),
    ],
)
def test_kinds_of_tiff_that_are_not_read_are_named(data: bytes, detail: str) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(data, SQUASH)
    assert (caught.value.reason, caught.value.detail) == ("unsupported", detail)


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_no_beginning_of_a_file_is_whole(name: str) -> None:
    whole = WHOLE[name]
    for end in range(9, len(whole)):
        assert refusal(whole[:end], name) == "truncated"


def test_no_beginning_of_a_gif_decodes_before_its_first_frame_is_whole() -> None:
    whole = WHOLE["GIF"]
    for end in range(6, len(whole) - 2):  # the last two bytes end the blocks and the file
        with pytest.raises(Undecodable, match="truncated"):
            decode(whole[:end], SQUASH)


def test_a_gif_needs_only_its_first_frame() -> None:
    decode(make.frames("GIF", count=9)[: len(WHOLE["GIF"]) + 60], SQUASH)


def test_an_end_marker_inside_a_thumbnail_is_not_the_end() -> None:
    data = make.with_segment(make.jpeg(), 0xE1, b"Exif\0\0" + make.jpeg())
    without_metadata(data, "JPEG")
    assert refusal(data[:-2], "JPEG") == "truncated"


def test_scans_are_counted() -> None:
    without_metadata(make.scan_bomb(MAX_SCANS // 2), "JPEG")
    assert refusal(make.scan_bomb(MAX_SCANS + 1), "JPEG") == "bomb"


def test_every_byte_of_the_pixels_of_a_png_is_checked() -> None:
    whole = WHOLE["PNG"]
    start = whole.index(b"IDAT") + 4
    for place in range(start, start + int.from_bytes(whole[start - 8 : start - 4], "big")):
        changed = whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        assert refusal(changed, "PNG") == "corrupt"


def test_metadata_is_left_out() -> None:
    comment = make.chunk(b"tEXt", b"a\0b")[:-1] + b"x"
    plain, commented = (make.png([b"\0" * 8] * 8, depth=8, colour=0, extra=extra) for extra in (b"", comment))
    assert without_metadata(commented, "PNG") == plain
    assert without_metadata(plain, "PNG") is plain
    jpeg = make.jpeg()
    for code in (0xE2, 0xED, 0xFE):
        assert without_metadata(make.with_segment(jpeg, code, b"Photoshop 3.0\0garbage"), "JPEG") == jpeg
    exif = make.with_segment(jpeg, 0xE1, b"Exif\0\0")
    assert without_metadata(exif, "JPEG") is exif


# Colours


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (1, 1), (100, 0, 255, 51)), (224, 204, 255)),  # 0.2 of it on 0.8 of white
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), (0, 255, 255)),  # inks of a TIFF are not inverted
    ],
)
def test_alpha_lies_on_white_and_inks_become_light(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert flatten(image, "RGB").getpixel((0, 0)) == expected


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_are_scaled_not_clipped(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (3, 1), np.array([0, 0x80FF, 0xFFFF], order).tobytes())
    assert np.asarray(flatten(image, "L")).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # fractions
        ([0.0, 3.0, 200.0], [0, 3, 200]),  # bytes
        ([0.0, 257.0, 65535.0], [0, 1, 255]),  # 16 bits
        ([-1.0, 0.0, 1.0], [0, 128, 255]),  # anything else is stretched
        ([0.0, np.nan, 1.0], [0, 0, 255]),
        ([0.25, np.inf, 1.0], [64, 255, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
    ],
)
def test_floating_samples(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert np.asarray(flatten(image, "L")).tolist() == [expected]


def test_integers_of_32_bits_above_16_bits_are_stretched() -> None:
    image = Image.fromarray(np.array([[0, 500_000, 1_000_000]], np.int32))
    assert np.asarray(flatten(image, "L")).tolist() == [[0, 128, 255]]


def test_nothing_finite_is_refused() -> None:
    with pytest.raises(Undecodable, match="not_finite"):
        flatten(Image.fromarray(np.full((2, 2), np.inf, np.float32)), "RGB")


def test_plain_modes_pass_unchanged() -> None:
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    assert flatten(image, "RGB") is image


# Silence


def test_warnings_and_log_lines_are_silent_inside_only(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_pillow():
            warnings.warn("inside", stacklevel=1)
            logging.getLogger("PIL.TiffImagePlugin").error("inside")
        warnings.warn("outside", stacklevel=1)
        logging.getLogger("PIL.TiffImagePlugin").error("outside")
    assert [str(warning.message) for warning in seen] == ["outside"]
    assert caplog.messages == ["outside"]


def test_overlapping_threads_and_errors_leave_the_filters_as_they_were() -> None:
    before = list(warnings.filters)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with quiet_pillow():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with quiet_pillow():
            second_in.set()
            first_out.wait(10)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert list(warnings.filters) == before
    with pytest.raises(KeyError), quiet_pillow():
        raise KeyError("x")
    assert list(warnings.filters) == before
