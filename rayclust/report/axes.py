"""Axes of small drawings that stand side by side: scales, grids, lines and bands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from rayclust.arrays import FloatArray
from rayclust.report import svg
from rayclust.report.formats import number

POINTS = 160
"""A longer line is thinned to so many points, evenly along the axis as it is drawn."""


@dataclass(frozen=True)
class Axes:
    """A rectangle of a drawing with a scale on either side."""

    left: float
    top: float
    width: float
    height: float
    x_span: tuple[float, float]
    y_span: tuple[float, float]
    is_log: bool = False
    """Whether the horizontal scale is logarithmic; its span is then above 0."""

    def x(self, value: float) -> float:
        """Where a value lies from left to right."""
        low, high, value = (math.log(v) if self.is_log else v for v in (*self.x_span, value))
        return self.left + (value - low) / ((high - low) or 1.0) * self.width

    def y(self, value: float) -> float:
        """Where a value lies from top to bottom."""
        low, high = self.y_span
        return self.top + self.height - (value - low) / ((high - low) or 1.0) * self.height

    def grid(self, x_label: str, x_ticks: Sequence[float] | None = None) -> Iterator[Markup]:
        """Lines and numbers at round values of either side."""
        for tick in svg.ticks(*self.y_span, 6):
            if self.y_span[0] - 1e-9 <= tick <= self.y_span[1] + 1e-9:
                yield svg.rule(self.left, self.y(tick), self.left + self.width, self.y(tick))
                yield svg.text(self.left - 6, self.y(tick) + 4, number(tick, 4), anchor="end")
        for tick in self._x_ticks() if x_ticks is None else x_ticks:
            yield svg.text(self.x(tick), self.top + self.height + 16, number(tick), anchor="middle")
        middle = self.left + self.width / 2
        yield svg.text(middle, self.top + self.height + 33, x_label, anchor="middle")

    def line(self, xs: FloatArray, ys: FloatArray, hue: int, tip: str, *, is_dashed: bool = False) -> Markup:
        """A line through points, in a cluster's colour; values that are not finite are left out."""
        kept = [i for i in self._thinned(xs) if math.isfinite(ys[i])]
        return svg.element(
            "polyline",
            svg.element("title", tip),
            points=self._points(xs[kept], ys[kept]),
            fill="none",
            stroke_width=2,
            stroke_linejoin="round",
            stroke_linecap="round",
            stroke_dasharray="5 4" if is_dashed else None,
            stroke=svg.HUES[hue],
            class_=f"line-hue-{hue}",
        )

    def band(self, xs: FloatArray, lower: FloatArray, upper: FloatArray, hue: int) -> Markup:
        """The area between two lines."""
        kept = self._thinned(xs)
        there, back = self._points(xs[kept], upper[kept]), self._points(xs[kept][::-1], lower[kept][::-1])
        colour = {"fill": svg.HUES[hue], "class_": f"hue-{hue}"}
        return svg.element("polygon", points=f"{there} {back}", fill_opacity=0.16, stroke="none", **colour)

    def dot(self, x: float, y: float, hue: int, tip: str, radius: float = 3.5) -> Markup:
        """One point with a tooltip."""
        place = {"cx": self.x(x), "cy": self.y(y), "r": radius}
        return svg.element("circle", svg.element("title", tip), fill=svg.HUES[hue], class_=f"hue-{hue}", **place)

    def _points(self, xs: FloatArray, ys: FloatArray) -> str:
        pairs = zip(xs.tolist(), ys.tolist(), strict=True)
        return " ".join(f"{svg.coordinate(self.x(x))},{svg.coordinate(self.y(y))}" for x, y in pairs)

    def _thinned(self, xs: FloatArray) -> list[int]:
        if len(xs) <= POINTS:
            return list(range(len(xs)))
        places = np.array([self.x(float(value)) for value in xs])
        wanted = np.linspace(places[0], places[-1], POINTS)
        return sorted({int(i) for i in np.searchsorted(places, wanted).clip(0, len(xs) - 1)})

    def _x_ticks(self) -> list[float]:
        low, high = self.x_span
        if not self.is_log:
            return [tick for tick in svg.ticks(low, high, 5) if low <= tick <= high]
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [m * 10.0**p for p in powers for m in ((1, 2, 5) if high / low < 200 else (1, 3))]
        return [mark for mark in marks if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)]
