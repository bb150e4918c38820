"""The charts of a run, for the page and for `rayclust figures`, drawn by matplotlib as `svg` writes it.

Every chart function returns one `svg` element that a page can inline, with `title` for screen readers. Equal numbers
give equal text. Arrays that do not fit together are ShapeErrors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ShapeError
from rayclust.report.formats import count, number, percent
from rayclust.report.svg import (
    GREY,
    HALO,
    HUES,
    INK,
    ON_HUE,
    SHADES,
    add_axes,
    new_figure,
    one_line,
    shade,
    styled,
    ticks,
    tooltip,
    write,
)

WIDTH, HEIGHT = 420.0, 220.0
"""Units of most charts; one is a pixel where the page has room. None is much wider: on a phone, where four fifths of it
fit, letters can still be read. Panels stand below each other."""
LABELLED_BARS = 30
"""Up to so many clusters each have a bar of their own; more are counted by size."""
CURVE_POINTS = 400
"""A longer curve is thinned to so many points: more than the chart has pixels to show."""
LINE_POINTS = 160
"""The same for a line on a logarithmic axis."""
OVERFLOW = 1e100
"""A value beyond is drawn as a gap: a loss that went there has diverged."""
NAMED = 40
"""Clusters of a map whose names are tried, the largest ones; a name that would cover another is left to the tooltip."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 20.0, 14.0, 40.0


@styled()
def size_histogram(sizes: Sequence[int], names: Sequence[str] | None = None) -> Markup:
    """Draw the sizes of the clusters: one named bar each, largest first, or counts per range of sizes for many.

    Args:
        sizes: K numbers of images, in any order.
        names: K names; None numbers them in the order given.
    """
    titles = [f"Cluster {index}" for index in range(len(sizes))] if names is None else list(names)
    if len(titles) != len(sizes):
        raise ShapeError(f"size_histogram got {len(titles)} names for {len(sizes)} sizes")
    if len(sizes) > LABELLED_BARS:
        # Even ranges where sizes are alike, else 1-2-5 steps.
        low, high = min(sizes), max(sizes)
        if high <= 20 * max(low, 1):
            width = math.ceil((high - low + 1) / 20)
            edges = [low + width * i for i in range(math.ceil((high - low + 1) / width) + 1)]
        else:
            steps = [0, *(m * 10**power for power in range(len(str(high)) + 1) for m in (1, 2, 5))]
            edges = [edge for edge, after in pairwise([*steps, math.inf]) if after > low and edge <= high]
            edges = [*edges, next(edge for edge in steps if edge > high)]
        counts = np.histogram(np.asarray(sizes, dtype=np.int64), bins=np.asarray(edges, dtype=np.int64))[0]
        labels = [count(a) if a == b - 1 else f"{count(a)}–{count(b - 1)}" for a, b in pairwise(edges)]
        every = math.ceil(len(labels) * 8 * max(len(label) for label in labels) / (WIDTH - _LEFT))
        marks = {i + 0.5: label for i, label in enumerate(labels) if i % every == 0}
        words = {"title": "Clusters by size", "x_label": "images in a cluster", "unit": "clusters"}
        return _columns(counts.tolist(), labels, marks, **words)
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    row, left, lines = 22.0, 150.0, max(1, len(sizes))
    figure = new_figure(WIDTH, 8 + lines * row)
    axes = add_axes(figure, left, 4, WIDTH - left - 60, lines * row, x=(0, max([1, *sizes])), y=(lines - 0.5, -0.5))
    axes.set_yticks(range(len(order)), labels=[one_line(titles[index], 22) for index in order], color=INK)
    bars = axes.barh(range(len(order)), [sizes[index] for index in order], 16 / row, color=HUES[0])
    for line, (index, bar) in enumerate(zip(order, bars, strict=True)):
        bar.set_gid(tooltip(f"{titles[index]}: {sizes[index]}"))
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center_baseline"}
        axes.annotate(count(sizes[index]), (sizes[index], line), **place)
    return write(figure, "Images per cluster")


@styled()
def confidence_histogram(counts: Sequence[int]) -> Markup:
    """Draw how many images lie in each equal bin of the assignments' confidence over [0, 1]."""
    bins = max(1, len(counts))
    labels = [f"{100 * i / bins:.0f}–{100 * (i + 1) / bins:.0f}%" for i in range(len(counts))]
    marks = {bins * fifth / 5: f"{20 * fifth}%" for fifth in range(6)}
    words = {"title": "Images by confidence", "x_label": "confidence of the assignment", "unit": "images"}
    return _columns(counts, labels, marks, **words)


