from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.errors import DataError
from rayclust.metrics import internal, partition
from rayclust.metrics.coding_length import coding_length
from rayclust.metrics.criteria import CriteriaOptions, measure
from rayclust.search.knn import top_k


def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=200)
    x = rng.normal(size=(4, 8))[labels] + 0.3 * rng.normal(size=(200, 8))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    rows, ids = torch.from_numpy(x), torch.arange(200)
    return x, labels, top_k(rows, rows, 5, query_ids=ids, database_ids=ids)[0].numpy()


def test_each_criterion_is_its_own_function():
    x, labels, neighbors = planted()
    other = np.random.default_rng(1).integers(4, size=200)
    found = measure(x, [labels, other], neighbors, CriteriaOptions(silhouette_rows=100, seed=3))
    assert found["coding_length"] == pytest.approx(coding_length(x, labels) / 200)
    assert found["silhouette"] == internal.silhouette(x, labels, rows=100, seed=3)
    assert found["calinski_harabasz"] == partition.calinski_harabasz(x, labels)
    assert found["davies_bouldin"] == partition.davies_bouldin(x, labels)
    assert found["neighbor_agreement"] == partition.neighbor_agreement(labels, neighbors)
    assert found["modularity"] == partition.modularity(labels, neighbors)
    assert found["map_equation"] == partition.map_equation(labels, neighbors)
    assert found["stability"] == partition.stability([labels, other])
    assert found["occupied"] == 4


def test_what_cannot_be_measured_is_left_out():
    x, _, _ = planted()
    found = measure(x, [np.zeros(200, int)], None, CriteriaOptions())
    assert set(found) == {"coding_length", "occupied", "smallest", "median", "largest", "entropy"}
    with pytest.raises(DataError, match="partitions = 0"):
        measure(x, [], None, CriteriaOptions())


def test_a_sample_within_one_cluster_has_no_silhouette():
    x, _, _ = planted()
    labels = (np.arange(200) == 0).astype(int)
    assert measure(x, [labels], None, CriteriaOptions(silhouette_rows=5))["silhouette"] == 0.0
