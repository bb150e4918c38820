from __future__ import annotations

import base64
import io
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from rayclust.errors import ShapeError
from rayclust.report import charts, svg
from rayclust.report.charts import NAMED, WIDTH, Criterion, Group, Spectrum
from tests.report.pages import box, chart, points, shapes, tips, words

# Histograms


def test_few_clusters_have_a_named_bar_each_largest_first() -> None:
    root = chart(charts.size_histogram([10, 30, 20], ["ship", "cat", "truck"]))
    assert words(root) == ["cat", "truck", "ship", "30", "20", "10"]
    widths = [right - left for left, _, right, _ in map(box, shapes(root, "path"))]
    assert widths == pytest.approx([widths[0], widths[0] * 2 / 3, widths[0] / 3], abs=0.02)
    assert tips(root) == ["cat: 30", "truck: 20", "ship: 10"]


@pytest.mark.parametrize(
    "sizes",
    [[7] * 40, list(range(40)), [0] * 40, list(range(100, 140)), [1, 10, 100, 1000] * 10, [3] * 50 + [10**7]],
)
def test_many_clusters_are_counted_by_size(sizes: list[int]) -> None:
    found = [
        re.fullmatch(r"([\d,]+)(?:–([\d,]+))?: ([\d,]+) clusters", tip)
        for tip in tips(chart(charts.size_histogram(sizes)))
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
    root = chart(charts.confidence_histogram([0, 5, 15, 80]))
    assert tips(root)[1:3] == ["25–50%: 5 images", "50–75%: 15 images"]
    assert words(root)[:7] == ["0%", "20%", "40%", "60%", "80%", "100%", "confidence of the assignment"]


# Flows


def test_bands_are_as_thick_as_their_counts_stacked_in_order_and_lead_where_they_say() -> None:
    flows = [charts.Flow(0, 0, 6, 1, url="#a"), charts.Flow(0, 1, 2, 1), charts.Flow(1, 0, 12, is_faint=True)]
    root = chart(charts.sankey(flows, ["x", "y"], ["u", "v"], "t"))
    assert sorted(words(root)) == ["u · 18", "v · 2", "x · 8", "y · 12"]
    found = {tip: path for path in shapes(root, "path") for tip in tips(path)}
    [link] = shapes(root, "a")
    assert link.attrib == {"href": "#a"}
    assert tips(link) == ["x → u: 6"]
    [first], second, third = shapes(link, "path"), found["x → v: 2"], found["y → u: 12"]
    # M start, C three points to the upper end, L lower end, C back: ends at both sides as (top, bottom).
    ends = [[float(y) for y in re.findall(r"[-\d.]+ ([-\d.]+)", band.attrib["d"])] for band in (first, second, third)]
    unit = 380 / 20
    for (start, *_, lower), count in zip(((e[0], e[7]) for e in ends), (6, 2, 12), strict=True):
        assert lower - start == pytest.approx(count * unit, abs=0.02)
    assert ends[1][0] == pytest.approx(ends[0][7], abs=0.02), "below each other at the left"
    assert ends[2][3] == pytest.approx(ends[0][4], abs=0.02), "and at the right"
    assert [band.attrib.get("class") for band in (first, second, third)] == ["hue-1", "hue-1", "muted"]
    assert float(third.attrib["opacity"]) < float(first.attrib["opacity"])
    assert chart(charts.sankey([], [], [], "t")).attrib["role"] == "img"


# Curves


def test_curves_leave_gaps_where_values_are_not_finite() -> None:
    root = chart(charts.curve({"loss": [3.0, 2.0, math.nan, 1.0, 1e200, 0.5, 0.4]}, "Loss"))
    [line] = [node for node in shapes(root, "path") if tips(node) == ["loss"]]
    stretches = re.findall(r"M[^M]*", line.attrib["d"])
    assert [stretch.count("L") for stretch in stretches] == [1, 0, 1]
    assert stretches[1].endswith("h0"), "a lone value is a dot"
    assert "epoch" in words(root)


def test_curves_run_left_to_right_and_higher_values_lie_higher() -> None:
    root = chart(charts.curve({"up": [0.0, 1.0]}, "t", "K", start=2, step=3))
    start, end = points(next(node for node in shapes(root, "path") if tips(node)))
    assert start[0] < end[0]
    assert start[1] > end[1]


def test_several_curves_have_a_legend_and_long_ones_are_thinned() -> None:
    root = chart(charts.curve({"a": list(range(10_000)), "b": [1.0] * 10_000}, "t"))
    assert words(root)[-2:] == ["a", "b"]
    lines = [points(node) for node in shapes(root, "path") if tips(node)]
    assert [len(line) for line in lines] == [401, 401]
    assert lines[0][-1][0] == WIDTH - charts._RIGHT


# Classes against clusters


def test_contingency_puts_the_clusters_of_a_class_on_its_diagonal() -> None:
    counts = np.array([[0, 5, 3], [8, 0, 0]])
    root = chart(charts.contingency(counts, ["ship", "cat"], ["x", "y", "z"]))
    assert tips(root) == ["ship in y: 5, 62.5%", "ship in z: 3, 37.5%", "cat in x: 8, 100.0%"]
    columns = [box(node)[0] for node in shapes(root, "path")]
    assert columns == sorted(columns)
    assert words(root)[:5] == ["y", "z", "x", "ship", "cat"]
    assert sorted(words(root)[5:]) == ["100", "38", "62"]


def test_names_and_numbers_must_match() -> None:
    with pytest.raises(ShapeError, match="3 class names for 2 rows"):
        charts.contingency(np.zeros((2, 2), dtype=int), ["a", "b", "c"], ["x", "y"])
    with pytest.raises(ShapeError, match="names for 2 sizes"):
        charts.size_histogram([1, 2], ["one"])
    with pytest.raises(ShapeError, match="1 clusters for 2 points"):
        charts.scatter(np.zeros((2, 2)), np.zeros(1, int), {}, title="t")
    with pytest.raises(ShapeError, match="width 3: 4 is needed"):
        charts.heatmap({"p": np.eye(3)}, GROUPS, ceiling=1, title="t")
    with pytest.raises(ShapeError, match="3 rows: 4 are needed"):
        charts.heatmap({"p": np.ones((3, 4))}, GROUPS, ceiling=1, title="t")


@pytest.mark.parametrize("size", [1, 12, 40])
def test_empty_classes_and_large_tables_are_drawn(size: int) -> None:
    counts = np.random.default_rng(0).integers(0, 2, (size, 30)) * np.random.default_rng(1).integers(0, 3, (size, 30))
    counts[0] = 0
    drawn = charts.contingency(counts, [f"c{i}" for i in range(size)], [str(i) for i in range(30)])
    assert len(tips(chart(drawn))) == np.count_nonzero(counts)


# Heat-maps

GROUPS = [Group("cat", 3, 0), Group("dog", 1, 1)]


def pictures(text: str) -> list[Image.Image]:
    sources = [node.attrib["href"] for node in shapes(chart(text), "image")]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def test_zero_is_clear_and_the_ceiling_and_all_above_have_the_full_colour() -> None:
    values = np.array([[0.0, 0.5], [1.0, np.nan]])
    matrix, scale = pictures(charts.heatmap({"p": values}, [Group("g", 2)], ceiling=0.5, title="t"))
    pixels = np.asarray(matrix.convert("RGBA"))
    assert pixels[..., 3].tolist() == [[0, 255], [255, 0]]
    assert (pixels[..., :3] == tuple(bytes.fromhex(svg.HEAT[1:]))).all()
    assert np.asarray(scale.convert("RGBA"))[0, :, 3].tolist() == list(range(0, 256, 17))


def test_rows_are_sorted_under_their_names_and_strips() -> None:
    root = chart(charts.heatmap({"|ZᵀZ|": np.eye(4)}, GROUPS, ceiling=0.7, title="Cosines"))
    assert words(root) == ["cat", "dog", "|ZᵀZ|", "0", "≥ 0.7"]
    strips = [node for node in shapes(root, "path") if tips(node)]
    assert [tips(node)[0] for node in strips] == ["cat: 3 rows", "dog: 1 rows"] * 2
    assert [node.attrib["class"] for node in strips] == ["hue-0", "hue-1"] * 2
    assert [bottom - top for _, top, _, bottom in map(box, strips[2:])] == pytest.approx([216, 72])
    names = [float(node.attrib["y"]) for node in shapes(root, "text")[:2]]
    middles = [(top + bottom) / 2 for _, top, _, bottom in map(box, strips[2:])]
    assert names == pytest.approx(middles, abs=6)
    [image, _] = shapes(root, "image")
    assert [float(image.attrib[side]) for side in ("width", "height")] == [288, 288]


def test_two_matrices_below_each_other_share_a_scale() -> None:
    panels = {"upper": np.eye(4), "lower": np.ones((4, 4))}
    text = charts.heatmap(panels, GROUPS, ceiling=1, title="t")
    assert words(chart(text)) == ["cat", "dog", "upper", "cat", "dog", "lower", "0", "≥ 1"]
    assert [picture.size for picture in pictures(text)] == [(4, 4), (4, 4), (charts.SHADES, 1)]


def test_names_that_would_touch_are_left_to_tooltips() -> None:
    groups = [Group(f"c{i}", 1, 0) for i in range(100)]
    shown = words(chart(charts.heatmap({"p": np.eye(100)}, groups, ceiling=1, title="t")))
    assert 18 <= len(shown) - 3 <= 23


def test_noise_of_four_hundred_rows_stays_a_small_file() -> None:
    noise = np.random.default_rng(0).random((400, 400))
    assert len(charts.heatmap({"p": noise}, [Group("g", 400)], ceiling=1, title="t")) < 120_000


# Maps


def dots(text: str) -> list[np.ndarray]:
    """Float[m 2] of each path."""
    return [np.array(points(node)) for node in shapes(chart(text), "path")]


def test_dots_keep_their_shape_up_is_up_and_the_largest_cluster_is_first() -> None:
    places = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    big, small = dots(charts.scatter(places, np.array([7, 4, 7]), {4: "cat", 7: "dog"}, title="t"))
    (left, bottom), (_, top) = big
    [(right, level)] = small
    assert level == bottom > top
    assert right - left == pytest.approx(2 * (bottom - top)) == pytest.approx(WIDTH - 32)


def test_names_stand_at_the_centres_and_never_on_each_other() -> None:
    rng = np.random.default_rng(0)
    places, clusters = rng.random((2000, 2)), np.repeat(np.arange(100), 20)
    root = chart(charts.scatter(places, clusters, {k: f"a rather long name {k}" for k in range(100)}, title="t"))
    names = [(float(n.attrib["x"]), float(n.attrib["y"]), len(n.text or "") * 6.7) for n in shapes(root, "text")]
    assert 5 < len(names) <= NAMED
    for i, (x, y, width) in enumerate(names):
        assert x - width / 2 >= 0
        assert x + width / 2 <= WIDTH
        assert all(abs(y - v) >= 14.9 or abs(x - u) >= (width + other) / 2 - 0.02 for u, v, other in names[:i])
    apart = chart(charts.scatter(np.array([[0.0, 0.0], [9.0, 9.0]]), np.array([0, 1]), {0: "cat", 1: "dog"}, title="t"))
    assert words(apart) == ["cat", "dog"]
    assert {node.attrib["class"] for node in shapes(apart, "text")} == {"fg halo"}


def test_a_small_clusters_name_stands_beside_its_dots() -> None:
    rng = np.random.default_rng(0)
    wide, tight = rng.random((200, 2)), np.array([3.0, 0.5]) + 1e-3 * rng.random((20, 2))
    text = charts.scatter(np.vstack([wide, tight]), np.repeat([0, 1], [200, 20]), {0: "wide", 1: "tight"}, title="t")
    at = {node.text: float(node.attrib["y"]) for node in shapes(chart(text), "text")}
    of_wide, of_tight = (places[:, 1] for places in dots(text))
    assert of_wide.min() < at["wide"] < of_wide.max()
    assert at["tight"] < of_tight.min() - 5


def test_colours_repeat_as_far_away_as_can_be() -> None:
    many = len(svg.HUES)
    given = charts.hues({k: np.array([float(k), 0.0]) for k in range(many + 1)})
    assert [given[k] for k in range(many)] == list(range(many))
    assert given[many] == 0
    assert charts.hues({}) == {}


def test_the_middle_is_the_median() -> None:
    places = np.array([[0.0, 0.0], [1.0, 2.0], [50.0, 3.0], [5.0, 5.0]])
    found = charts.centers(places, np.array([3, 3, 3, 1]))
    assert list(found) == [3, 1]
    assert found[3].tolist() == [1, 2]


def test_three_thousand_dots_are_a_small_file() -> None:
    rng = np.random.default_rng(0)
    text = charts.scatter(rng.random((3000, 2)), rng.integers(0, 300, 3000), {}, title="t")
    assert sum(map(len, dots(text))) == 3000
    assert len(text) < 120_000


# Singular values

FALLING = np.array([1.0, 0.5, 0.25])


def test_all_rows_above_and_clusters_with_a_band_below() -> None:
    series = [
        Spectrum("features", 0, FALLING, np.stack([0.5 * FALLING, FALLING, FALLING])),
        Spectrum("z", 1, FALLING**2, np.stack([FALLING] * 3)),
        Spectrum("k-means", 2, None, np.stack([FALLING] * 3), is_dashed=True),
    ]
    root = chart(charts.spectra(series, "t"))
    lines = [(tips(node)[0], "stroke-dasharray" in node.attrib) for node in shapes(root, "path") if tips(node)]
    assert lines == [
        ("features", False),
        ("z", False),
        ("features: median", False),
        ("z: median", False),
        ("k-means: median", True),
    ]
    assert sum(node.attrib["fill"] != "none" for node in shapes(root, "path")) == 3
    assert words(root)[-3:] == ["features", "z", "k-means"]
    assert {"all rows", "cluster by cluster"} <= set(words(root))


def test_long_lines_are_thinned_evenly_on_the_logarithmic_axis_and_keep_their_ends() -> None:
    root = chart(charts.spectra([Spectrum("a", 0, 1 / np.arange(1.0, 5001))], "t"))
    line = points(next(node for node in shapes(root, "path") if tips(node)))
    assert len(line) <= charts.LINE_POINTS
    assert line[0] == (48, 28)
    assert line[1] == pytest.approx((48 + 352 * math.log(2) / math.log(5000), 108), abs=0.01)
    assert line[-1][0] == 48 + 352 == WIDTH - 20
    assert words(root)[:8] == ["1", "3", "10", "30", "100", "300", "1,000", "3,000"]


# Criteria

LENGTH = Criterion("Coding length", {2: 9.0, 4: 3.0, 8: 5.0, 16: 6.0}, larger_is_better=False)
SILHOUETTE = Criterion("Silhouette", {2: 0.1, 4: 0.3, 8: 0.5, 16: math.nan}, larger_is_better=True, spread={4: 0.1})


def of_candidates(text: str) -> list[str]:
    return [tip for tip in tips(chart(text)) if "clusters:" in tip]


def test_the_best_of_each_criterion_is_told() -> None:
    text = charts.criteria([LENGTH, SILHOUETTE], 4, "t")
    assert of_candidates(text) == [
        "2 clusters: 9",
        "4 clusters: 3, the best",
        "8 clusters: 5",
        "16 clusters: 6",
        "2 clusters: 0.1",
        "4 clusters: 0.3",
        "8 clusters: 0.5, the best",
    ]
    assert sum(node.attrib["fill"] != "none" for node in shapes(chart(text), "path")) == 1, "one band"
    assert {"Coding length", "Silhouette"} <= set(words(chart(text)))


def test_the_chosen_number_has_a_line_in_every_panel() -> None:
    def marked(chosen: int | None) -> int:
        return tips(chart(charts.criteria([LENGTH, SILHOUETTE], chosen, "t"))).count("chosen")

    assert [marked(4), marked(None), marked(99)] == [2, 0, 0]


def test_ties_go_to_fewer_clusters_and_some_criteria_have_no_best() -> None:
    tied = Criterion("a", {3: 1.0, 2: 1.0}, larger_is_better=True)
    open_ = Criterion("b", {2: 1.0, 3: 2.0}, knee=3)
    assert of_candidates(charts.criteria([tied, open_], 2, "t")) == [
        "2 clusters: 1, the best",
        "3 clusters: 1",
        "2 clusters: 1",
        "3 clusters: 2, the knee",
    ]


# All of them


def test_nothing_at_all_is_drawn_without_error() -> None:
    for text in (
        charts.size_histogram([]),
        charts.confidence_histogram([]),
        charts.curve({}, "t"),
        charts.curve({"a": []}, "t"),
        charts.curve({"a": [math.nan]}, "t"),
        charts.curve({"a": [2.0]}, "t"),
        charts.contingency(np.zeros((0, 0), dtype=int), [], []),
        charts.scatter(np.zeros((0, 2)), np.arange(0), {}, title="t"),
        charts.scatter(np.zeros((2, 2)), np.arange(2), {}, title="t"),
        charts.spectra([], "t"),
        charts.spectra([Spectrum("a", 0, np.zeros(0), np.zeros((3, 0)))], "t"),
        charts.criteria([Criterion("a", {5: 1.0}, True)], 5, "t"),
        charts.criteria([Criterion("a", {5: math.nan}, True)], 5, "t"),
        charts.criteria([], None, "t"),
    ):
        chart(text)
