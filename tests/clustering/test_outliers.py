from __future__ import annotations

import numpy as np
import pytest

from rayclust.clustering.outliers import distance_ratios, knn_distances, oddest, prune, robust_z


def test_three_near_rows_and_one_apart():
    angles = np.deg2rad([0, 1, 2, 90])
    cosine = np.cos(angles[:, None] - angles)
    np.fill_diagonal(cosine, -2)
    neighbors = np.argsort(-cosine, axis=1, kind="stable")[:, :2]
    d = knn_distances(np.take_along_axis(cosine, neighbors, axis=1))
    np.testing.assert_allclose(d, [3.807e-4, 1.523e-4, 3.807e-4, 0.973824], rtol=1e-3)
    ratio = distance_ratios(d, d, neighbors)
    np.testing.assert_allclose(ratio, [1.42855, 0.40002, 1.42855, 3653.8], rtol=1e-4)
    for share, wanted in ((0.25, [False, False, False, True]), (0.5, [True, False, False, True])):
        rank, flagged = oddest(d, d, share)
        np.testing.assert_allclose(rank, [0.625, 0.25, 0.625, 1.0])
        assert flagged.tolist() == wanted


def test_identical_neighbours_do_not_count():
    counted = np.array([[False, True], [False, False]])
    d = knn_distances(np.array([[1.0, 0.5], [1.0, 1.0]], np.float16), counted)
    assert d[0] == 0.5
    assert np.isnan(d[1])
    assert oddest(d, np.array([0.0, 0.0]), 0.5)[0].argmax() == 0


def test_robust_z_of_one_group_and_of_many():
    wanted = [-1.349, -0.6745, 0, 0.6745, 65.4265]
    np.testing.assert_allclose(robust_z(np.array([1, 2, 3, 4, 100.0]), np.zeros(5, int)), wanted)
    values = np.array([100.0, 7, 4, 3, 7, 2, 1, 9])
    groups = np.array([3, 0, 3, 3, 0, 3, 3, 5])
    np.testing.assert_allclose(robust_z(values, groups)[[6, 5, 3, 2, 0]], wanted)
    assert robust_z(values, groups)[[1, 4, 7]].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("which", "per_cluster", "kept"),
    [("hard", 1.0, [3, 4]), ("easy", 1.0, [1, 2]), ("hard", 0.25, [2, 3, 4])],
)
def test_pruning_drops_the_most_prototypical(which: str, per_cluster: float, kept: list[int]):
    distances = np.array([4.0, 1, 3, 2])
    found = prune(distances, np.zeros(4, int), keep=0.5, which=which, per_cluster=per_cluster)  # type: ignore[arg-type]
    assert sorted(distances[found]) == kept


def test_pruning_spares_small_clusters_and_keeps_the_first_of_equals():
    distances = np.array([1.0, 1, 1, 1, 5, 6])
    clusters = np.array([0, 0, 0, 0, 1, 1])
    found = prune(distances, clusters, keep=0.5, which="hard", per_cluster=0.5)
    assert found.tolist() == [True, True, False, False, False, True]
