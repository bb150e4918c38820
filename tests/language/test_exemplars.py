from __future__ import annotations

import numpy as np
import pytest

from rayclust.errors import ShapeError
from rayclust.language.exemplars import TopRows, typicality


def filled(count: int, largest: bool, rows: np.ndarray, clusters: np.ndarray, scores: np.ndarray) -> TopRows:
    top = TopRows(count, largest=largest)
    top.update(rows, clusters, scores)
    return top


def test_worked_by_hand() -> None:
    rows, clusters = np.array([10, 11, 12, 13, 14, 15]), np.array([0, 0, 0, 2, -1, 2])
    scores = np.array([0.5, 0.9, 0.7, 0.1, 1.0, np.nan])
    best, worst = (filled(2, largest, rows, clusters, scores) for largest in (True, False))
    assert [best.of(k) for k in range(4)] == [[11, 12], [], [13], []]
    assert [worst.of(k) for k in range(3)] == [[10, 12], [], [13]]


def test_equal_scores_keep_the_smaller_rows() -> None:
    top = filled(2, True, np.array([9, 3, 7]), np.zeros(3, int), np.ones(3))
    assert top.of(0) == [3, 7]


@pytest.mark.parametrize("largest", [True, False])
def test_order_and_cut_of_blocks_do_not_matter(largest: bool) -> None:
    rng = np.random.default_rng(0)
    rows, clusters = np.arange(300), rng.integers(0, 7, 300)
    scores = rng.integers(0, 20, 300) / 20
    whole = filled(5, largest, rows, clusters, scores)
    order = rng.permutation(300)
    first, second = TopRows(5, largest=largest), TopRows(5, largest=largest)
    for part in np.array_split(order[:200], 9):
        first.update(rows[part], clusters[part], scores[part])
    second.update(rows[order[200:]], clusters[order[200:]], scores[order[200:]])
    first.merge(second)
    for cluster in range(7):
        mine = np.flatnonzero(clusters == cluster)
        slow = sorted(mine, key=lambda row: (-scores[row] if largest else scores[row], row))[:5]
        assert whole.of(cluster) == first.of(cluster) == slow


def test_nothing_is_kept_when_nothing_is_wanted() -> None:
    assert filled(0, True, np.arange(3), np.zeros(3, int), np.ones(3)).of(0) == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ShapeError, match="lengths 2, 3, 3"):
        TopRows(2).update(np.arange(2), np.zeros(3, int), np.zeros(3))


def test_typicality_is_the_cosine_with_the_prototype() -> None:
    prototypes = np.array([[2.0, 0.0], [0.0, 0.0]])
    rows = np.array([[3.0, 3.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [5.0, 0.0]])
    cosine = typicality(rows, np.array([0, 0, 0, 1, -1]), prototypes)
    assert cosine[:4] == pytest.approx([np.sqrt(0.5), -1, 0, 0])
    assert np.isnan(cosine[4])


def test_typicality_checks_its_shapes() -> None:
    with pytest.raises(ShapeError):
        typicality(np.zeros((2, 3)), np.zeros(2, int), np.zeros((1, 4)))
    with pytest.raises(ShapeError):
        typicality(np.zeros((2, 3)), np.array([0, 1]), np.zeros((1, 3)))
