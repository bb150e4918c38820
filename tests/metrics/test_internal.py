from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from rayclust.errors import DataError, ShapeError
from rayclust.metrics import internal
from rayclust.metrics.internal import silhouette, size_summary


def planted(count: int = 300, clusters: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(clusters, size=count)
    return (rng.normal(size=(clusters, 6))[labels] + 0.5 * rng.normal(size=(count, 6))).astype(np.float32), labels


def test_worked_by_hand_on_a_line():
    # 0 and 1 against 4: a = 1 for both, b = 4 and 3; the row alone counts 0.
    x = np.array([[0.0], [1.0], [4.0]])
    assert silhouette(x, np.array([0, 0, 1]), metric="euclidean") == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)


def test_worked_by_hand_on_a_circle():
    # Two rows on one axis, two on the other: a = 0, b = 1.
    x = np.array([[1.0, 0], [3, 0], [0, 1], [0, 2]])
    assert silhouette(x, np.array([0, 0, 1, 1])) == pytest.approx(1.0)
    assert silhouette(x, np.array([0, 1, 0, 1])) == pytest.approx(-0.5)  # a = 1, b = ½


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_agrees_with_scikit_learn(metric, offset: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(internal, "_DISTANCES_AT_ONCE", 7000)
    x, labels = planted()
    labels = np.where(np.arange(300) == 17, 99, labels)  # one row alone
    x = x.astype(np.float64) + offset
    assert silhouette(x, labels, metric=metric) == pytest.approx(silhouette_score(x, labels, metric=metric), abs=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_names_and_order_play_no_part(metric):
    x, labels = planted()
    order = np.random.default_rng(1).permutation(len(x))
    value = silhouette(x, labels, metric=metric)
    assert silhouette(x, np.array([7, -3, 100, 0, 2])[labels], metric=metric) == pytest.approx(value, abs=1e-12)
    assert silhouette(x[order], labels[order], metric=metric) == pytest.approx(value, abs=1e-9)


def test_sample_is_seeded_and_near_the_whole():
    x, labels = planted(3000)
    value = silhouette(x, labels, rows=1000, seed=3)
    assert silhouette(x, labels, rows=1000, seed=3) == value
    assert value == pytest.approx(silhouette(x, labels), abs=0.03)
    assert silhouette(x, labels, rows=5000) == silhouette(x, labels)


def test_equal_rows_count_zero():
    x = np.ones((4, 2))
    for metric in ("cosine", "euclidean"):
        assert silhouette(x, np.array([0, 0, 1, 1]), metric=metric) == pytest.approx(0.0, abs=1e-9)


def test_sizes_worked_by_hand():
    assert size_summary(np.array([0, 0, 1, 1]), 2) == {
        "occupied": 2, "smallest": 2, "median": 2.0, "largest": 2, "entropy": pytest.approx(1.0)
    }  # fmt: skip
    one = size_summary(np.array([2, 2, 2]), 4)
    assert one == {"occupied": 1, "smallest": 0, "median": 0.0, "largest": 3, "entropy": 0.0}
    assert size_summary(np.array([0, 0]), 1)["entropy"] == 0.0


def test_refuses_what_cannot_be():
    x, labels = planted()
    with pytest.raises(DataError, match="1 cluster among 300 rows"):
        silhouette(x, np.zeros(300, int))
    with pytest.raises(ShapeError, match="one label for each of 300 rows"):
        silhouette(x, labels[:-1])
    with pytest.raises(ShapeError, match="two axes"):
        silhouette(x[:, 0], labels)
