"""Figures as SVG text: escaped, the same bytes for the same numbers, and in the colours of the page's theme."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ShapeError
from rayclust.report import svg
from rayclust.report.formats import abbreviate, count, number, percent

WIDTH = 560.0
HEIGHT = 240.0
LABELLED_BARS = 30
"""Up to so many clusters each have a bar of their own; more are counted by size."""
CURVE_POINTS = 400
"""A longer curve is thinned to so many points: more than the drawing has pixels to show."""
OVERFLOW = 1e100
"""A value beyond is drawn as a gap: a loss that went there has diverged."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 20.0, 14.0, 40.0


def size_histogram(sizes: Sequence[int], names: Sequence[str] | None = None) -> str:
    """How large the clusters are: one named bar each, largest first, or counts per range of sizes when there are many.

    Args:
        sizes: K numbers of images, in any order.
        names: K names; None numbers them in the order given.

    Raises:
        ShapeError: there are not as many names as sizes.
    """
    titles = [f"Cluster {index}" for index in range(len(sizes))] if names is None else list(names)
    if len(titles) != len(sizes):
        raise ShapeError(f"size_histogram got {len(titles)} names for {len(sizes)} sizes")
    if len(sizes) <= LABELLED_BARS:
        return _named_bars(sizes, titles)
    edges = _size_edges(sizes)
    counts = np.histogram(np.asarray(sizes, dtype=np.int64), bins=np.asarray(edges, dtype=np.int64))[0]
    labels = [_range(low, high - 1) for low, high in pairwise(edges)]
    every = math.ceil(len(labels) * 8 * max(len(label) for label in labels) / (WIDTH - _LEFT))
    marks = [((index + 0.5) / len(labels), label) for index, label in enumerate(labels) if index % every == 0]
    return _columns([int(n) for n in counts], labels, ("Clusters by size", "images in a cluster", "clusters"), marks)


def confidence_histogram(counts: Sequence[int]) -> str:
    """How sure the method is of its assignments.

    Args:
        counts: images per equal bin of confidence over [0, 1].
    """
    bins = max(1, len(counts))
    labels = [f"{100 * i / bins:.0f}–{100 * (i + 1) / bins:.0f}%" for i in range(len(counts))]
    marks = [(fifth / 5, f"{20 * fifth}%") for fifth in range(6)]
    return _columns(counts, labels, ("Images by confidence", "confidence of the assignment", "images"), marks)


def curve(
    series: Mapping[str, Sequence[float]], title: str, x_label: str = "epoch", *, start: float = 1, step: float = 1
) -> str:
    """Lines that share their axes, with a legend when there are several.

    Args:
        series: name to values; one that is not finite, or that has overflowed, leaves a gap.
        title: what is drawn, for screen readers.
        x_label: what the horizontal axis counts.
        start: the first value's place on that axis.
        step: distance between two values on that axis; above 0.
    """
    lines = {name: _drawable(values) for name, values in series.items()}
    finite = [value for values in lines.values() for value in values[np.isfinite(values)]]
    longest = max((len(values) for values in lines.values()), default=0)
    y_ticks = svg.ticks(min(finite, default=0.0), max(finite, default=1.0))
    last = start + step * max(longest - 1, 1)
    drawn: list[str] = list(_horizontal_grid(y_ticks))
    x_ticks = [tick for tick in svg.ticks(start, last, 6) if start <= tick <= last]
    drawn += _below([(_x(tick, start, last), number(tick)) for tick in x_ticks], x_label)
    for index, (name, values) in enumerate(lines.items()):
        drawn += _polylines(values, (start, step, last), (y_ticks[0], y_ticks[-1]), name, index)
    if len(lines) > 1:
        drawn += _legend(list(lines))
    return svg.figure(WIDTH, HEIGHT, title, *drawn)


