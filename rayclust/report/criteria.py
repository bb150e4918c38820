"""Criteria against the number of clusters: one small drawing each, the chosen number marked in all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from rayclust.report import svg
from rayclust.report.axes import Axes
from rayclust.report.formats import count, number

COLUMNS = 3
_WIDTH, _HEIGHT, _ROW, _COLUMN = 186.0, 104.0, 178.0, 258.0


@dataclass(frozen=True)
class Criterion:
    """One criterion's values."""

    name: str
    values: Mapping[int, float]
    """Number of clusters to value; what is not finite is left out."""
    larger_is_better: bool | None = None
    """None marks no best value."""
    spread: Mapping[int, float] | None = None
    """Standard deviations over seeds, where several were run."""
    knee: int | None = None
    """Where the curve bends, marked beside the best."""


def criteria(found: Sequence[Criterion], chosen: int | None, title: str) -> Markup:
    """The criteria in a grid over one axis, the number of clusters.

    Args:
        found: in the order of the grid.
        chosen: the number that was chosen, marked by a line; None marks none.
        title: what is drawn, for screen readers.
    """
    drawn: list[str] = []
    shown = [c for c in found if any(math.isfinite(value) for value in c.values.values())]
    ks = sorted({k for criterion in shown for k in criterion.values})
    for place, criterion in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        drawn += _panel(criterion, chosen, ks, (58 + column * _COLUMN, 26 + row * _ROW))
    rows = math.ceil(len(shown) / COLUMNS)
    return svg.figure(COLUMNS * _COLUMN, max(rows, 1) * _ROW, title, *drawn)


def _panel(criterion: Criterion, chosen: int | None, ks: Sequence[int], place: tuple[float, float]) -> Iterator[str]:
    values = {k: v for k, v in sorted(criterion.values.items()) if math.isfinite(v)}
    spread = criterion.spread or {}
    y_ticks = svg.ticks(
        min(v - spread.get(k, 0.0) for k, v in values.items()),
        max(v + spread.get(k, 0.0) for k, v in values.items()),
        4,
    )
    span = (ks[0], ks[-1]) if len(ks) > 1 else (ks[0] - 1, ks[0] + 1)
    axes = Axes(*place, _WIDTH, _HEIGHT, span, (y_ticks[0], y_ticks[-1]), is_log=span[0] > 0 and span[1] > 4 * span[0])
    yield svg.text(axes.left, axes.top - 11, criterion.name, class_="fg")
    yield from axes.grid("clusters", _marks(ks, axes))
    if chosen is not None and span[0] <= chosen <= span[1]:
        at = axes.x(chosen)
        yield svg.element(
            "line",
            x1=at,
            y1=axes.top,
            x2=at,
            y2=axes.top + axes.height,
            stroke=svg.GREY,
            stroke_dasharray="3 3",
            class_="grid",
        )
    xs, ys = np.array(list(values), float), np.array(list(values.values()), float)
    if spread:
        deviation = np.array([spread.get(k, 0.0) for k in values])
        yield axes.band(xs, ys - deviation, ys + deviation, 0)
    yield axes.line(xs, ys, 0, criterion.name)
    best = _best(values, criterion.larger_is_better)
    for k, value in values.items():
        said = {criterion.knee: ", the knee", best: ", the best"}.get(k, "")
        hue = 1 if k == best else 2 if k == criterion.knee else 0
        yield axes.dot(k, value, hue, f"{count(k)} clusters: {number(value)}{said}", 5.0 if said else 3.0)


def _best(values: Mapping[int, float], larger_is_better: bool | None) -> int | None:
    if larger_is_better is None:
        return None
    return max(values, key=lambda k: (values[k] if larger_is_better else -values[k], -k))


def _marks(ks: Sequence[int], axes: Axes) -> list[float]:
    """The numbers of clusters whose labels have room."""
    kept: list[float] = []
    for k in ks:
        if not kept or axes.x(k) - axes.x(kept[-1]) >= 10 + 7 * len(count(k)):
            kept.append(float(k))
    return kept