@styled()
def curve(
    series: Mapping[str, Sequence[float]], title: str, x_label: str = "epoch", *, start: float = 1, step: float = 1
) -> Markup:
    """Draw lines that share their axes, with a legend when there are several.

    Args:
        series: name to values; one that is not finite, or that has overflowed, leaves a gap.
        title: what is drawn, for screen readers.
        x_label: what the horizontal axis counts.
        start: the first value's place on that axis.
        step: distance between two values on that axis; above 0.
    """
    lines = {name: np.array(values, dtype=np.float64) for name, values in series.items()}
    for values in lines.values():
        values[~(np.abs(values) < OVERFLOW)] = np.nan
    finite = np.concatenate([[], *(values[np.isfinite(values)] for values in lines.values())])
    last = start + step * max(1, *(len(values) - 1 for values in lines.values()), 1)
    y_ticks = ticks(finite.min(), finite.max()) if finite.size else ticks(0.0, 1.0)
    top = _TOP + 14 * (len(lines) > 1)
    figure = new_figure(WIDTH, HEIGHT)
    size = (WIDTH - _LEFT - _RIGHT, HEIGHT - top - _BOTTOM)
    axes = add_axes(figure, _LEFT, top, *size, x=(start, last), y_ticks=y_ticks)
    axes.set_xticks([tick for tick in ticks(start, last, 6) if start <= tick <= last])
    axes.set_xlabel(one_line(x_label))
    for index, (name, values) in enumerate(lines.items()):
        stride = max(1, math.ceil(len(values) / CURVE_POINTS))
        kept = np.unique(np.append(np.arange(0, len(values), stride), range(len(values))[-1:])).astype(int)
        # A value between two gaps is given twice: with round ends, a line of no length is a dot.
        lone = np.convolve(np.isfinite(values[kept]), [1, 1, 1])[1:-1] == 1 if len(kept) else []
        kept = np.repeat(kept, np.where(lone, 2, 1))
        axes.plot(start + step * kept, values[kept], color=HUES[index % len(HUES)], gid=tooltip(name))
    if len(lines) > 1:
        corner = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        axes.legend(axes.lines, [one_line(name) for name in lines], ncols=len(lines), handlelength=1.2, **corner)
    return write(figure, title)


@styled()
def contingency(counts: IntArray, classes: Sequence[str], clusters: Sequence[str]) -> Markup:
    """Draw the share of each true class that each cluster holds, clusters ordered so that a good match is a diagonal.

    Args:
        counts: Int[C K], images of class c in cluster k.
        classes: C names.
        clusters: K names.
    """
    from matplotlib.patches import Rectangle

    require_matrix(counts, "counts", len(clusters))
    if counts.shape[0] != len(classes):
        raise ShapeError(f"contingency got {len(classes)} class names for {counts.shape[0]} rows")
    # Clusters of one class side by side, the largest share first.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    best = shares.argmax(axis=0) if shares.size else np.zeros(len(clusters), int)
    largest = shares.max(axis=0, initial=0)
    order = np.lexsort((-largest, best)).tolist()
    left, rows, columns = 126.0, max(1, len(classes)), max(1, len(clusters))
    cell = min(34.0, max(4.0, (WIDTH - left - 12) / max(rows, columns)))
    figure = new_figure(max(WIDTH, left + columns * cell + 12), 6 + rows * cell + (78 if cell >= 14 else 32))
    axes = add_axes(figure, left, 6, columns * cell, rows * cell, x=(0, columns), y=(rows, 0))
    if cell >= 11:
        axes.set_yticks(np.arange(len(classes)) + 0.5, labels=[one_line(name, 18) for name in classes])
    if cell >= 14:
        slanted = {"rotation": 45, "ha": "right", "va": "baseline", "rotation_mode": "anchor"}
        axes.set_xticks(np.arange(len(order)) + 0.5, labels=[one_line(clusters[k], 14) for k in order], **slanted)
        axes.tick_params(axis="x", pad=10)
    else:
        axes.set_xlabel("clusters, those of one class side by side")
    gap = 0.5 / cell
    for row, column in np.argwhere(counts[:, order]).tolist():
        k, share = order[column], float(shares[row, order[column]])
        tip = tooltip(f"{classes[row]} in {clusters[k]}: {count(counts[row, k])}, {percent(share)}")
        square = Rectangle((column + gap, row + gap), 1 - 2 * gap, 1 - 2 * gap, color=HUES[0], lw=0)
        square.set(gid=tip, alpha=round(0.06 + 0.94 * share, 3))
        axes.add_artist(square)  # add_patch and barh take twice as long, and there may be thousands
        if cell >= 26 and share >= 0.005:
            look = {"ha": "center", "va": "center_baseline", "color": ON_HUE if share > 0.5 else INK}
            axes.text(column + 0.5, row + 0.5, f"{100 * share:.0f}", **look)
    return write(figure, "True classes against clusters: share of each class")


