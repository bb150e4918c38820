from __future__ import annotations

import math

import pytest

from rayclust.report import formats


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (12345, "12,345"),
        (0.1, "0.1"),
        (0.30000000000000004, "0.3"),
        (0.14321, "0.1432"),
        (-0.5, "-0.5"),
        (1234.56, "1,235"),
        (3e-7, "3.000e-07"),
        (1.5e30, "1.500e+30"),
        (None, "–"),
        (math.nan, "–"),
        (-math.inf, "–"),
    ],
)
def test_number(value: float | None, written: str) -> None:
    assert formats.number(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0, "0%"), (0.001, "<1%"), (0.5, "50%"), (0.996, "99%"), (1.0, "100%"), (None, "–"), (math.nan, "–")],
)
def test_short_percent_never_claims_all_or_nothing(value: float | None, written: str) -> None:
    assert formats.short_percent(value) == written


def test_percent() -> None:
    assert formats.percent(0.9434) == "94.3%"
    assert formats.percent(None) == "–"


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds: float, written: str) -> None:
    assert formats.duration(seconds) == written


def test_rate() -> None:
    assert formats.rate(3000, 62.5, "images") == "48 images/s"
    assert formats.rate(None, 62.5, "images") == ""
    assert formats.rate(10, 0.0, "images") == ""


def test_shorten_keeps_both_ends_within_the_limit() -> None:
    assert formats.shorten("abcdefghij", 10) == "abcdefghij"
    assert formats.shorten("abcdefghij", 5) == "ab…ij"
    assert all(len(formats.shorten("x" * 99, limit)) == limit for limit in range(1, 99))
    assert formats.shorten("abcdefghij", 5, at_end=True) == "abcd…"


def test_last_part() -> None:
    assert formats.last_part("s3://bucket/run/") == "run"
    assert formats.last_part("photo.jpg") == "photo.jpg"
    assert formats.last_part("/") == "/"


def test_clean_leaves_text_that_can_be_encoded() -> None:
    assert formats.clean("a\x00b\x1b\ud800c\x85") == "a�b��c�"
    assert formats.clean("\u202egpj.exe\u2066") == "\ufffdgpj.exe\ufffd"
    assert formats.clean("Grüße 👩‍👩‍👧 שלום\n\t") == "Grüße 👩‍👩‍👧 שלום\n\t"


def test_nested_settings_get_dotted_keys() -> None:
    settings = {"clusters": 3, "heads": {"count": 2, "warm": {"start": True}}, "list": [1, None], "none": {}}
    assert list(formats.flatten(settings)) == [
        ("clusters", "3"),
        ("heads.count", "2"),
        ("heads.warm.start", "true"),
        ("list", "[1, null]"),
        ("none", "{}"),
    ]
