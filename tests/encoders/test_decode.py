from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from rayclust.encoders.decode import PIXEL_CEILING, Preprocess, decode
from rayclust.encoders.undecodable import REASONS, Undecodable
from rayclust.errors import ConfigError
from tests import references
from tests.encoders import picture_files as make
from tests.encoders.odd_images import OddImage, odd_images, quarters

SQUASH = Preprocess(32, resize="squash")


def lossless(height: int, width: int) -> tuple[bytes, Image.Image]:
    """Noise far from 0 and 255: the order of the two passes, which Pillow chooses, would show where bytes overflow."""
    noise = np.random.default_rng(height * width).integers(64, 192, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    return make.saved(image, "PNG"), image


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_turned_files_give_the_pixels_of_upright_ones(orientation: int, resize: str) -> None:
    p = Preprocess((20, 12), resize=resize)  # type: ignore[arg-type]
    upright = decode(make.turned(1, "PNG"), p).astype(int)
    assert np.abs(decode(make.turned(orientation, "PNG"), p) - upright).max() <= 1


def test_grayscale_gives_one_channel() -> None:
    pixels = decode(make.saved(make.picture(), "PNG"), replace(SQUASH, grayscale=True))
    assert pixels.shape == (32, 32, 1)
    assert abs(int(pixels[8, 8, 0]) - make.luma(make.RED)[0]) <= 1


def test_the_result_is_owned_contiguous_and_the_same_every_time() -> None:
    cases = [case for case in odd_images() if case.decodes]
    first = [decode(case.data, SQUASH) for case in cases]
    assert all(pixels.flags.owndata or pixels.base.flags.owndata for pixels in first)
    assert all(pixels.flags.c_contiguous and pixels.flags.writeable for pixels in first)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda case: decode(case.data, SQUASH), cases))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_limits_are_exact() -> None:
    data = make.saved(make.picture(), "PNG")
    count = make.WIDTH * make.HEIGHT
    decode(data, replace(SQUASH, max_bytes=len(data), max_pixels=count))
    with pytest.raises(Undecodable, match=f"too_large: {len(data)} bytes, more than the limit of {len(data) - 1}"):
        decode(data, replace(SQUASH, max_bytes=len(data) - 1))
    with pytest.raises(Undecodable, match=f"too_many_pixels: 48×32 pixels, more than the limit of {count - 1}"):
        decode(data, replace(SQUASH, max_pixels=count - 1))


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    for case in odd_images():
        if case.expected == "too_many_pixels":
            with pytest.raises(Undecodable, match="too_many_pixels"):
                decode(case.data, SQUASH)


def test_drafts_stay_close() -> None:
    rows, columns = np.mgrid[:1200, :1600]
    waves = np.stack([np.sin(rows / 90), np.cos(columns / 70), np.sin((rows + columns) / 110)], axis=-1)
    data = make.saved(Image.fromarray(((waves + 1) * 127).astype(np.uint8)), "JPEG", quality=92)
    full, draft = (decode(data, Preprocess(64, jpeg_draft=drafted)).astype(int) for drafted in (False, True))
    assert np.abs(full - draft).mean() < 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "image_size = 0: must be at least 1"),
        ({"size": (4, 0)}, "image_size"),
        ({"crop_fraction": 0.0}, "crop_fraction = 0.0: must be above 0"),
        ({"crop_fraction": 1.5}, "crop_fraction"),
        ({"max_pixels": PIXEL_CEILING + 1}, f"max_pixels = {PIXEL_CEILING + 1}: must be from 1 to {PIXEL_CEILING}"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"resize": "pad"}, "resize = pad: must be crop or squash"),
        ({"interpolation": "box"}, "interpolation = box: must be one of bicubic"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocess(**({"size": 8} | options))  # type: ignore[arg-type]


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
                assert error.reason in REASONS  # noqa: PT017 - most of them do not raise
