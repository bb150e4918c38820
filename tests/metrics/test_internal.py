from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

from rayclust.clustering.spectral import partition
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.metrics import internal
from rayclust.metrics.internal import (
    coding_length,
    map_equation,
    measure,
    modularity,
    neighbor_agreement,
    silhouette,
    size_summary,
    stability,
)
from rayclust.metrics.selection import choose
from rayclust.search.knn import top_k
from rayclust.settings import SpectralOptions
from tests.references import coding_length as plain_coding_length

PAIRS = np.array([[1], [0], [3], [2]])
"""Neighbours of four rows in two pairs that only know each other."""


def planted(count: int = 300, clusters: int = 5, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(clusters, size=count)
    return rng.normal(size=(clusters, width))[labels] + 0.5 * rng.normal(size=(count, width)), labels


def unit_rows(count: int, width: int, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows and labels, both at random."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, width))
    return z / np.linalg.norm(z, axis=1, keepdims=True), rng.integers(clusters, size=count)


# Silhouette


def test_silhouette_by_hand():
    # Two rows on one axis, two on the other: a = 0, b = 1.
    x = np.array([[1.0, 0], [3, 0], [0, 1], [0, 2]])
    assert silhouette(x, np.array([0, 0, 1, 1])) == pytest.approx(1.0)
    assert silhouette(x, np.array([0, 1, 0, 1])) == pytest.approx(-0.5)  # a = 1, b = ½


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_silhouette_agrees_with_scikit_learn(offset: float):
    x, labels = planted()
    labels = np.where(np.arange(300) == 17, 99, labels)  # one row alone
    expected = silhouette_score(x + offset, labels, metric="cosine")
    assert silhouette(x + offset, labels) == pytest.approx(expected, abs=1e-6)


def test_silhouette_knows_no_names_and_no_order():
    x, labels = planted()
    order = np.random.default_rng(1).permutation(len(x))
    value = silhouette(x, labels)
    assert silhouette(x, np.array([7, -3, 100, 0, 2])[labels]) == pytest.approx(value, abs=1e-12)
    assert silhouette(x[order], labels[order]) == pytest.approx(value, abs=1e-9)


def test_silhouette_of_a_sample_is_seeded_and_near_the_whole():
    x, labels = planted(3000)
    value = silhouette(x, labels, rows=1000, seed=3)
    assert silhouette(x, labels, rows=1000, seed=3) == value
    assert value == pytest.approx(silhouette(x, labels), abs=0.03)
    assert silhouette(x, labels, rows=5000) == silhouette(x, labels)


def test_silhouette_of_equal_rows_is_zero():
    assert silhouette(np.ones((4, 2)), np.array([0, 0, 1, 1])) == pytest.approx(0.0, abs=1e-9)


# Sizes


def test_sizes_by_hand():
    assert size_summary(np.array([0, 0, 1, 1]), 2) == {
        "occupied": 2, "smallest": 2, "median": 2.0, "largest": 2, "entropy": pytest.approx(1.0)
    }  # fmt: skip
    one = size_summary(np.array([2, 2, 2]), 4)
    assert one == {"occupied": 1, "smallest": 0, "median": 0.0, "largest": 3, "entropy": 0.0}
    assert size_summary(np.array([0, 0]), 1)["entropy"] == 0.0


# The neighbour graph


def test_pairs_by_hand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(internal, "_ROWS_AT_ONCE", 3)
    labels = np.array([0, 0, 1, 1])
    neighbors = np.array([[1, 2], [0, 3], [3, -1], [2, 0]])
    assert neighbor_agreement(labels, neighbors) == pytest.approx(4 / 7)
    assert modularity(labels, neighbors) == pytest.approx(4 / 7 - 1 / 2)
    assert modularity(np.zeros(4, int), neighbors) == 0.0
    assert neighbor_agreement(np.zeros(4, int), neighbors) == 1.0


def test_map_equation_by_hand():
    # Each row is visited ¼ of the time, and 1 bit tells which of its pair it is.
    assert map_equation(np.array([0, 0, 1, 1]), PAIRS) == pytest.approx(np.log(2))
    assert map_equation(np.zeros(4, int), PAIRS) == pytest.approx(np.log(4))
    # q_i = ½, p_i = ½: 1 ln 1 − 2 · 2 · ½ ln ½ − 4 · ¼ ln ¼ + 2 · 1 ln 1.
    assert map_equation(np.array([0, 1, 0, 1]), PAIRS) == pytest.approx(2 * np.log(2) + np.log(4))


def test_missing_neighbours_are_no_steps():
    padded = np.concatenate([PAIRS, np.full((4, 2), -1)], axis=1)
    labels = np.array([5, 5, 9, 5])
    assert map_equation(labels, padded) == pytest.approx(map_equation(labels, PAIRS))


def test_stability_by_hand():
    # Partitions that cross each other keep no pair where 2 · 2 of 6 are chance: ARI (0 − 2/3) / (2 − 2/3) = −½.
    a = np.array([0, 0, 1, 1])
    assert stability([a, 1 - a]) == 1.0
    assert stability([a, a, np.array([0, 1, 0, 1])]) == pytest.approx((1 - 0.5 - 0.5) / 3)


# Coding length


def two_lines() -> tuple[np.ndarray, np.ndarray]:
    """Twenty times each of two basis vectors of eight."""
    labels = np.repeat([0, 1], 20)
    return np.eye(8)[labels], labels


def test_coding_length_of_two_orthogonal_lines_by_hand():
    z, labels = two_lines()
    # d / (ε² m) · 20 = 80: each line is one eigenvalue of 81, and its 20 ids of two take ln 2 each.
    assert coding_length(z[:20], labels[:20]) == pytest.approx(28 / 2 * np.log(81))
    assert coding_length(z, labels) == pytest.approx(2 * (14 * np.log(81) + 20 * np.log(2)))
    assert coding_length(z, labels) == pytest.approx(150.770, abs=5e-4)
    # Together: two eigenvalues of 1 + 8 / (0.1 · 40) · 20 = 41.
    assert coding_length(z, np.zeros(40, int)) == pytest.approx(24 * 2 * np.log(41))
    assert coding_length(z, np.zeros(40, int)) == pytest.approx(178.251, abs=5e-4)


def test_splitting_a_line_costs():
    z, labels = two_lines()
    split = labels.copy()
    split[:10] = 2
    assert coding_length(z, split) > coding_length(z, labels)


@pytest.mark.parametrize(("count", "width", "clusters"), [(60, 7, 3), (60, 40, 5), (17, 30, 17)])
def test_coding_length_is_the_plain_form(count: int, width: int, clusters: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(internal, "_ROWS_AT_ONCE", 9)
    z, labels = unit_rows(count, width, clusters)
    for distortion in (0.1, 0.5):
        expected = plain_coding_length(z, labels, distortion)
        assert coding_length(z, labels, distortion) == pytest.approx(expected, rel=1e-10)
    assert coding_length(z[:0], labels[:0]) == 0.0


@pytest.mark.parametrize("seed", range(0, 10, 3))
def test_planted_subspaces_give_their_number(seed: int):
    clusters, rng = 2 + seed, np.random.default_rng(seed)
    truth = np.repeat(np.arange(clusters), 40)
    bases = np.linalg.qr(rng.normal(size=(48, 2 * clusters)))[0].reshape(48, clusters, 2)
    z = np.einsum("nr,dnr->nd", rng.normal(size=(len(truth), 2)), bases[:, truth])
    z = z / np.linalg.norm(z, axis=1, keepdims=True) + 0.1 * rng.normal(size=z.shape) / 48**0.5
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    found = partition(lambda: [torch.from_numpy(z)], 12, SpectralOptions(temperature=0.1, restarts=5), seed)
    candidates = {k: {"coding_length": coding_length(z, found.labels(k).numpy())} for k in range(2, 13)}
    assert choose(candidates, "coding_length").k == clusters


def test_coding_length_knows_no_names_no_order_and_no_rotation():
    z, labels = unit_rows(80, 9, 4)
    order = np.random.default_rng(1).permutation(80)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(9, 9)))
    value = coding_length(z, labels)
    assert coding_length(z[order], np.array([9, -4, 2, 70])[labels[order]]) == pytest.approx(value, rel=1e-12)
    assert coding_length(z @ turn, labels) == pytest.approx(value, rel=1e-12)
    assert coding_length(z.astype(np.float16), labels) == pytest.approx(value, rel=1e-3)  # widened


# All criteria of a candidate


def test_each_criterion_is_its_own_function():
    x, labels = planted(200, 4, 8)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    rows, ids = torch.from_numpy(x), torch.arange(200)
    neighbors = top_k(rows, rows, 5, query_ids=ids, database_ids=ids)[0].numpy()
    other = np.random.default_rng(1).integers(4, size=200)
    found = measure(x, [labels, other], neighbors, silhouette_rows=100, seed=3)
    assert found["coding_length"] == pytest.approx(coding_length(x, labels) / 200)
    assert found["silhouette"] == silhouette(x, labels, rows=100, seed=3)
    assert found["calinski_harabasz"] == pytest.approx(calinski_harabasz_score(x, labels), rel=1e-5)
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin_score(x, labels), rel=1e-5)
    assert found["neighbor_agreement"] == neighbor_agreement(labels, neighbors)
    assert found["modularity"] == modularity(labels, neighbors)
    assert found["map_equation"] == map_equation(labels, neighbors)
    assert "near_modularity" not in found
    assert found["stability"] == stability([labels, other])
    assert found["occupied"] == 4


