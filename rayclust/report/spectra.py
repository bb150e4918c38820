"""Singular values as a drawing: all rows at the left, cluster by cluster at the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from rayclust.arrays import FloatArray
from rayclust.report import svg
from rayclust.report.axes import Axes

_WIDTH, _HEIGHT, _TOP = 330.0, 200.0, 28.0


@dataclass(frozen=True)
class Spectrum:
    """Singular values of rows in one space, each over the largest."""

    name: str
    hue: int
    """Place in `svg.HUES`."""
    whole: FloatArray | None = None
    """Float[r] of all rows; None draws nothing at the left."""
    clusters: FloatArray | None = None
    """Float[3 R]: low quantile, median and high quantile over clusters; None draws nothing at the right."""
    is_dashed: bool = False


def spectra(series: Sequence[Spectrum], title: str) -> Markup:
    """Lines that fall from 1: the faster, the fewer the directions that rows take up. The places are logarithmic.

    Args:
        series: the spaces compared.
        title: what is drawn, for screen readers.
    """
    whole = [s.whole for s in series if s.whole is not None]
    middle = [s.clusters[1] for s in series if s.clusters is not None]
    drawn: list[str] = []
    for place, (head, found) in enumerate((("all rows", whole), ("cluster by cluster", middle))):
        longest = max([2, *(len(values) for values in found)])
        axes = Axes(48 + place * (_WIDTH + 60), _TOP, _WIDTH, _HEIGHT, (1, longest), (0, 1), is_log=True)
        drawn += [svg.text(axes.left + _WIDTH / 2, 14, head, anchor="middle", class_="fg")]
        drawn += axes.grid("place of the singular value")
        drawn += _whole(axes, series) if place == 0 else _clusters(axes, series)
    drawn += _legend(series, 48.0, _TOP + _HEIGHT + 54)
    return svg.figure(48 + 2 * _WIDTH + 60 + 16, _TOP + _HEIGHT + 66, title, *drawn)


def _whole(axes: Axes, series: Sequence[Spectrum]) -> Iterator[str]:
    for s in series:
        if s.whole is not None and len(s.whole):
            yield axes.line(np.arange(1.0, len(s.whole) + 1), s.whole, s.hue, s.name, is_dashed=s.is_dashed)


def _clusters(axes: Axes, series: Sequence[Spectrum]) -> Iterator[str]:
    for s in series:
        if s.clusters is not None and s.clusters.shape[1]:
            places = np.arange(1.0, s.clusters.shape[1] + 1)
            yield axes.band(places, s.clusters[0], s.clusters[2], s.hue)
    for s in series:
        if s.clusters is not None and s.clusters.shape[1]:
            places = np.arange(1.0, s.clusters.shape[1] + 1)
            yield axes.line(places, s.clusters[1], s.hue, f"{s.name}: median", is_dashed=s.is_dashed)


def _legend(series: Sequence[Spectrum], x: float, y: float) -> Iterator[str]:
    for s in series:
        dashes = "5 4" if s.is_dashed else None
        colour = {"stroke": svg.HUES[s.hue], "class_": f"line-hue-{s.hue}"}
        yield svg.element(
            "line", x1=x, y1=y - 4, x2=x + 22, y2=y - 4, stroke_width=2.5, stroke_dasharray=dashes, **colour
        )
        yield svg.text(x + 28, y, s.name)
        x += 52 + 6.4 * len(s.name)
