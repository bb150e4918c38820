from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from rayclust.errors import ShapeError
from rayclust.report import figures

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ['<script>alert("1")</script>', "a & b", "\x00\ud800", "שלום‮", "👩‍👩‍👧"]


def drawn(text: str) -> ET.Element:
    text.encode()
    root = ET.fromstring(text)  # noqa: S314 - our own text
    numbers = [float(n) for name in ("x", "y", "width", "height") for n in re.findall(rf' {name}="([^"]+)"', text)]
    assert all(math.isfinite(n) for n in numbers)
    return root


def words(root: ET.Element) -> list[str]:
    return [node.text or "" for node in root.iter(f"{SVG}text")]


def tips(root: ET.Element) -> list[str]:
    return [node.text or "" for shape in ("rect", "polyline") for n in root.iter(SVG + shape) for node in n]


def test_few_clusters_have_a_named_bar_each_largest_first() -> None:
    root = drawn(figures.size_histogram([10, 30, 20], ["ship", "cat", "truck"]))
    assert words(root) == ["cat", "30", "truck", "20", "ship", "10"]
    widths = [float(rect.attrib["width"]) for rect in root.iter(f"{SVG}rect")]
    assert widths == pytest.approx([widths[0], widths[0] * 2 / 3, widths[0] / 3], abs=0.02)


@pytest.mark.parametrize(
    "sizes",
    [[7] * 40, list(range(40)), [0] * 40, list(range(100, 140)), [1, 10, 100, 1000] * 10, [3] * 50 + [10**7]],
)
def test_many_clusters_are_counted_by_size(sizes: list[int]) -> None:
    found = [
        re.fullmatch(r"([\d,]+)(?:–([\d,]+))?: ([\d,]+) clusters", tip)
        for tip in tips(drawn(figures.size_histogram(sizes)))
    ]
    ranges = []
    for match in found:
        assert match is not None
        low, high, count = (int(part.replace(",", "")) if part else None for part in match.groups())
        ranges.append((low, high if high is not None else low, count))
    assert all(before[1] + 1 == after[0] for before, after in pairwise(ranges))
    assert [count for *_, count in ranges] == [sum(low <= size <= high for size in sizes) for low, high, _ in ranges]
    assert sum(count for *_, count in ranges) == len(sizes)


def test_confidence_histogram_names_its_bins() -> None:
    root = drawn(figures.confidence_histogram([0, 5, 15, 80]))
    assert tips(root)[1:3] == ["25–50%: 5 images", "50–75%: 15 images"]
    assert words(root)[-7:-1] == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_curves_leave_gaps_where_values_are_not_finite() -> None:
    root = drawn(figures.curve({"loss": [3.0, 2.0, math.nan, 1.0, 1e200, 0.5, 0.4]}, "Loss"))
    lines = [node.attrib["points"].split() for node in root.iter(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [2, 2, 2]
    assert lines[1][0] == lines[1][1]  # a lone value is a dot
    assert words(root)[-1] == "epoch"


def test_curves_run_left_to_right_and_higher_values_lie_higher() -> None:
    root = drawn(figures.curve({"up": [0.0, 1.0]}, "t", "K", start=2, step=3))
    (start, end) = (tuple(map(float, p.split(","))) for p in next(root.iter(f"{SVG}polyline")).attrib["points"].split())
    assert start[0] < end[0]
    assert start[1] > end[1]


def test_several_curves_have_a_legend_and_long_ones_are_thinned() -> None:
    root = drawn(figures.curve({"a": list(range(10_000)), "b": [1.0] * 10_000}, "t"))
    assert words(root)[-2:] == ["a", "b"]
    points = [node.attrib["points"].split() for node in root.iter(f"{SVG}polyline")]
    assert [len(p) for p in points] == [401, 401]
    assert float(points[0][-1].split(",")[0]) == figures.WIDTH - figures._RIGHT


def test_contingency_puts_the_clusters_of_a_class_on_its_diagonal() -> None:
    counts = np.array([[0, 5, 3], [8, 0, 0]])
    root = drawn(figures.contingency(counts, ["ship", "cat"], ["x", "y", "z"]))
    assert tips(root) == ["ship in y: 5, 62.5%", "ship in z: 3, 37.5%", "cat in x: 8, 100.0%"]
    columns = [float(rect.attrib["x"]) for rect in root.iter(f"{SVG}rect")]
    assert columns == sorted(columns)
    assert words(root)[-3:] == ["y", "z", "x"]


def test_contingency_checks_its_names() -> None:
    with pytest.raises(ShapeError, match="3 class names for 2 rows"):
        figures.contingency(np.zeros((2, 2), dtype=int), ["a", "b", "c"], ["x", "y"])
    with pytest.raises(ShapeError, match="names for 2 sizes"):
        figures.size_histogram([1, 2], ["one"])


@pytest.mark.parametrize("size", [1, 12, 60])
def test_empty_classes_and_large_tables_are_drawn(size: int) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (size, 100))
    counts[0] = 0
    drawn(figures.contingency(counts, [f"c{i}" for i in range(size)], [str(i) for i in range(100)]))


def test_nothing_at_all_is_drawn_without_error() -> None:
    for text in (
        figures.size_histogram([]),
        figures.confidence_histogram([]),
        figures.curve({}, "t"),
        figures.curve({"a": []}, "t"),
        figures.curve({"a": [math.nan]}, "t"),
        figures.curve({"a": [2.0]}, "t"),
        figures.contingency(np.zeros((0, 0), dtype=int), [], []),
    ):
        drawn(text)


def test_hostile_strings_stay_text() -> None:
    many = len(HOSTILE)
    for text in (
        figures.size_histogram(list(range(many)), HOSTILE),
        figures.curve({name: [1.0, 2.0] for name in HOSTILE}, HOSTILE[0], HOSTILE[0]),
        figures.contingency(np.eye(many, dtype=int), HOSTILE, HOSTILE),
    ):
        assert {node.tag.removeprefix(SVG) for node in drawn(text).iter()} <= {
            "svg", "title", "text", "rect", "line", "polyline", "g"
        }  # fmt: skip


def test_the_same_numbers_give_the_same_text() -> None:
    series = {"a": np.random.default_rng(0).normal(size=50).tolist()}
    assert figures.curve(series, "t") == figures.curve(dict(series), "t")
