from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from rayclust.errors import DataError, ShapeError
from rayclust.metrics import partition
from rayclust.metrics.partition import (
    calinski_harabasz,
    davies_bouldin,
    map_equation,
    modularity,
    neighbor_agreement,
    stability,
)


def planted(count: int = 300, clusters: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(clusters, size=count)
    return rng.normal(size=(clusters, 6))[labels] + 0.7 * rng.normal(size=(count, 6)), labels


def test_variances_by_hand():
    # Means 1 and 11 of a whole mean of 6: B = 4 · 25, W = 4, K − 1 = 1, N − K = 2.
    x, labels = np.array([[0.0], [2], [10], [12]]), np.array([0, 0, 1, 1])
    assert calinski_harabasz(x, labels) == pytest.approx(100 / 1 / (4 / 2))
    assert davies_bouldin(x, labels) == pytest.approx((1 + 1) / 10)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_agree_with_scikit_learn(offset: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(partition, "_ROWS_AT_ONCE", 41)
    x, labels = planted()
    labels = np.where(np.arange(300) == 17, 99, labels)  # one row alone
    for given in (labels, np.random.default_rng(1).integers(7, size=300)):
        assert calinski_harabasz(x + offset, given) == pytest.approx(calinski_harabasz_score(x, given), rel=1e-9)
        assert davies_bouldin(x + offset, given) == pytest.approx(davies_bouldin_score(x, given), rel=1e-9)


def test_rows_on_their_centres():
    x, labels = np.repeat(np.eye(2), 3, axis=0), np.repeat([4, 9], 3)
    assert calinski_harabasz(x, labels) == calinski_harabasz_score(x, labels) == 1.0
    assert davies_bouldin(x, labels) == davies_bouldin_score(x, labels) == 0.0


def test_pairs_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(partition, "_ROWS_AT_ONCE", 3)
    labels = np.array([0, 0, 1, 1])
    neighbors = np.array([[1, 2], [0, 3], [3, -1], [2, 0]])
    assert neighbor_agreement(labels, neighbors) == pytest.approx(4 / 7)
    assert modularity(labels, neighbors) == pytest.approx(4 / 7 - 1 / 2)
    assert modularity(np.zeros(4, int), neighbors) == 0.0
    assert neighbor_agreement(np.zeros(4, int), neighbors) == 1.0


def test_the_map_equation_by_hand():
    # Two pairs that only know each other: each row is visited ¼ of the time, and 1 bit tells which of the two it is.
    neighbors = np.array([[1], [0], [3], [2]])
    assert map_equation(np.array([0, 0, 1, 1]), neighbors) == pytest.approx(np.log(2))
    assert map_equation(np.zeros(4, int), neighbors) == pytest.approx(np.log(4))
    crossed = map_equation(np.array([0, 1, 0, 1]), neighbors)
    # q_i = ½, p_i = ½: 1 ln 1 − 2 · 2 · ½ ln ½ − 4 · ¼ ln ¼ + 2 · 1 ln 1.
    assert crossed == pytest.approx(2 * np.log(2) + np.log(4))


def test_missing_neighbours_are_no_steps():
    whole = np.array([[1], [0], [3], [2]])
    padded = np.concatenate([whole, np.full((4, 2), -1)], axis=1)
    labels = np.array([5, 5, 9, 5])
    assert map_equation(labels, padded) == pytest.approx(map_equation(labels, whole))


def test_stability_by_hand():
    # Partitions that cross each other keep no pair where 2 · 2 of 6 are chance: ARI (0 − 2/3) / (2 − 2/3) = −½.
    a = np.array([0, 0, 1, 1])
    assert stability([a, 1 - a]) == 1.0
    assert stability([a, a, np.array([0, 1, 0, 1])]) == pytest.approx((1 - 0.5 - 0.5) / 3)


def test_refuse_what_cannot_be():
    x, labels = planted()
    with pytest.raises(DataError, match="1 clusters of 300 rows: from 2 to 299"):
        calinski_harabasz(x, np.zeros(300, int))
    with pytest.raises(DataError, match="300 clusters of 300 rows"):
        davies_bouldin(x, np.arange(300))
    with pytest.raises(ShapeError, match="one label for each of 300 rows"):
        calinski_harabasz(x, labels[:-1])
    with pytest.raises(ShapeError, match="one label for each of 300 rows"):
        neighbor_agreement(labels[:-1], np.zeros((300, 2), int))
    with pytest.raises(DataError, match="stability: 1 partition"):
        stability([labels])