def test_variances_by_hand():
    # Means 1 and 11 of a whole mean of 6: B = 4 · 25, W = 4, K − 1 = 1, N − K = 2.
    found = measure(np.array([[0.0], [2], [10], [12]]), [np.array([0, 0, 1, 1])], None)
    assert found["calinski_harabasz"] == pytest.approx(100 / 1 / (4 / 2))
    assert found["davies_bouldin"] == pytest.approx((1 + 1) / 10)


def test_half_precision_rows_are_widened():
    x, labels = planted()
    half = x.astype(np.float16)
    assert measure(half, [labels], None) == measure(half.astype(np.float64), [labels], None)


def test_what_cannot_be_measured_is_left_out():
    x, _ = planted(200)
    found = measure(x, [np.zeros(200, int)], None)
    assert set(found) == {"coding_length", "occupied", "smallest", "median", "largest", "entropy"}


def test_a_sample_within_one_cluster_has_no_silhouette():
    x, _ = planted(200)
    labels = (np.arange(200) == 0).astype(int)
    assert measure(x, [labels], None, silhouette_rows=5)["silhouette"] == 0.0


def test_refuse_what_cannot_be():
    x, labels = planted()
    with pytest.raises(DataError, match="1 cluster among 300 rows"):
        silhouette(x, np.zeros(300, int))
    with pytest.raises(DataError, match="stability: 1 partition"):
        stability([labels])
    with pytest.raises(DataError, match="partitions = 0"):
        measure(x, [], None)
    with pytest.raises(ConfigError, match="distortion = 0: must be above 0"):
        coding_length(x, labels, 0)
    for measured in (silhouette, coding_length):
        with pytest.raises(ShapeError, match="one label for each of 300 rows"):
            measured(x, labels[:-1])
        with pytest.raises(ShapeError, match="two axes"):
            measured(x[:, 0], labels)
    for measured in (neighbor_agreement, modularity, map_equation):
        with pytest.raises(ShapeError, match="one label for each of 300 rows"):
            measured(labels[:-1], np.zeros((300, 2), int))


