from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import torch

from rayclust.methods import KMeansConfig, build
from rayclust.methods.kmeans import KMeans
from rayclust.stages.assign import assign
from tests.stages.conftest import Sealed


def kmeans() -> KMeans:
    """Two centres, at right angles."""
    method = build(KMeansConfig(clusters=2, temperature=1.0), 2, 10, 0)
    assert isinstance(method, KMeans)
    method.centers.copy_(torch.eye(2))
    method.inertia.fill_(10 * 1.0)
    return method


def test_the_nearest_centre_with_its_probability():
    clusters, confidence = assign(kmeans(), np.array([[2, 0], [0, 3], [1, 1]], np.float32))
    assert clusters.dtype == np.int32
    assert confidence.dtype == np.float32
    assert clusters[:2].tolist() == [0, 1]
    # Squared distances 0 and 2 between unit rows, mean 1, temperature 1.
    np.testing.assert_allclose(confidence, [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-2)), 0.5], rtol=1e-6)


def test_no_rows_are_no_clusters():
    clusters, confidence = assign(kmeans(), np.zeros((0, 2), np.float32))
    assert (clusters.shape, clusters.dtype, confidence.shape) == ((0,), np.int32, (0,))


def test_every_part_keeps_its_rows_and_keys_and_the_sizes_add_up(pictures_run: Sealed):
    sizes = np.zeros(3, int)
    for part, count in enumerate([12, 0, 12]):
        assigned = pq.read_table(pictures_run.run.assignments(part))
        embedded = pq.read_table(pictures_run.run.embeddings(part))
        assert assigned.num_rows == count
        assert assigned["row"].equals(embedded["row"])
        assert assigned["key"].equals(embedded["key"])
        sizes += np.bincount(assigned["cluster"].to_numpy(), minlength=3)
        assert all(1 / 3 <= p <= 1 for p in assigned["confidence"].to_pylist())
    manifest = pictures_run.manifest("assign")
    assert manifest.extra["sizes"] == sizes.tolist() == [8, 8, 8]
    assert manifest.counts == {"rows": 24, "occupied": 3}