@dataclass(frozen=True)
class Group:
    """Consecutive rows and columns of a heat-map that belong together, and their colour's place in `HUES`."""

    name: str
    count: int
    hue: int = 0


@styled()
def heatmap(panels: Mapping[str, FloatArray], groups: Sequence[Group], *, ceiling: float, title: str) -> Markup:
    """Draw matrices over the same rows below each other, with the groups' names at the left and one scale below.

    Args:
        panels: title to Float[n n], 0 and above; one or two.
        groups: in the order of the rows; their counts sum to n.
        ceiling: the value of the full colour, and of all above it; above 0.
        title: what is drawn, for screen readers.
    """
    size = sum(group.count for group in groups)
    for name, values in panels.items():
        require_matrix(values, name, size)
        if len(values) != size:
            raise ShapeError(f"{name} has {len(values)} rows: {size} are needed")
    left, top, strip, line = 124.0, 30.0, 5.0, 13.0
    side = WIDTH - left - 8
    bottom = len(panels) * (top + side)
    figure = new_figure(WIDTH, bottom + 44)
    unit = max(1, size) / side  # rows per pixel
    counts = np.array([group.count for group in groups])
    starts = np.cumsum(counts) - counts
    # Names beside their rows; one that would touch the one above is left to its strip's tooltip.
    named, free = dict[float, str](), 0.0
    for group, middle in zip(groups, starts + counts / 2, strict=True):
        if middle / unit - line / 2 >= free - 1e-6:
            named[float(middle)], free = one_line(group.name, 17), middle / unit + line / 2
    look = {"align": "edge", "color": [HUES[group.hue] for group in groups]}
    for place, (name, values) in enumerate(panels.items()):
        axes = add_axes(figure, left, top + place * (top + side), side, side, x=(0, size or 1), y=(size or 1, 0))
        shade(axes, values / ceiling)
        axes.set_title(one_line(name, 60), pad=12)
        axes.set_yticks(list(named), labels=list(named.values()), color=INK)
        axes.tick_params(axis="y", pad=strip + 6)
        # Each group's colour along the upper and the left edge, and faint lines between groups.
        across = axes.bar(starts, -strip * unit, counts, bottom=-2 * unit, **look)
        down = axes.barh(starts, -strip * unit, counts, left=-2 * unit, **look)
        for group, bars in zip(groups, zip(across, down, strict=True), strict=True):
            for bar in bars:
                bar.set_gid(tooltip(f"{group.name}: {group.count} rows"))
        for start in starts[1:].tolist():
            axes.plot([0, size, np.nan, start, start], [start, start, np.nan, 0, size], color=GREY, lw=1, alpha=0.25)
    scale = add_axes(figure, left + side - 150, bottom + 12, 150, 9, x=(0, 1), y=(1, 0))
    shade(scale, np.linspace(0, 1, SHADES)[None])
    scale.text(0, 2.6, "0")
    scale.text(1, 2.6, f"≥ {number(ceiling, 2)}", ha="right")
    return write(figure, title)


