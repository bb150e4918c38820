"""Square matrices as pictures inside SVG: rows sorted by cluster, in one colour of the page's theme."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from rayclust.arrays import FloatArray, require_matrix
from rayclust.errors import ShapeError
from rayclust.report import svg
from rayclust.report.formats import abbreviate, number

LEVELS = 16
"""Shades, half a byte each: more cannot be told apart in a field of dots, and noise does not compress."""
HEAT = "#242a7c"
"""The darkest shade on a light ground; a page's style sheet has a light one for a dark ground."""

_LEFT, _TOP, _GAP, _STRIP, _ROW = 124.0, 30.0, 26.0, 5.0, 13.0


@dataclass(frozen=True)
class Panel:
    """One matrix."""

    title: str
    values: FloatArray
    """Float[n n], 0 and above."""


@dataclass(frozen=True)
class Group:
    """Consecutive rows and columns that belong together."""

    name: str
    count: int
    hue: int = 0
    """Place in `svg.HUES`."""


def heatmap(panels: Sequence[Panel], groups: Sequence[Group], *, ceiling: float, title: str, key: str) -> Markup:
    """Matrices side by side over the same rows, with the groups' names at the left and one scale below.

    The pictures are masks over a coloured ground, so that they follow a light or a dark theme.

    Args:
        panels: one or two.
        groups: in the order of the rows; their counts sum to n.
        ceiling: the value of the full colour, and of all above it; above 0.
        title: what is drawn, for screen readers.
        key: begins the ids of this drawing, which must be the only ones on a page.

    Raises:
        ShapeError: a matrix is not n × n.
    """
    size = sum(group.count for group in groups)
    for panel in panels:
        require_matrix(panel.values, panel.title, size)
        if len(panel.values) != size:
            raise ShapeError(f"{panel.title} has {len(panel.values)} rows: {size} are needed")
    side = 330.0 if len(panels) > 1 else 400.0
    drawn: list[str] = list(_names(groups, side))
    for place, panel in enumerate(panels):
        left = _LEFT + place * (side + _GAP)
        drawn += _panel(panel, (left, side), ceiling, f"{key}-{place}")
        drawn += _strips(groups, (left, side))
    right = _LEFT + len(panels) * side + (len(panels) - 1) * _GAP
    drawn += _scale((right, _TOP + side + 12), ceiling, f"{key}-scale")
    return svg.figure(right + 8, _TOP + side + 44, title, *drawn)


def picture(values: FloatArray, ceiling: float) -> bytes:
    """The matrix as an encoded grey PNG: black at 0, white from the ceiling on.

    Args:
        values: Float[n n].
        ceiling: above 0.
    """
    shades = np.clip(np.nan_to_num(np.asarray(values, np.float64)) / ceiling, 0, 1) * (LEVELS - 1)
    image = Image.fromarray(np.rint(shades).astype(np.uint8)).convert("P")
    image.putpalette([level * 255 // (LEVELS - 1) for level in range(LEVELS) for _ in "rgb"])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, bits=4)
    return buffer.getvalue()


def _panel(panel: Panel, place: tuple[float, float], ceiling: float, key: str) -> Iterator[str]:
    left, side = place
    box = {"x": left, "y": _TOP, "width": side, "height": side}
    source = "data:image/png;base64," + base64.b64encode(picture(panel.values, ceiling)).decode()
    image = svg.element("image", href=source, preserveAspectRatio="none", **box)
    yield svg.element("mask", image, id=key, maskUnits="userSpaceOnUse", **box)
    tip = svg.element("title", panel.title)
    yield svg.element("rect", tip, fill=HEAT, class_="heat", mask=f"url(#{key})", **box)
    yield svg.element("rect", fill="none", stroke=svg.GREY, stroke_opacity=0.5, class_="frame", **box)
    yield svg.text(left + side / 2, 14, panel.title, anchor="middle", class_="fg")


def _strips(groups: Sequence[Group], place: tuple[float, float]) -> Iterator[str]:
    """Each group's colour along the upper and the left edge, and faint lines between groups."""
    left, side = place
    for first, length, group in _stretches(groups, side):
        colour = {"class_": f"hue-{group.hue}", "fill": svg.HUES[group.hue]}
        tip = svg.element("title", f"{group.name}: {group.count} rows")
        across = {"x": left + first, "y": _TOP - _STRIP - 2, "width": length, "height": _STRIP}
        down = {"x": left - _STRIP - 2, "y": _TOP + first, "width": _STRIP, "height": length}
        yield svg.element("rect", tip, **across, **colour)
        yield svg.element("rect", tip, **down, **colour)
        if first:
            yield svg.rule(left, _TOP + first, left + side, _TOP + first)
            yield svg.rule(left + first, _TOP, left + first, _TOP + side)


def _names(groups: Sequence[Group], side: float) -> Iterator[str]:
    """Names beside their rows; one that would touch the one above is left to its strip's tooltip."""
    free = 0.0
    for first, length, group in _stretches(groups, side):
        middle = first + length / 2
        if middle - _ROW / 2 >= free - 1e-6:
            yield svg.text(_LEFT - _STRIP - 8, _TOP + middle + 4, abbreviate(group.name, 17), anchor="end", class_="fg")
            free = middle + _ROW / 2


def _stretches(groups: Sequence[Group], side: float) -> Iterator[tuple[float, float, Group]]:
    total, before = max(1, sum(group.count for group in groups)), 0
    for group in groups:
        yield side * before / total, side * group.count / total, group
        before += group.count


def _scale(place: tuple[float, float], ceiling: float, key: str) -> Iterator[str]:
    right, top = place
    width = 150.0
    colour = {"class_": "heat-stop", "stop_color": HEAT}
    stops = [svg.element("stop", offset=n, stop_opacity=n, **colour) for n in (0, 1)]
    yield svg.element("linearGradient", *stops, id=key)
    box = {"x": right - width, "y": top, "width": width, "height": 9.0}
    yield svg.element("rect", fill=f"url(#{key})", stroke=svg.GREY, stroke_opacity=0.5, class_="frame", **box)
    for value, x, anchor in ((0.0, right - width, "start"), (ceiling, right, "end")):
        sign = "≥ " if value else ""
        yield svg.text(x, top + 22, f"{sign}{number(value, 2)}", anchor=anchor)
