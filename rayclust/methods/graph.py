"""A sample of the rows with its nearest neighbours, which methods look at before or instead of a training.

A file of its own, because TEMI's start and the default method share it.
"""

from __future__ import annotations

from torch import Tensor

from rayclust.clustering.row_stats import even_sample
from rayclust.methods.base import Rows
from rayclust.search.knn import nearest_others

SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER = 65_536, 64
"""Rows that are looked at, at most, and for each cluster, at least."""


def sample_ids(count: int, clusters: int, seed: int) -> Tensor:
    """Return Int64[n], numbers of a sample of the rows, in order; the same on all workers."""
    return even_sample(count, max(SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER * clusters), seed)


def sample_rows(rows: Rows, clusters: int, seed: int, like: Tensor) -> Tensor:
    """Return those rows, Float[n D], with dtype and device of `like`."""
    x = rows.tensor()
    return x[sample_ids(rows.count, clusters, seed).to(x.device)].to(like)


def sample_with_neighbors(rows: Rows, clusters: int, columns: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sample of the rows and each one's nearest others in it, the same on all workers.

    Args:
        rows: all workers'; the run's own neighbours are taken where the sample is all of them.
        clusters: K.
        columns: M, neighbours that are wanted.
        seed: of the sample.
        like: gives dtype and device.

    Returns:
        Float[n D]; Int64[n M], −1 where a row has fewer.
    """
    ids, x = sample_ids(rows.count, clusters, seed), rows.tensor()
    if len(ids) == rows.count:
        return x.to(like), rows.neighbors()[:, :columns].to(like.device).long()
    x = x[ids.to(x.device)].to(like)
    return x, nearest_others(x, columns)