def test_prediction_strength_by_hand():
    """Of 000111 the worst cluster keeps 1 of 3 pairs in 001111, of that one's 3 of 6."""
    a, b = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    assert internal.prediction_strength([a, b]) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert internal.prediction_strength([a, 1 - a]) == 1
    assert internal.prediction_strength([np.arange(4), np.arange(4)]) == 0
    with pytest.raises(DataError, match="at least 2 are needed"):
        internal.prediction_strength([a])


def test_split_clusters_merge_again_and_separate_ones_do_not():
    cliques = np.array([[j for j in range(4) if j != i] for i in range(4)])
    graph = np.concatenate([cliques, 4 + cliques, 8 + cliques])
    halves = np.arange(12) // 2
    assert internal.merged_clusters(halves, graph) == 3
    assert internal.merged_clusters(np.arange(12) // 4, graph) == 3
    assert internal.merged_clusters(np.random.default_rng(0).permutation(6)[halves], graph) == 3
    assert internal.merged_clusters(np.zeros(12, int), graph) == 1
    assert internal.merged_clusters(np.arange(4), PAIRS) == 2


def test_rows_that_subsamples_join_are_near_by_hand():
    """Rows 0, 1 and 2, 3 come together in both partitions, but for row 1, which the second puts with 2 and 3."""
    partitions = np.array([[0, 0, 1, 1, -1], [5, 7, 7, 7, 7]])
    labels = np.array([0, 0, 1, 1, 1])
    # Row 0: 1/2 to its own, 1 to each other; row 1: 1/2 to its own, (1/2 + 1/2 + 0) / 3 to the others.
    first = np.mean([(1 - 1 / 2) / 1, (1 / 3 - 1 / 2) / (1 / 2)])
    # Rows 2 and 3: 0 to each other and to row 4, (1 + 1/2) / 2 to the others; row 4: 0, and (1 + 0) / 2.
    assert internal.coclustering_silhouettes(partitions, labels) == pytest.approx([first, 1.0])


def test_the_silhouette_in_a_umap(monkeypatch: pytest.MonkeyPatch):
    """With a stand-in that keeps the first dimensions: those of two pairs of points, 3-4-5 apart."""

    class Leading:
        def __init__(self, n_components: int, **options: object) -> None:
            self.n_components = n_components

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, : self.n_components]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Leading))
    x = np.array([[0.0, 0.0, 9.0], [0.0, 4.0, 1.0], [3.0, 0.0, 7.0], [3.0, 4.0, 2.0]])
    assert internal.umap_silhouette(x, np.array([0, 0, 1, 1])) == pytest.approx((4.0 - 4.0) / 4.0)
    assert internal.umap_silhouette(x, np.array([0, 1, 0, 1])) == pytest.approx((4.5 - 3.0) / 4.5)
    with pytest.raises(DataError, match="at least 2"):
        internal.umap_silhouette(x, np.zeros(4, int))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match="rayclust\\[umap\\]"):
        internal.umap_silhouette(x, np.array([0, 0, 1, 1]))
