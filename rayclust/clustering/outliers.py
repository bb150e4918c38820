"""How odd and how typical rows are: outlier scores, and pruning by prototypicality (arXiv 2206.14486, 2308.12284).

Apart from duplicates because these look at a row's place among others, not at pairs. Outliers are listed, never removed
by a fixed threshold.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import FloatArray, IntArray

_MAD_TO_DEVIATION = 0.6745
"""Median absolute deviation of a normal variable, in standard deviations."""


def knn_distances(similarity: FloatArray, counted: NDArray[np.bool_] | None = None) -> FloatArray:
    """Return d_i = 1 − (1/k) Σ_j s_ij over a row's neighbours, Float64[N].

    Args:
        similarity: Float[N k], cosines to the neighbours.
        counted: Bool[N k], neighbours that count: identical rows do not. None counts all. A row without any has NaN.
    """
    wide = similarity.astype(np.float64)
    mask = np.ones(wide.shape, bool) if counted is None else counted
    number = mask.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - np.where(mask, wide, 0).sum(axis=1) / number)


def distance_ratios(
    own: FloatArray, distances: FloatArray, neighbors: IntArray, counted: NDArray[np.bool_] | None = None
) -> FloatArray:
    """Return d_i over the mean d_j of the row's neighbours, Float64[B], the simplified local outlier factor.

    Args:
        own: Float64[B], d_i of some rows.
        distances: Float64[N], of all rows, as `knn_distances` gives them.
        neighbors: Int64[B k], of these rows.
        counted: Bool[B k], neighbours that count; None counts all.

    Source: Schubert, Zimek and Kriegel 2014, with 1 − cosine for the distance.
    """
    around = distances[neighbors]
    mask = np.isfinite(around) if counted is None else counted & np.isfinite(around)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(mask, around, 0).sum(axis=1) / mask.sum(axis=1)
        return np.asarray(np.where(own == mean, 1.0, own / mean))


def robust_z(values: FloatArray, groups: IntArray) -> FloatArray:
    """Return 0.6745 · (v − median) / MAD within each group, Float64[N]; 0 where the MAD is 0.

    Args:
        values: Float[N].
        groups: Int[N], at least 0.
    """
    wide = values.astype(np.float64)
    deviation = wide - _group_medians(wide, groups)
    scale = _group_medians(np.abs(deviation), groups)
    return np.asarray(np.where(scale > 0, _MAD_TO_DEVIATION * deviation / np.where(scale > 0, scale, 1), 0.0))


def _group_medians(values: FloatArray, groups: IntArray) -> FloatArray:
    """Return Float64[N], the median of each row's group."""
    order = np.lexsort((values, groups))
    sizes = np.bincount(groups)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    filled = np.flatnonzero(sizes)
    low, high = starts[filled] + (sizes[filled] - 1) // 2, starts[filled] + sizes[filled] // 2
    medians = np.zeros(len(sizes))
    medians[filled] = (values[order[low]] + values[order[high]]) / 2
    return np.asarray(medians[groups])


def oddest(knn: FloatArray, centroid_z: FloatArray, share: float) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Rank rows by two scores, and flag a share of them.

    Args:
        knn: Float64[N] of `knn_distances`; NaN ranks lowest.
        centroid_z: Float64[N] of `robust_z`.
        share: of the rows to flag.

    Returns:
        Float64[N] in (0, 1], the mean of the scores' ranks over N: 1 is the oddest, ties share their mean rank.
        Bool[N], the ⌈share · N⌉ rows of the largest, ties by row.
    """
    from scipy import stats

    ranked = [stats.rankdata(np.where(np.isnan(score), -np.inf, score)) for score in (knn, centroid_z)]
    rank = np.asarray((ranked[0] + ranked[1]) / (2 * max(len(knn), 1)))
    flagged = np.zeros(len(rank), bool)
    count = int(np.ceil(share * len(rank) - 1e-9))
    flagged[np.argsort(-rank, kind="stable")[:count]] = True
    return rank, flagged


def prune(
    distances: FloatArray, clusters: IntArray, *, keep: float, which: Literal["hard", "easy"], per_cluster: float = 1.0
) -> NDArray[np.bool_]:
    """Return Bool[N], the rows left after the most (or least) prototypical ones are dropped.

    Args:
        distances: Float[N] of rows to their own centroid.
        clusters: Int[N].
        keep: share of the rows to keep, in (0, 1].
        which: hard keeps rows far from their centroid, for much data; easy keeps near ones, for little.
        per_cluster: largest share of a cluster that is dropped, so that small clusters do not vanish; more may be kept
            than asked for. Ties go to the smaller row, which is kept.

    Source: arXiv 2206.14486, section 4; arXiv 2308.12284, SSL prototypes.
    """
    count = len(distances)
    wanted = count - int(np.ceil(keep * count - 1e-9))
    badness = -distances if which == "hard" else distances
    # Those to be dropped first: of equals the larger row.
    order = np.lexsort((-np.arange(count), -badness))
    by_cluster = order[np.argsort(clusters[order], kind="stable")]
    sizes = np.bincount(clusters)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.empty(count, np.int64)
    rank[by_cluster] = np.arange(count) - starts[clusters[by_cluster]]
    allowed = rank[order] < np.floor(per_cluster * sizes[clusters[order]] + 1e-9)
    kept = np.ones(count, bool)
    kept[order[allowed][:wanted]] = False
    return kept