def contingency(counts: IntArray, classes: Sequence[str], clusters: Sequence[str]) -> str:
    """The share of each true class that each cluster holds, clusters ordered so that a good match is a diagonal.

    Args:
        counts: Int[C K], images of class c in cluster k.
        classes: C names.
        clusters: K names.

    Raises:
        ShapeError: `counts` is not C × K.
    """
    require_matrix(counts, "counts", len(clusters))
    if counts.shape[0] != len(classes):
        raise ShapeError(f"contingency got {len(classes)} class names for {counts.shape[0]} rows")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = sorted(range(len(clusters)), key=lambda k: _place(shares[:, k], k))
    cell = min(34.0, max(7.0, 430.0 / max(len(classes), len(clusters), 1)))
    left, bottom, right = 126.0, 6.0 + len(classes) * cell, 126.0 + len(clusters) * cell
    drawn: list[str] = []
    for row, name in enumerate(classes):
        y = 6.0 + row * cell
        drawn += [svg.text(left - 8, y + cell / 2 + 4, abbreviate(name, 18), anchor="end")] if cell >= 11 else []
        for column in np.flatnonzero(counts[row, order]):
            k, share = order[column], float(shares[row, order[column]])
            title = f"{name} in {clusters[k]}: {count(counts[row, k])}, {percent(share)}"
            drawn += _heat((left + int(column) * cell, y, cell), share, title)
    if cell >= 14:
        drawn += [
            _slanted(left + (i + 0.5) * cell, bottom + 14, abbreviate(clusters[k], 14)) for i, k in enumerate(order)
        ]
    else:
        words = "clusters, those of one class side by side"
        drawn.append(svg.text((left + right) / 2, bottom + 20, words, anchor="middle"))
    title = "True classes against clusters: share of each class"
    return svg.figure(max(WIDTH, right + 12), bottom + (78 if cell >= 14 else 32), title, *drawn)


def _slanted(x: float, y: float, content: str) -> Markup:
    place = f"rotate(-45 {svg.coordinate(x)} {svg.coordinate(y)})"
    return svg.element("g", svg.text(x, y, content, anchor="end"), transform=place)


def _place(shares: FloatArray, cluster: int) -> tuple[int, float, int]:
    best = int(shares.argmax()) if shares.size else 0
    return best, -float(shares[best]) if shares.size else 0.0, cluster


def _heat(place: tuple[float, float, float], share: float, title: str) -> Iterator[str]:
    x, y, cell = place
    box = {"x": x + 0.5, "y": y + 0.5, "width": cell - 1, "height": cell - 1}
    opacity = round(0.06 + 0.94 * share, 3)
    tip = svg.element("title", title)
    yield svg.element("rect", tip, rx=2, class_="series-0", fill=svg.PALETTE[0], fill_opacity=opacity, **box)
    if cell >= 26 and share >= 0.005:
        inked = "on-series" if share > 0.5 else "fg"
        yield svg.text(x + cell / 2, y + cell / 2 + 4, f"{100 * share:.0f}", anchor="middle", class_=inked)


def _named_bars(sizes: Sequence[int], names: Sequence[str]) -> str:
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    left, row = 150.0, 22.0
    length = (WIDTH - left - 60) / max([1, *sizes])
    drawn: list[str] = []
    for line, index in enumerate(order):
        y = 4 + line * row
        drawn.append(svg.text(left - 8, y + 15, abbreviate(names[index], 22), anchor="end", class_="fg"))
        drawn.append(svg.rectangle(left, y + 3, sizes[index] * length, row - 6, f"{names[index]}: {sizes[index]}"))
        drawn.append(svg.text(left + sizes[index] * length + 6, y + 15, count(sizes[index])))
    return svg.figure(WIDTH, 8 + len(order) * row, "Images per cluster", *drawn)


