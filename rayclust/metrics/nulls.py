"""What k-means finds elsewhere: in null models, rows without clusters, and in subsamples of the rows.

A criterion's value says little alone: k-means cuts every cloud into clusters of some silhouette. Two clouds without
clusters share what the rows have besides them: each dimension's values, or the covariance. Clusters that are there come
back in most subsamples.
"""

from __future__ import annotations

import numpy as np
import torch

from rayclust.arrays import FloatArray, IntArray, require_matrix, unit_rows
from rayclust.clustering import kmeans
from rayclust.metrics.internal import coclustering_silhouettes, silhouette
from rayclust.settings import KMeansOptions

_LEAST_ROWS = 4
"""Rows per cluster below which the silhouettes of k-means are those of chance."""
_DRAWN, _BOOTSTRAP = 0.8, 2_000
"""Share of the rows in a subsample, and draws of the clusters that bound their median, as published but for the number
of draws."""


def null_silhouettes(x: FloatArray, clusters: int, *, rows: int = 1_000, seed: int = 0) -> dict[str, float]:
    """Compute the silhouettes of spherical k-means on a sample of the rows and on two null models of it.

    Args:
        x: Float[N D], unit rows.
        clusters: K, at least 2.
        rows: of the seeded sample.
        seed: of sample, null models and k-means.

    Returns:
        `silhouette_sample`, of the rows; `silhouette_permuted`, dimension by dimension in another order;
        `silhouette_gaussian`, of normal rows with the same covariance; `null_contrast`, the first above the larger of
        the others. Empty where clusters have fewer than 4 rows on average.

    Source: Tibshirani, Walther & Hastie 2001, section 4, whose reference is uniform over each dimension's range.
    """
    require_matrix(x, "x")
    if rows < len(x):
        x = x[np.sort(np.random.default_rng(seed).choice(len(x), rows, replace=False))]
    if len(x) < _LEAST_ROWS * clusters:
        return {}
    # 1. Each dimension's values in an order of its own; normal rows of the mean and, on average over seeds, the
    # covariance, as random sums of the centred rows: no D×D matrix, and no more directions than the rows have.
    permuted = np.random.default_rng(seed).permuted(x, axis=0)
    mean = x.mean(axis=0)
    draws = np.random.default_rng(seed).normal(size=(len(x), len(x))).astype(x.dtype)
    gaussian = mean + draws @ (x - mean) / np.sqrt(len(x))
    # 2. k-means of each from one start; 0 where all rows are in one cluster.
    found = dict[str, float]()
    for name, each in (("sample", x), ("permuted", permuted), ("gaussian", gaussian)):
        labels = _kmeans_labels(each, clusters, seed)
        is_cut = len(np.unique(labels)) > 1
        found[f"silhouette_{name}"] = silhouette(each.astype(np.float32), labels) if is_cut else 0.0
    nulls = max(found["silhouette_permuted"], found["silhouette_gaussian"])
    return found | {"null_contrast": found["silhouette_sample"] - nulls}


def resampled_silhouettes(
    x: FloatArray, labels: IntArray, resamples: int, *, rows: int = 1_000, seed: int = 0
) -> dict[str, float]:
    """Compute how often the rows of each cluster come together again in spherical k-means of subsamples.

    Args:
        x: Float[N D], unit rows.
        labels: Int[N], the partition of which it is asked; K is the number of its clusters.
        resamples: subsamples of 80 % of the sample.
        rows: of the seeded sample.
        seed: of sample, subsamples and k-means.

    Returns:
        `resampled_silhouette`, the median over clusters of `coclustering_silhouettes`; `resampled_bound`, the value
        below which 2.5 % of the medians of clusters drawn again lie. Empty with fewer than two clusters in the sample,
        and where clusters have fewer than 4 rows on average.

    Source: Patterson-Cross, Levine and Menon, chooseR, BMC Bioinformatics 22:39, 2021, with k-means and a sample.
    """
    require_matrix(x, "x")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(x), min(rows, len(x)), replace=False))
    x, labels = x[chosen], np.unique(labels[chosen], return_inverse=True)[1]
    clusters = int(labels.max(initial=-1)) + 1
    if clusters < 2 or len(x) < _LEAST_ROWS * clusters:
        return {}
    again = np.full((resamples, len(x)), -1)
    for number, partition in enumerate(again):
        drawn = np.sort(rng.choice(len(x), int(_DRAWN * len(x)), replace=False))
        partition[drawn] = _kmeans_labels(x[drawn], clusters, seed + number)
    each = coclustering_silhouettes(again, labels)
    medians = np.median(rng.choice(each, (_BOOTSTRAP, len(each))), axis=1)
    return {"resampled_silhouette": float(np.median(each)), "resampled_bound": float(np.quantile(medians, 0.025))}


def _kmeans_labels(x: FloatArray, clusters: int, seed: int) -> IntArray:
    """Return the clusters of spherical k-means from one start, Int64[N]."""
    units = torch.from_numpy(unit_rows(x.astype(np.float32)))
    options = KMeansOptions(clusters=clusters, restarts=1)
    return kmeans.assign(units, kmeans.fit(lambda: [units], options, seed=seed).centers)[0].numpy()
