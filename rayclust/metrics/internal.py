"""Quality of a partition by itself, without true classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import DataError, ShapeError

_DISTANCES_AT_ONCE = 2**22


def silhouette(
    x: FloatArray,
    labels: IntArray,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    rows: int | None = None,
    seed: int = 0,
) -> float:
    """Mean of (b − a) / max(a, b): a the mean distance to the own cluster's other rows, b that to the nearest other's.

    From −1 to 1, larger is better; about 0 for clusters that overlap or labels at random. Labels' names play no part.
    Rows alone in their cluster count 0. Costs N·K·D for cosine, N²·D in blocks for Euclidean.

    Args:
        x: Float[N D].
        labels: Int[N].
        metric: `cosine`: 1 − cosine of the rows, which need not be unit rows. `euclidean`: their distance.
        rows: size of a seeded sample to take it on, against itself; None takes all.
        seed: of the sample.

    Raises:
        DataError: the rows lie in fewer than two clusters.
        ShapeError: `x` is no matrix or `labels` has another length.

    Source: Rousseeuw 1987.
    """
    require_matrix(x, "x")
    labels = np.asarray(labels)
    if labels.shape != (len(x),):
        raise ShapeError(f"labels has shape {labels.shape}: one label for each of {len(x)} rows is needed")
    if rows is not None and rows < len(x):
        chosen = np.sort(np.random.default_rng(seed).choice(len(x), rows, replace=False))
        x, labels = x[chosen], labels[chosen]
    clusters, codes = np.unique(labels, return_inverse=True)
    if len(clusters) < 2:
        raise DataError(f"silhouette: {len(clusters)} cluster among {len(x)} rows: at least 2 are needed")
    sizes = np.bincount(codes)
    sums = _cosine_sums(x, codes, sizes) if metric == "cosine" else _euclidean_sums(x, codes, len(sizes))
    return float(_widths(sums, codes, sizes).mean())


def size_summary(labels: IntArray, clusters: int) -> dict[str, float]:
    """How even the clusters are.

    Args:
        labels: Int[N], from 0 to K − 1.
        clusters: K.

    Returns:
        `occupied`: clusters with a row; `smallest`, `median`, `largest`: rows, empty clusters included; `entropy`: that
        of the shares divided by ln K, 1 when all are equal and 0 when one holds everything (0 for K = 1).
    """
    sizes = np.bincount(labels, minlength=clusters)
    shares = sizes[sizes > 0] / max(sizes.sum(), 1)
    entropy = float(-(shares * np.log(shares)).sum()) / np.log(clusters) if clusters > 1 else 0.0
    return {
        "occupied": int((sizes > 0).sum()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "entropy": entropy,
    }


def _cosine_sums(x: FloatArray, codes: IntArray, sizes: IntArray) -> NDArray[np.float64]:
    """Sums Float64[N K] of 1 − cosine from each row to each cluster's rows; a row is at no distance from itself."""
    wide = x.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    wide /= np.where(lengths > 0, lengths, 1.0)
    totals = np.zeros((len(sizes), x.shape[1]))
    np.add.at(totals, codes, wide)
    # The mean of cosines is the cosine with the mean: no row meets another.
    sums = np.asarray(sizes - wide @ totals.T, dtype=np.float64)
    sums[np.arange(len(x)), codes] -= 1.0 - np.square(wide).sum(axis=1)
    return np.maximum(sums, 0.0)


def _euclidean_sums(x: FloatArray, codes: IntArray, clusters: int) -> NDArray[np.float64]:
    """Sums Float64[N K] of distances from each row to each cluster's rows."""
    wide = x.astype(np.float64)
    wide -= wide.mean(axis=0)  # products far from zero lose digits
    squares = np.square(wide).sum(axis=1)
    members = np.eye(clusters)[codes]
    sums = np.empty((len(x), clusters))
    size = max(1, _DISTANCES_AT_ONCE // len(x))
    for start in range(0, len(x), size):
        span = slice(start, start + size)
        distances = squares[span, None] + squares - 2.0 * wide[span] @ wide.T
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = 0.0
        sums[span] = np.sqrt(np.maximum(distances, 0.0)) @ members
    return sums


def _widths(sums: NDArray[np.float64], codes: IntArray, sizes: IntArray) -> NDArray[np.float64]:
    """Silhouette of each row, Float64[N], from its summed distances to clusters."""
    each = np.arange(len(codes))
    own = sizes[codes]
    inside = sums[each, codes] / np.maximum(own - 1, 1)
    means = sums / sizes
    means[each, codes] = np.inf
    outside = means.min(axis=1)
    larger = np.maximum(inside, outside)
    widths = np.divide(outside - inside, larger, out=np.zeros_like(larger), where=larger > 0)
    return np.where(own > 1, widths, 0.0)
