from __future__ import annotations

import numpy as np
import pytest

from rayclust.arrays import unit_rows
from rayclust.metrics import nulls
from rayclust.metrics.nulls import null_silhouettes, resampled_silhouettes


def blobs(clusters: int, rows: int = 400, width: int = 16) -> np.ndarray:
    """Unit rows around as many directions."""
    rng = np.random.default_rng(clusters)
    centers = rng.normal(size=(clusters, width))
    x = centers[np.arange(rows) % clusters] + 0.3 * rng.normal(size=(rows, width))
    return unit_rows(x).astype(np.float32)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The rows of which silhouettes are taken: the sample, its columns permuted, normal ones."""
    taken, silhouette = list[np.ndarray](), nulls.silhouette
    monkeypatch.setattr(nulls, "silhouette", lambda x, labels: (taken.append(x), silhouette(x, labels))[1])
    return taken


def test_permuted_columns_keep_each_dimensions_values_and_lose_the_rows(measured: list[np.ndarray]):
    x = blobs(3)
    null_silhouettes(x, 3)
    same, found, _ = measured
    assert np.array_equal(same, x)
    assert np.array_equal(np.sort(found, axis=0), np.sort(x, axis=0))
    assert np.abs(np.corrcoef(found.T) - np.eye(16)).max() < 0.2 < np.abs(np.corrcoef(x.T) - np.eye(16)).max()


def test_gaussian_rows_have_the_covariance_and_no_clusters(measured: list[np.ndarray]):
    x = blobs(3, rows=2_000)
    null_silhouettes(x, 3, rows=2_000)
    found = measured[2]
    assert found.shape == x.shape
    assert np.allclose(found.mean(axis=0), x.mean(axis=0), atol=0.03)
    scale = np.abs(np.cov(x.T)).max()
    assert np.abs(np.cov(found.T) - np.cov(x.T)).max() < 0.15 * scale
    kurtosis = ((found - found.mean(0)) ** 4).mean(0) / found.var(0) ** 2
    assert np.abs(kurtosis - 3.0).max() < 0.6


def test_clusters_stand_above_null_models_and_noise_does_not():
    planted = null_silhouettes(blobs(5), 5)
    assert planted["null_contrast"] > 0.3
    assert planted["null_contrast"] == planted["silhouette_sample"] - max(
        planted["silhouette_permuted"], planted["silhouette_gaussian"]
    )
    noise = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    assert abs(null_silhouettes(unit_rows(noise), 5)["null_contrast"]) < 0.03
    assert null_silhouettes(blobs(5), 5, rows=200, seed=1) == null_silhouettes(blobs(5), 5, rows=200, seed=1)


def test_few_rows_have_no_null_models():
    assert null_silhouettes(blobs(5, rows=19), 5) == {}
    assert null_silhouettes(blobs(5, rows=20), 5) != {}


def test_subsamples_find_the_clusters_that_are_there_again():
    rng = np.random.default_rng(0)
    true = np.arange(120) % 3
    x = unit_rows(np.eye(8)[true] + 0.1 * rng.normal(size=(120, 8)))
    right = resampled_silhouettes(x, true, 8)
    assert right == {"resampled_silhouette": 1.0, "resampled_bound": 1.0}
    split = resampled_silhouettes(x, true + 3 * (np.arange(120) % 2), 8)  # each cut at random
    assert split["resampled_bound"] <= split["resampled_silhouette"] < 0.5
    assert resampled_silhouettes(x, np.zeros(120, int), 8) == {}
