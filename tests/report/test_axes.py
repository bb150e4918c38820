from __future__ import annotations

import numpy as np
import pytest

from rayclust.report import svg
from rayclust.report.axes import POINTS, Axes
from tests.report.test_figures import drawn, words

PLAIN = Axes(10, 20, 100, 50, (0, 4), (-1, 1))


def test_places_by_hand() -> None:
    assert [PLAIN.x(value) for value in (0, 1, 4)] == [10, 35, 110]
    assert [PLAIN.y(value) for value in (-1, 0, 1)] == [70, 45, 20]
    decades = Axes(0, 0, 90, 10, (1, 1000), (0, 1), is_log=True)
    assert [decades.x(value) for value in (1, 10, 1000)] == pytest.approx([0, 30, 90])


def test_grids_have_round_numbers_within_the_axes() -> None:
    assert words(drawn(svg.figure(1, 1, "t", *PLAIN.grid("k")))) == ["-1", "-0.5", "0", "0.5", "1", *"01234", "k"]
    decades = Axes(0, 0, 90, 10, (1, 1000), (0, 1), is_log=True)
    shown = words(drawn(svg.figure(1, 1, "t", *decades.grid("k"))))
    assert shown[-8:] == ["1", "3", "10", "30", "100", "300", "1,000", "k"]


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    axes = Axes(0, 0, 100, 100, (1, 5000), (0, 1), is_log=True)
    xs = np.arange(1.0, 5001)
    points = axes.line(xs, 1 / xs, 0, "t").split('points="')[1].split('"')[0].split()
    assert len(points) <= POINTS
    assert points[0] == "0,0"
    assert points[1] == f"{svg.coordinate(axes.x(2))},50"
    assert points[-1].startswith("100,")


def test_values_that_are_not_finite_are_left_out() -> None:
    line = PLAIN.line(np.arange(4.0), np.array([0.0, np.nan, np.inf, 1.0]), 0, "t")
    assert 'points="10,45 85,20"' in line


def test_a_band_runs_there_and_back() -> None:
    band = PLAIN.band(np.array([0.0, 4.0]), np.array([-1.0, -1.0]), np.array([1.0, 0.0]), 2)
    assert 'points="10,20 110,45 110,70 10,70"' in band
    assert svg.HUES[2] in band


def test_a_span_of_one_value_is_no_error() -> None:
    flat = Axes(0, 0, 10, 10, (2, 2), (3, 3))
    assert flat.x(2) == 0
    assert flat.y(3) == 10
