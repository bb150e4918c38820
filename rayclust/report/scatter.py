"""A map of rows: dots in the colours of their clusters, names at the centres."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ShapeError
from rayclust.report import svg
from rayclust.report.formats import abbreviate, count

SIDE = 560.0
NAMED = 40
"""Clusters whose names are tried, the largest ones; a name that would cover another is left to the tooltip."""

_MARGIN, _LETTER, _LINE = 16.0, 6.7, 15.0


def scatter(points: FloatArray, clusters: IntArray, names: Mapping[int, str], *, title: str) -> Markup:
    """The map, one path of dots a cluster, so that thousands of rows stay a small file.

    Args:
        points: Float[N 2], both axes on one scale.
        clusters: Int[N].
        names: of the clusters.
        title: what is drawn, for screen readers.

    Raises:
        ShapeError: lengths differ.
    """
    require_matrix(points, "points", 2)
    if len(clusters) != len(points):
        raise ShapeError(f"scatter got {len(clusters)} clusters for {len(points)} points")
    low, high = (points.min(0), points.max(0)) if len(points) else (np.zeros(2), np.ones(2))
    scale = (SIDE - 2 * _MARGIN) / (float((high - low).max()) or 1.0)
    places = (points - low) * scale * [1, -1] + [_MARGIN, _MARGIN + float((high - low)[1]) * scale]
    height = float((high - low)[1]) * scale + 2 * _MARGIN
    places[:, 0] += (SIDE - 2 * _MARGIN - float((high - low)[0]) * scale) / 2
    middles, shades = centers(places, clusters), hues(centers(points, clusters))
    order = list(middles)
    width = 2.2 if len(points) > 1500 else 3.0 if len(points) > 400 else 4.5
    drawn = [
        _dots(places[clusters == cluster], shades[cluster], names.get(cluster, str(cluster)), width)
        for cluster in order
    ]
    drawn += _labels([(middles[k], _reach(places[clusters == k]), names.get(k, str(k))) for k in order[:NAMED]], height)
    return svg.figure(SIDE, height, title, *drawn)


def hues(centers: Mapping[int, FloatArray]) -> dict[int, int]:
    """A place in `svg.HUES` for each cluster, so that equal colours lie far apart.

    Args:
        centers: cluster to Float[2], in the order in which colours are given.
    """
    given: dict[int, int] = {}
    for cluster, center in centers.items():
        far = [
            min((float(np.hypot(*(center - centers[c]))) for c, h in given.items() if h == hue), default=np.inf)
            for hue in range(len(svg.HUES))
        ]
        given[cluster] = int(np.argmax(far))
    return given


def centers(points: FloatArray, clusters: IntArray) -> dict[int, FloatArray]:
    """The middle of each cluster, the median along both axes: cluster to Float[2], largest cluster first."""
    found, sizes = np.unique(clusters, return_counts=True)
    order = found[np.lexsort((found, -sizes))].tolist()
    return {cluster: np.median(points[clusters == cluster], axis=0) for cluster in order}


def _dots(places: FloatArray, hue: int, name: str, width: float) -> Markup:
    # A line of no length with round ends is a dot, at a quarter of a circle's bytes.
    path = "".join(f"M{svg.coordinate(round(x, 1))} {svg.coordinate(round(y, 1))}h0" for x, y in places.tolist())
    tip = svg.element("title", f"{name}: {count(len(places))} of the images shown")
    colour = {"class_": f"line-hue-{hue}", "stroke": svg.HUES[hue]}
    return svg.element(
        "path",
        tip,
        d=path,
        fill="none",
        stroke_width=width * 1.6,
        stroke_linecap="round",
        stroke_opacity=0.75,
        **colour,
    )


def _reach(places: FloatArray) -> float:
    """How far most of a cluster's dots lie above and below its middle."""
    return float(np.quantile(np.abs(places[:, 1] - np.median(places[:, 1])), 0.9))


def _labels(wanted: Sequence[tuple[FloatArray, float, str]], height: float) -> Iterator[Markup]:
    """Names on their clusters; above or below those so small that the name would hide them."""
    taken: list[tuple[float, float, float, float]] = []
    for center, reach, name in wanted:
        shown = abbreviate(name, 26)
        half = _LETTER * len(shown) / 2
        x = min(max(float(center[0]), half + 2), SIDE - half - 2)
        away = reach + _LINE * 0.9
        for shift in (0.0, -_LINE, _LINE) if reach > _LINE else (-away, away):
            y = min(max(float(center[1]) + 4 + shift, _LINE), height - 4)
            box = (x - half, y - _LINE + 3, x + half, y + 3)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield _label(x, y, shown)
                break


def _label(x: float, y: float, name: str) -> Markup:
    halo: dict[str, svg.Attribute] = {
        "stroke": "#ffffff",
        "stroke_width": 3.5,
        "stroke_linejoin": "round",
        "paint_order": "stroke",
    }
    return svg.element(
        "text", name, x=x, y=y, text_anchor="middle", font_weight=600, fill="#1b1d21", class_="fg halo", **halo
    )


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