@styled()
def scatter(points: FloatArray, clusters: IntArray, names: Mapping[int, str], *, title: str) -> Markup:
    """Draw a map of rows: dots in the colours of their clusters, names at the centres.

    The dots of a cluster are one path, so that thousands of rows stay a small file.

    Args:
        points: Float[N 2], both axes on one scale.
        clusters: Int[N].
        names: of the clusters.
        title: what is drawn, for screen readers.
    """
    require_matrix(points, "points", 2)
    if len(clusters) != len(points):
        raise ShapeError(f"scatter got {len(clusters)} clusters for {len(points)} points")
    # 1. From the map's axes to pixels, both on one scale.
    margin, letter, line = 16.0, 6.7, 15.0
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(2), np.ones(2))
    across, up = (high - low).tolist()
    scale = (WIDTH - 2 * margin) / (max(across, up) or 1.0)
    height = up * scale + 2 * margin
    places = (points - low) * scale * [1, -1] + [(WIDTH - across * scale) / 2, margin + up * scale]
    figure = new_figure(WIDTH, height)
    axes = add_axes(figure, 0, 0, WIDTH, height, x=(0, WIDTH), y=(height, 0))
    # 2. Dots, cluster by cluster.
    middles, shades = centers(places, clusters), hues(centers(points, clusters))
    width = 3.5 if len(points) > 1500 else 4.8 if len(points) > 400 else 7.2
    for cluster in middles:
        dots = places[clusters == cluster]
        tip = tooltip(f"{names.get(cluster, cluster)}: {count(len(dots))} of the images shown")
        xs, ys = np.repeat(dots, 3, axis=0).T  # a line of no length, with round ends, and a gap for each dot
        ys[2::3] = np.nan
        axes.plot(xs, ys, color=HUES[shades[cluster]], lw=width, alpha=0.75, gid=tip)
    # 3. Names on their clusters; above or below those so small that the name would hide them.
    taken: list[FloatArray] = []
    for cluster in list(middles)[:NAMED]:
        name, (x, y) = one_line(str(names.get(cluster, cluster)), 26), middles[cluster].tolist()
        reach = float(np.quantile(np.abs(places[clusters == cluster][:, 1] - y), 0.9))
        half = letter * len(name) / 2
        x = min(max(x, half + 2), WIDTH - half - 2)
        for shift in (0.0, -line, line) if reach > line else (-reach - 0.9 * line, reach + 0.9 * line):
            base = min(max(y + 4 + shift, line), height - 4)
            box = np.array([x - half, base - line + 3, x + half, base + 3])
            if not any((box[:2] < other[2:]).all() and (other[:2] < box[2:]).all() for other in taken):
                taken.append(box)
                axes.text(x, base, name, ha="center", color=INK, weight="bold", gid=HALO)
                break
    return write(figure, title)


def hues(centers: Mapping[int, FloatArray]) -> dict[int, int]:
    """Return a place in `HUES` for each centre, Float[2], so that equal colours lie far apart."""
    points = np.array(list(centers.values())).reshape(-1, 2)
    # Each centre takes the colour whose nearest centre so far is farthest away; unused colours come first.
    chosen = np.zeros(len(points), int)
    for place, center in enumerate(points):
        nearest = np.full(len(HUES), np.inf)
        np.minimum.at(nearest, chosen[:place], np.hypot(*(points[:place] - center).T))
        chosen[place] = nearest.argmax()
    return dict(zip(centers, chosen.tolist(), strict=True))


def centers(points: FloatArray, clusters: IntArray) -> dict[int, FloatArray]:
    """Return the median of each cluster of points, Float[N 2], along both axes: Float[2], largest cluster first."""
    keys, sizes = np.unique(clusters, return_counts=True)
    order = keys[np.lexsort((keys, -sizes))].tolist()
    return {cluster: np.median(points[clusters == cluster], axis=0) for cluster in order}


@dataclass(frozen=True)
class Spectrum:
    """Singular values of rows in one space, each over the largest, and their colour's place in `HUES`."""

    name: str
    hue: int
    whole: FloatArray | None = None
    """Float[r] of all rows; None draws nothing above."""
    clusters: FloatArray | None = None
    """Float[3 R]: low quantile, median and high quantile over clusters; None draws nothing below."""
    is_dashed: bool = False


