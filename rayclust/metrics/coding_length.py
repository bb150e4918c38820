"""Lossy coding length of a partition: the nats that its rows take, cluster by cluster, and their cluster ids.

Everything is a sum of one term per cluster, and a cluster's term needs its row count N_k and second moments Z_kᵀZ_k
alone: `Moments` add up over blocks of rows and over workers. Log-determinants are taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ConfigError, DataError, ShapeError

DISTORTION = 0.1
"""ε² of the published program, for unit rows."""
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Moments:
    """Counts and second moments of the clusters of some rows; moments of other rows are added with `+`."""

    counts: NDArray[np.int64]
    """Int64[K], N_k."""
    second: NDArray[np.float64]
    """Float64[K d d], Z_kᵀZ_k, not seen from the mean."""

    @classmethod
    def of(cls, z: FloatArray, labels: IntArray, clusters: int) -> Moments:
        """Moments of one block of rows.

        Args:
            z: Float[B d].
            labels: Int[B], from 0 to K − 1.
            clusters: K.

        Raises:
            DataError: a label is not below K.
            ShapeError: `z` is no matrix or `labels` has another length.
        """
        labels = _checked(z, labels)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < clusters:
            raise DataError(f"labels lie from {labels.min()} to {labels.max()}: from 0 to {clusters - 1} is needed")
        second = np.zeros((clusters, z.shape[1], z.shape[1]))
        for k, rows in _by_cluster(labels):
            second[k] = _gram(z, rows)
        return cls(np.bincount(labels, minlength=clusters).astype(np.int64), second)

    def __add__(self, other: Moments) -> Moments:
        if self.second.shape != other.second.shape:
            raise ShapeError(f"moments have shapes {self.second.shape} and {other.second.shape}: one is needed")
        return Moments(self.counts + other.counts, self.second + other.second)

    def coding_length(self, distortion: float = DISTORTION) -> float:
        """L(Z, y) in nats; see `coding_length`."""
        occupied = np.flatnonzero(self.counts)
        groups = [_group_length(self.second[k], int(self.counts[k]), distortion) for k in occupied]
        return sum(groups) + label_length(self.counts)


def coding_length(z: FloatArray, labels: IntArray, distortion: float = DISTORTION) -> float:
    """Nats that rows take when each cluster has a code of its own: L(Z, y) = Σ_k ℓ(Z_k) − N_k ln(N_k / N).

    Smaller is better. Labels' names play no part; empty clusters take nothing. Holds one d×d or m×m matrix at a time,
    m the rows of a cluster, whichever is smaller.

    Args:
        z: Float[N d], unit rows for the usual distortion.
        labels: Int[N].
        distortion: ε², squared error allowed per row, in squared row lengths; above 0.

    Raises:
        ConfigError: `distortion` is not above 0.
        ShapeError: `z` is no matrix or `labels` has another length.

    Source: arXiv 2306.05272, Algorithm 1; Ma, Derksen, Hong & Wright 2007, eq. 11.
    """
    labels = _checked(z, labels)
    sizes: list[int] = []
    total = 0.0
    for _, rows in _by_cluster(labels):
        sizes.append(len(rows))
        total += _group_length(_smaller_gram(z, rows), len(rows), distortion, z.shape[1])
    return total + label_length(sizes)


def group_length(x: FloatArray, distortion: float = DISTORTION) -> float:
    """Nats that the rows of one group take: ℓ(X) = (m + d)/2 · ln det(I + d/(ε² m) XᵀX).

    Args:
        x: Float[m d].
        distortion: ε², above 0.

    Raises:
        ConfigError: `distortion` is not above 0.
        ShapeError: `x` is no matrix.
    """
    require_matrix(x, "x")
    rows = np.arange(len(x))
    return _group_length(_smaller_gram(x, rows), len(x), distortion, x.shape[1]) if len(x) else 0.0


def label_length(sizes: ArrayLike) -> float:
    """Nats that the cluster ids take: −Σ_k N_k ln(N_k / N).

    Args:
        sizes: Int[K], rows of each cluster; 0 takes nothing.
    """
    counts = np.asarray(sizes, dtype=np.float64)
    counts = counts[counts > 0]
    return float(-(counts * np.log(counts / counts.sum())).sum()) + 0.0


def _group_length(gram: NDArray[np.float64], count: int, distortion: float, width: int | None = None) -> float:
    """ℓ from XᵀX or XXᵀ, whose determinants are the same (Sylvester)."""
    if not distortion > 0:
        raise ConfigError(f"distortion = {distortion}: must be above 0")
    d = len(gram) if width is None else width
    # At least the identity, so that Cholesky needs no jitter.
    factor = np.linalg.cholesky(np.eye(len(gram)) + d / (distortion * count) * gram)
    return float((count + d) * np.log(factor.diagonal()).sum())


def _smaller_gram(z: FloatArray, rows: IntArray) -> NDArray[np.float64]:
    if len(rows) >= z.shape[1]:
        return _gram(z, rows)
    own = z[rows].astype(np.float64)
    return np.asarray(own @ own.T)


def _gram(z: FloatArray, rows: IntArray) -> NDArray[np.float64]:
    """Float64[d d] of some rows, read in parts."""
    total = np.zeros((z.shape[1], z.shape[1]))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = z[rows[start : start + _ROWS_AT_ONCE]].astype(np.float64)
        total += part.T @ part
    return total


def _by_cluster(labels: IntArray) -> list[tuple[int, IntArray]]:
    """Each cluster that occurs and its rows, in increasing order."""
    if len(labels) == 0:
        return []
    order = np.argsort(labels, kind="stable")
    names, starts = np.unique(labels[order], return_index=True)
    return list(zip(names.tolist(), np.split(order, starts[1:]), strict=True))


def _checked(z: FloatArray, labels: IntArray) -> IntArray:
    require_matrix(z, "z")
    labels = np.asarray(labels)
    if labels.shape != (len(z),):
        raise ShapeError(f"labels has shape {labels.shape}: one label for each of {len(z)} rows is needed")
    return labels