def _size_edges(sizes: Sequence[int]) -> list[int]:
    low, high = min(sizes), max(sizes)
    if high <= 20 * max(low, 1):
        width = max(1, math.ceil((high - low + 1) / 20))
        return [*range(low, high + 1, width), low + width * math.ceil((high - low + 1) / width)]
    edges = [m * 10**power for power in range(len(str(high)) + 1) for m in (1, 2, 5)]
    inner = [edge for edge in edges if low < edge <= high]
    return [0 if low == 0 else max(e for e in edges if e <= low), *inner, min(e for e in edges if e > high)]


def _range(low: int, high: int) -> str:
    return count(low) if low == high else f"{count(low)}–{count(high)}"


def _columns(
    counts: Sequence[int], labels: Sequence[str], words: tuple[str, str, str], marks: Sequence[tuple[float, str]]
) -> str:
    """Bars side by side; `words` are title, axis and unit, `marks` stand below at fractions of the axis."""
    title, x_label, unit = words
    y_ticks = svg.ticks(0, max([1, *counts]))
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(counts))
    drawn: list[str] = list(_horizontal_grid(y_ticks))
    for index, (value, label) in enumerate(zip(counts, labels, strict=True)):
        top = _y(value, y_ticks[0], y_ticks[-1])
        tip = f"{label}: {count(value)} {unit}"
        drawn.append(svg.rectangle(_LEFT + index * step + 1, top, max(step - 2, 1), HEIGHT - _BOTTOM - top, tip))
    drawn += _below([(_x(fraction, 0, 1), mark) for fraction, mark in marks], x_label)
    return svg.figure(WIDTH, HEIGHT, title, *drawn)


def _below(marks: Sequence[tuple[float, str]], label: str) -> Iterator[str]:
    for x, mark in marks:
        yield svg.text(x, HEIGHT - _BOTTOM + 16, mark, anchor="middle")
    yield svg.text((WIDTH + _LEFT) / 2, HEIGHT - 6, label, anchor="middle")


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _BOTTOM - _TOP)


def _horizontal_grid(y_ticks: Sequence[float]) -> Iterator[str]:
    for tick in y_ticks:
        y = _y(tick, y_ticks[0], y_ticks[-1])
        yield svg.rule(_LEFT, y, WIDTH - _RIGHT, y)
        yield svg.text(_LEFT - 8, y + 4, number(tick, 6), anchor="end")


def _x(value: float, first: float, last: float) -> float:
    return _LEFT + (value - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)


def _drawable(values: Sequence[float]) -> FloatArray:
    numbers = np.array(values, dtype=np.float64)
    numbers[~(np.abs(numbers) < OVERFLOW)] = np.nan
    return numbers


def _polylines(
    values: FloatArray, axis: tuple[float, float, float], span: tuple[float, float], name: str, series: int
) -> Iterator[Markup]:
    """One line per stretch of finite values; a stretch of one value is a dot."""
    start, step, last = axis
    stride = math.ceil(len(values) / CURVE_POINTS)
    kept = sorted({*range(0, len(values), max(stride, 1)), *([len(values) - 1] if len(values) else [])})
    colour = {"class_": f"line-{series % len(svg.PALETTE)}", "stroke": svg.PALETTE[series % len(svg.PALETTE)]}
    stretch: list[str] = []
    for index in [*kept, None]:
        if index is not None and math.isfinite(values[index]):
            x, y = _x(start + step * index, start, last), _y(values[index], *span)
            stretch.append(f"{svg.coordinate(x)},{svg.coordinate(y)}")
        elif stretch:
            points = " ".join(stretch if len(stretch) > 1 else stretch * 2)
            tip = svg.element("title", name)
            yield svg.element(
                "polyline", tip, points=points, fill="none", stroke_width=2, stroke_linecap="round", **colour
            )
            stretch = []


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = _LEFT + 4
    for index, name in enumerate(names):
        label = abbreviate(name, 24)
        yield svg.rectangle(x, 0, 10, 10, name, series=index)
        yield svg.text(x + 15, 10, label)
        x += 32 + 6.5 * len(label)