@styled()
def spectra(series: Sequence[Spectrum], title: str) -> Markup:
    """Draw singular values over their logarithmic places: of all rows above, cluster by cluster below."""
    from matplotlib.ticker import LogLocator

    left, height, top, below = 48.0, 160.0, 28.0, 44.0
    panel = top + height + below
    figure = new_figure(WIDTH, 2 * panel + 17 * len(series) + 4)
    whole = [(s, None if s.whole is None else s.whole[None]) for s in series]
    legend, dashes = {}, {"linestyle": (0, (2.5, 2)), "dash_capstyle": "butt"}
    halves = ("all rows", whole), ("cluster by cluster", [(s, s.clusters) for s in series])
    for place, (head, drawn) in enumerate(halves):
        lines = [(s, values) for s, values in drawn if values is not None and values.size]
        longest = max([2, *(values.shape[1] for _, values in lines)])
        size = (WIDTH - left - 20, height)
        axes = add_axes(figure, left, top + place * panel, *size, x=(1, longest), y_ticks=ticks(0, 1, 6), is_log=True)
        axes.set_title(head, pad=10)
        axes.set_xlabel("place of the singular value")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if longest < 200 else (1, 3), numticks=99))
        for s, values in lines:
            # Thinned evenly along the axis as it is drawn.
            last = values.shape[1]
            at = np.unique(np.geomspace(1, last, min(LINE_POINTS, last)).round().astype(int))
            low, middle, high = values[[0, len(values) // 2, -1]][:, at - 1]
            if place:
                axes.fill(np.append(at, at[::-1]), np.append(low, high[::-1]), color=HUES[s.hue], alpha=0.16, lw=0)
            gid = tooltip(f"{s.name}: median" if place else s.name)
            [legend[s.name]] = axes.plot(at, middle, color=HUES[s.hue], gid=gid, **dashes if s.is_dashed else {})
    if legend:
        corner = {"loc": "lower left", "bbox_to_anchor": (0.05, 0), "handlelength": 1.6}
        figure.legend(legend.values(), [one_line(name, 60) for name in legend], **corner)
    return write(figure, title)


@dataclass(frozen=True)
class Criterion:
    """One criterion's values against the number of clusters."""

    name: str
    values: Mapping[int, float]
    """Number of clusters to value; what is not finite is left out."""
    larger_is_better: bool | None = None
    """None marks no best value."""
    spread: Mapping[int, float] | None = None
    """Standard deviations over seeds, where several were run."""
    knee: int | None = None
    """Where the curve bends, marked beside the best."""


@styled()
def criteria(found: Sequence[Criterion], chosen: int | None, title: str) -> Markup:
    """Draw the criteria in a grid over one axis, the number of clusters; a line marks the one that was chosen."""
    columns, width, height, row, column = 2, 150.0, 104.0, 172.0, WIDTH / 2
    shown = [(c, {k: v for k, v in sorted(c.values.items()) if math.isfinite(v)}) for c in found]
    shown = [(c, values) for c, values in shown if values]
    ks = sorted({k for c, _ in shown for k in c.values})
    span = (ks[0], ks[-1]) if len(ks) > 1 else (ks[0] - 1, ks[0] + 1) if ks else (0, 1)
    is_log = span[0] > 0 and span[1] > 4 * span[0]
    # The numbers of clusters whose labels have room.
    at = np.log(np.maximum(span, 1)) if is_log else np.array(span, float)
    places = {k: (math.log(k) if is_log else k) * width / (at[1] - at[0]) for k in ks}
    marks: list[int] = []
    for k in ks:
        if not marks or places[k] - places[marks[-1]] >= 10 + 7 * len(count(k)):
            marks.append(k)
    figure = new_figure(columns * column, max(1, math.ceil(len(shown) / columns)) * row)
    for place, (criterion, values) in enumerate(shown):
        xs, ys = np.array(list(values), float), np.array(list(values.values()), float)
        deviation = np.array([(criterion.spread or {}).get(k, 0.0) for k in values])
        y_ticks = ticks((ys - deviation).min(), (ys + deviation).max(), 4)
        left, top = 48 + place % columns * column, 26 + place // columns * row
        axes = add_axes(figure, left, top, width, height, x=span, y_ticks=y_ticks, is_log=is_log)
        axes.set_title(one_line(criterion.name, 32), loc="left", x=-44 / width, pad=10)
        axes.set_xticks(marks, labels=[count(k) for k in marks])
        axes.set_xlabel("clusters")
        if chosen is not None and span[0] <= chosen <= span[1]:
            axes.axvline(chosen, color=GREY, lw=1, ls=(0, (3, 3)), gid=tooltip("chosen"))
        if criterion.spread:
            band = np.append(ys - deviation, (ys + deviation)[::-1])
            axes.fill(np.append(xs, xs[::-1]), band, color=HUES[0], alpha=0.16, lw=0)
        axes.plot(xs, ys, color=HUES[0], gid=tooltip(criterion.name))
        best = None
        if criterion.larger_is_better is not None:
            best = list(values)[int(ys.argmax() if criterion.larger_is_better else ys.argmin())]
        for k, value in values.items():
            remark = {criterion.knee: ", the knee", best: ", the best"}.get(k, "")
            look = {"color": HUES[1 if k == best else 2 if k == criterion.knee else 0], "lw": 10.0 if remark else 6.0}
            axes.plot([k, k], [value, value], gid=tooltip(f"{count(k)} clusters: {number(value)}{remark}"), **look)
    return write(figure, title)


@dataclass(frozen=True)
class Flow:
    """What goes from a group at the left to one at the right, given by their places."""

    source: int
    target: int
    count: int
    hue: int | None = None
    """Place in `HUES`; None is grey."""
    is_faint: bool = False
    url: str = ""
    """Where a click leads; empty makes it no link."""


@styled()
def sankey(flows: Sequence[Flow], sources: Sequence[str], targets: Sequence[str], title: str) -> Markup:
    """Draw how groups at the left divide among groups at the right: bands as thick as their counts.

    Args:
        flows: at most one for each pair of groups.
        sources: names of the groups at the left, from the top.
        targets: names of those at the right.
        title: what is drawn, for screen readers.
    """
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path

    across, margin, bar, gap, line = 600.0, 150.0, 10.0, 5.0, 15.0
    totals = np.zeros((len(sources), len(targets)), np.int64)
    for flow in flows:
        totals[flow.source, flow.target] += flow.count
    thickness = 380 / max(1, int(totals.sum()))  # of one of what is counted
    # 1. Each group has room for its name; the shorter side stands in the middle.
    rooms = [np.maximum(totals.sum(axis) * thickness, line) + gap for axis in (1, 0)]
    height = max(room.sum() for room in rooms) + gap
    figure = new_figure(across, height)
    axes = add_axes(figure, 0, 0, across, height, x=(0, across), y=(height, 0))
    free = list[FloatArray]()
    for axis, room, names in zip((1, 0), rooms, (sources, targets), strict=True):
        middles = (height - room.sum()) / 2 + np.cumsum(room) - room / 2
        sizes = totals.sum(axis)
        free.append(middles - sizes * thickness / 2)
        x, out = (margin, -6) if axis else (across - margin - bar, bar + 6)
        for name, size, top, middle in zip(names, sizes.tolist(), free[-1], middles, strict=True):
            look = {"color": INK, "lw": 0, "gid": tooltip(f"{name}: {count(size)}")}
            axes.add_artist(Rectangle((x, top), bar, size * thickness, **look))
            place = {"ha": "right" if axis else "left", "va": "center_baseline", "color": INK}
            axes.text(x + out, middle, f"{one_line(name, 15)} · {count(size)}", **place)
    # 2. Bands in the order of the groups at both ends, so that those of a group do not cross there; faint ones below.
    left, right = margin + bar, across - margin - bar
    half = (left + right) / 2
    for flow in sorted(flows, key=lambda flow: (flow.source, flow.target)):
        a, b, thick = free[0][flow.source], free[1][flow.target], flow.count * thickness
        free[0][flow.source] += thick
        free[1][flow.target] += thick
        upper = [(left, a), (half, a), (half, b), (right, b)]
        lower = [(right, b + thick), (half, b + thick), (half, a + thick), (left, a + thick)]
        codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
        band = PathPatch(Path([*upper, *lower, upper[0]], codes), lw=0, alpha=0.25 if flow.is_faint else 0.65)
        tip = tooltip(f"{sources[flow.source]} → {targets[flow.target]}: {count(flow.count)}")
        band.set(color=GREY if flow.hue is None else HUES[flow.hue], gid=tip, url=flow.url or None)
        band.set_zorder(0.5 if flow.is_faint else 1)
        axes.add_artist(band)
    return write(figure, title)


def _columns(
    counts: Sequence[int], labels: Sequence[str], marks: Mapping[float, str], *, title: str, x_label: str, unit: str
) -> Markup:
    """Draw bars side by side, `marks` below at places of the axis, which has one unit a bar."""
    bars, size = max(1, len(counts)), (WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM)
    figure = new_figure(WIDTH, HEIGHT)
    y_ticks = [tick for tick in ticks(0, max([1, *counts])) if tick % 1 == 0]
    axes = add_axes(figure, _LEFT, _TOP, *size, x=(0, bars), y_ticks=y_ticks)
    axes.set_xticks(list(marks), labels=list(marks.values()))
    axes.set_xlabel(x_label)
    margin = min(0.25, bars / size[0])
    drawn = axes.bar(np.arange(len(counts)) + margin, counts, 1 - 2 * margin, align="edge", color=HUES[0])
    for value, label, bar in zip(counts, labels, drawn, strict=True):
        bar.set_gid(tooltip(f"{label}: {count(value)} {unit}"))
    return write(figure, title)
