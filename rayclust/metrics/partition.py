"""Criteria by which partitions of one set into different numbers of clusters are compared, without true classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import DataError, ShapeError
from rayclust.metrics.external import ari

_ROWS_AT_ONCE = 8192


def calinski_harabasz(x: FloatArray, labels: IntArray) -> float:
    """Variance between clusters over variance inside: [B / (K − 1)] / [W / (N − K)].

    At least 0, larger is better; about 1 for random labels. Euclidean: for unit rows the squared distance is
    2 − 2 cosine. 1 when rows equal their centres, as in scikit-learn.

    Args:
        x: Float[N D].
        labels: Int[N].

    Raises:
        DataError: fewer than two clusters, or as many as rows.
        ShapeError: `x` is no matrix or `labels` has another length.

    Source: Caliński & Harabasz 1974.
    """
    parts = _Clusters.of(x, labels)
    N, K = int(parts.sizes.sum()), len(parts.sizes)
    mean = parts.sizes @ parts.centers / N
    between = float(parts.sizes @ np.square(parts.centers - mean).sum(axis=1))
    within = float(np.square(parts.distances(x)).sum())
    return 1.0 if within == 0.0 else between * (N - K) / (within * (K - 1))


def davies_bouldin(x: FloatArray, labels: IntArray) -> float:
    """Mean over clusters of the worst (s_i + s_j) / d_ij: s mean distances to the centre, d that between centres.

    At least 0, smaller is better. Euclidean.

    Args:
        x: Float[N D].
        labels: Int[N].

    Raises:
        DataError: fewer than two clusters, or as many as rows.
        ShapeError: `x` is no matrix or `labels` has another length.

    Source: Davies & Bouldin 1979.
    """
    parts = _Clusters.of(x, labels)
    spread = np.bincount(parts.codes, weights=parts.distances(x)) / parts.sizes
    centers = parts.centers - parts.centers.mean(axis=0)  # products far from zero lose digits
    squares = np.square(centers).sum(axis=1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2.0 * centers @ centers.T, 0.0))
    if np.allclose(spread, 0.0) or np.allclose(apart, 0.0):
        return 0.0
    np.fill_diagonal(apart, np.inf)
    apart[apart == 0.0] = np.inf
    return float(((spread[:, None] + spread) / apart).max(axis=1).mean())


def neighbor_agreement(labels: IntArray, neighbors: IntArray) -> float:
    """Share of the pairs of a row and one of its nearest neighbours that lie in one cluster.

    From 0 to 1, larger is better, but 1 for a single cluster and less with more clusters; see `modularity`.

    Args:
        labels: Int[N].
        neighbors: Int[N M], −1 where a row has fewer than M.

    Raises:
        ShapeError: `neighbors` is no matrix or of another length.
    """
    kept, pairs = _pairs_kept(labels, neighbors)
    return kept / max(pairs, 1)


def modularity(labels: IntArray, neighbors: IntArray) -> float:
    """`neighbor_agreement` less what a partition of the same sizes keeps by chance, Σ_c (share of rows)².

    Below 1, larger is better; 0 for a single cluster and about 0 for random labels.

    Args:
        labels: Int[N].
        neighbors: Int[N M], −1 where a row has fewer than M.

    Raises:
        ShapeError: `neighbors` is no matrix or of another length.

    Source: Newman & Girvan 2004, eq. 5, for a graph in which every row has equally many neighbours.
    """
    kept, pairs = _pairs_kept(labels, neighbors)
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return kept / max(pairs, 1) - float(np.square(shares).sum())


def map_equation(labels: IntArray, neighbors: IntArray) -> float:
    """Nats per step that describe a random walk in the neighbour graph when each cluster has a code book of its own.

    At least 0, smaller is better. Too few clusters have long code words for their rows, too many are left too often.
    Neighbours count in both directions.

    Args:
        labels: Int[N].
        neighbors: Int[N M], −1 where a row has fewer than M.

    Raises:
        ShapeError: `neighbors` is no matrix or of another length.

    Source: Rosvall & Bergstrom 2008, eq. 4, of the two-level description.
    """
    _pairs_kept(labels, neighbors)
    codes = np.unique(labels, return_inverse=True)[1]
    there = neighbors >= 0
    ends = neighbors[there]
    starts = np.repeat(np.arange(len(codes)), there.sum(axis=1))
    visits = np.bincount(np.concatenate([starts, ends]), minlength=len(codes)) / max(2 * len(ends), 1)
    crossing = codes[starts] != codes[ends]
    across = np.concatenate([codes[starts][crossing], codes[ends][crossing]])
    leaving = np.bincount(across, minlength=int(codes.max(initial=-1)) + 1) / max(2 * len(ends), 1)
    staying = np.bincount(codes, weights=visits)
    index = _plogp(leaving.sum()) - 2.0 * _plogp(leaving).sum()
    return float(index - _plogp(visits).sum() + _plogp(leaving + staying).sum()) + 0.0


def stability(partitions: Sequence[IntArray]) -> float:
    """Mean ARI of every two of several partitions of the same rows, such as those of several seeds.

    At most 1, larger is better; about 0 for independent random labels of any K.

    Args:
        partitions: each Int[N].

    Raises:
        DataError: fewer than two partitions.
    """
    if len(partitions) < 2:
        raise DataError(f"stability: {len(partitions)} partition: at least 2 are needed")
    return float(np.mean([ari(a, b) for a, b in itertools.combinations(partitions, 2)]))


@dataclass(frozen=True)
class _Clusters:
    """Clusters that occur, their rows and their means."""

    codes: NDArray[np.int64]
    """Int64[N], each row's place among the clusters that occur."""
    sizes: NDArray[np.int64]
    """Int64[K]."""
    centers: NDArray[np.float64]
    """Float64[K D]."""

    @classmethod
    def of(cls, x: FloatArray, labels: IntArray) -> _Clusters:
        require_matrix(x, "x")
        labels = np.asarray(labels)
        if labels.shape != (len(x),):
            raise ShapeError(f"labels has shape {labels.shape}: one label for each of {len(x)} rows is needed")
        names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        if not 2 <= len(names) < len(x):
            raise DataError(f"{len(names)} clusters of {len(x)} rows: from 2 to {len(x) - 1} are needed")
        sums = np.zeros((len(names), x.shape[1]))
        for start in range(0, len(x), _ROWS_AT_ONCE):
            own = codes[start : start + _ROWS_AT_ONCE]
            order = np.argsort(own, kind="stable")
            found, firsts = np.unique(own[order], return_index=True)
            sums[found] += np.add.reduceat(x[start : start + _ROWS_AT_ONCE][order].astype(np.float64), firsts, axis=0)
        return cls(codes, sizes, sums / sizes[:, None])

    def distances(self, x: FloatArray) -> NDArray[np.float64]:
        """Float64[N] from each row to its cluster's mean."""
        parts = (slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(x), _ROWS_AT_ONCE))
        return np.concatenate([
            np.linalg.norm(x[part].astype(np.float64) - self.centers[self.codes[part]], axis=1) for part in parts
        ])  # fmt: skip


def _plogp(shares: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(xlogy(shares, shares), dtype=np.float64)


def _pairs_kept(labels: IntArray, neighbors: IntArray) -> tuple[int, int]:
    """Pairs of a row and a neighbour in one cluster, and all such pairs."""
    require_matrix(neighbors, "neighbors")
    labels = np.asarray(labels)
    if labels.shape != (len(neighbors),):
        raise ShapeError(f"labels has shape {labels.shape}: one label for each of {len(neighbors)} rows is needed")
    kept = pairs = 0
    for start in range(0, len(labels), _ROWS_AT_ONCE):
        ids = neighbors[start : start + _ROWS_AT_ONCE]
        there = ids >= 0
        same = labels[np.where(there, ids, 0)] == labels[start : start + _ROWS_AT_ONCE, None]
        kept, pairs = kept + int((same & there).sum()), pairs + int(there.sum())
    return kept, pairs
