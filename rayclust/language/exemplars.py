"""Typical and odd rows of each cluster, in one pass over rows in any order."""

from __future__ import annotations

import numpy as np

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ShapeError


class TopRows:
    """The rows of each cluster with the largest scores, merged block by block.

    The result does not depend on the order of blocks; of equal scores the smaller row counts.

    Args:
        count: rows to keep per cluster.
        largest: False keeps the smallest scores instead: the outliers.
    """

    def __init__(self, count: int, *, largest: bool = True) -> None:
        self._count, self._sign = count, 1.0 if largest else -1.0
        self._clusters: IntArray = np.empty(0, np.int64)
        self._rows: IntArray = np.empty(0, np.int64)
        self._scores: FloatArray = np.empty(0, np.float64)

    def update(self, rows: IntArray, clusters: IntArray, scores: FloatArray) -> None:
        """Takes some rows.

        Args:
            rows: Int[B], ids.
            clusters: Int[B]; rows of −1 are skipped.
            scores: Float[B], larger is more typical; rows whose score is not a number are skipped.

        Raises:
            ShapeError: lengths differ.
        """
        if not len(rows) == len(clusters) == len(scores):
            raise ShapeError(
                f"rows, clusters, scores have lengths {len(rows)}, {len(clusters)}, {len(scores)}: must be equal"
            )
        known = (np.asarray(clusters) >= 0) & ~np.isnan(scores)
        self._merge(
            np.asarray(clusters)[known], np.asarray(rows)[known], self._sign * np.asarray(scores, np.float64)[known]
        )

    def merge(self, other: TopRows) -> None:
        """Takes what another pass kept, of the same kind."""
        self._merge(other._clusters, other._rows, other._scores)

    def of(self, cluster: int) -> list[int]:
        """Row ids of one cluster, the most typical (for outliers, the oddest) first; at most `count`."""
        begin, end = np.searchsorted(self._clusters, [cluster, cluster + 1])
        return [int(row) for row in self._rows[begin:end]]

    def _merge(self, clusters: IntArray, rows: IntArray, scores: FloatArray) -> None:
        clusters, rows = np.concatenate([self._clusters, clusters]), np.concatenate([self._rows, rows])
        scores = np.concatenate([self._scores, scores])
        order = np.lexsort((rows, -scores, clusters))
        rank = np.arange(len(order)) - np.searchsorted(clusters[order], clusters[order])
        kept = order[rank < self._count]
        self._clusters, self._rows, self._scores = clusters[kept], rows[kept], scores[kept]


def typicality(embeddings: FloatArray, clusters: IntArray, prototypes: FloatArray) -> FloatArray:
    """Cosine between each row and its cluster's prototype.

    Args:
        embeddings: Float[B D].
        clusters: Int[B], below K; −1 gives NaN.
        prototypes: Float[K D], of any length, e.g. sums of members.

    Returns:
        Float64[B] in [−1, 1]; 0 for a zero row or prototype.

    Raises:
        ShapeError: widths or lengths differ, or a cluster is out of range.
    """
    require_matrix(prototypes, "prototypes")
    require_matrix(embeddings, "embeddings", prototypes.shape[1])
    if len(clusters) != len(embeddings) or (len(clusters) and int(np.max(clusters)) >= len(prototypes)):
        raise ShapeError(f"{len(clusters)} clusters for {len(embeddings)} embeddings and {len(prototypes)} prototypes")
    x, centers = embeddings.astype(np.float64), prototypes.astype(np.float64)[clusters]
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(centers, axis=1)
    cosine = np.einsum("bd,bd->b", x, centers) / np.where(lengths > 0, lengths, 1.0)
    return np.where(np.asarray(clusters) >= 0, cosine, np.nan)
