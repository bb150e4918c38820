"""Formatting of numbers and strings, for the page and for commands."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Replace control characters and lone surrogates by U+FFFD, so that UTF-8, HTML and XML can hold the text.

    Keys come from file names, which may hold any byte. Controls of the writing direction go too: they show `exe.jpg`
    for a file that ends with `gpj.exe`.
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def shorten(text: str, limit: int = 120, *, at_end: bool = False) -> str:
    """Cut to `limit` characters, with an ellipsis in the middle, so that the end of a path stays readable.

    `at_end` puts it at the end: for names, whose beginning matters most.
    """
    if len(text) <= limit:
        return text
    tail = 0 if at_end else (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def last_part(path: str) -> str:
    """Return the text after the last slash, or the whole where there is none."""
    return path.rstrip("/").rpartition("/")[2] or path


def count(value: float) -> str:
    """Write 12345 as `12,345`."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Write bytes as `1.23 GB`, or as `0.45 MB` below 0.1 GB."""
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"


def percent(value: float | None) -> str:
    """Write a share in [0, 1] as `94.3%`; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}%"


def short_percent(value: float | None) -> str:
    """Write a share as `94%`, never rounded up to 100% nor down to 0%."""
    if value is None or not math.isfinite(value):
        return "–"
    rounded = round(100 * value)
    if rounded == 100 and value < 1:
        return "99%"
    return "<1%" if rounded == 0 and value > 0 else f"{rounded}%"


def number(value: float | None, digits: int = 4) -> str:
    """Write a number to `digits` significant digits, without trailing zeros; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == round(value) and abs(value) < 1e15:
        return count(value)
    magnitude = math.floor(math.log10(abs(value)))
    if -4 <= magnitude < digits + 3:
        text = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits - 1}e}"


def duration(seconds: float) -> str:
    """Write seconds as `0.4 s`, `12 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def rate(done: int | None, seconds: float, unit: str) -> str:
    """Write `done` per second as `1,234 images/s`; empty where nothing was counted."""
    if done is None or seconds <= 0:
        return ""
    return f"{number(done / seconds, 3)} {unit}/s"


def setting(value: Any) -> str:
    """Write one setting's value as YAML does."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(setting(item) for item in value) + "]"
    return str(value)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as (dotted key, value) pairs, in their own order."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, setting(value) if not isinstance(value, Mapping) else "{}"
