from __future__ import annotations

import numpy as np
import pytest

from rayclust.errors import ShapeError
from rayclust.report import svg
from rayclust.report.scatter import NAMED, SIDE, centers, hues, scatter
from tests.report.test_figures import HOSTILE, SVG, drawn, words


def places(text: str) -> list[list[tuple[float, float]]]:
    """Dots of each path."""
    return [
        [tuple(map(float, dot.removesuffix("h0").split())) for dot in node.attrib["d"].split("M")[1:]]  # type: ignore[misc]
        for node in drawn(text).iter(f"{SVG}path")
    ]


def test_dots_keep_their_shape_up_is_up_and_the_largest_cluster_is_first() -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    big, small = places(scatter(points, np.array([7, 4, 7]), {4: "cat", 7: "dog"}, title="t"))
    (left, bottom), (_, top) = big
    [(right, level)] = small
    assert level == bottom > top
    assert right - left == pytest.approx(2 * (bottom - top)) == pytest.approx(SIDE - 32)


def test_names_stand_at_the_centres_and_never_on_each_other() -> None:
    rng = np.random.default_rng(0)
    points, clusters = rng.random((2000, 2)), np.repeat(np.arange(100), 20)
    root = drawn(scatter(points, clusters, {k: f"a rather long name {k}" for k in range(100)}, title="t"))
    boxes = [(float(n.attrib["x"]), float(n.attrib["y"]), len(n.text or "") * 6.7) for n in root.iter(f"{SVG}text")]
    assert 5 < len(boxes) <= NAMED
    for i, (x, y, width) in enumerate(boxes):
        assert x - width / 2 >= 0
        assert x + width / 2 <= SIDE
        assert all(abs(y - v) >= 14.9 or abs(x - u) >= (width + other) / 2 - 0.02 for u, v, other in boxes[:i])
    apart = drawn(scatter(np.array([[0.0, 0.0], [9.0, 9.0]]), np.array([0, 1]), {0: "cat", 1: "dog"}, title="t"))
    assert words(apart) == ["cat", "dog"]


def test_a_small_clusters_name_stands_beside_its_dots() -> None:
    rng = np.random.default_rng(0)
    wide, tight = rng.random((200, 2)), np.array([3.0, 0.5]) + 1e-3 * rng.random((20, 2))
    text = scatter(np.vstack([wide, tight]), np.repeat([0, 1], [200, 20]), {0: "wide", 1: "tight"}, title="t")
    at = {node.text: float(node.attrib["y"]) for node in drawn(text).iter(f"{SVG}text")}
    dots = [np.array(dots)[:, 1] for dots in places(text)]
    assert dots[0].min() < at["wide"] < dots[0].max()
    assert at["tight"] < dots[1].min() - 5


def test_colours_repeat_as_far_away_as_can_be() -> None:
    count = len(svg.HUES)
    line = {k: np.array([float(k), 0.0]) for k in range(count + 1)}
    given = hues(line)
    assert [given[k] for k in range(count)] == list(range(count))
    assert given[count] == 0


def test_the_middle_is_the_median() -> None:
    points = np.array([[0.0, 0.0], [1.0, 2.0], [50.0, 3.0], [5.0, 5.0]])
    found = centers(points, np.array([3, 3, 3, 1]))
    assert list(found) == [3, 1]
    assert found[3].tolist() == [1, 2]


def test_three_thousand_dots_are_a_small_file() -> None:
    rng = np.random.default_rng(0)
    assert len(scatter(rng.random((3000, 2)), rng.integers(0, 1000, 3000), {}, title="t")) < 400_000


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_dots_and_hostile_names(count: int) -> None:
    names = dict(enumerate(HOSTILE))
    for hostile in HOSTILE:
        drawn(scatter(np.zeros((count, 2)), np.arange(count), names, title=hostile))


def test_as_many_clusters_as_points() -> None:
    with pytest.raises(ShapeError, match="1 clusters for 2 points"):
        scatter(np.zeros((2, 2)), np.zeros(1, int), {}, title="t")
