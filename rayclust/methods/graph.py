"""Rows as methods look at them before or instead of a training: a sample with its neighbours, other axes or neighbours.

A file of its own, because TEMI, the default method and the consensus share it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rayclust.clustering.row_stats import even_sample
from rayclust.methods.base import Rows
from rayclust.methods.settings import EMBEDDINGS
from rayclust.search.knn import nearest_others

SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER = 65_536, 64
"""Rows that are looked at, at most, and for each cluster, at least."""
_BLOCK = 16_384
"""Rows that are mapped to components at once."""


def sample_ids(count: int, clusters: int, seed: int) -> Tensor:
    """Return Int64[n], numbers of a sample of the rows, in order; the same on all workers."""
    return even_sample(count, max(SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER * clusters), seed)


def sample_rows(rows: Rows, clusters: int, seed: int, like: Tensor) -> Tensor:
    """Return those rows, Float[n D], with dtype and device of `like`."""
    ids, x = sample_ids(rows.count, clusters, seed), rows.tensor()
    return (x if len(ids) == rows.count else x[ids.to(x.device)]).to(like)


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
    x = sample_rows(rows, clusters, seed, like)
    if len(x) == rows.count:
        return x, rows.neighbors()[:, :columns].to(like.device).long()
    return x, nearest_others(x, columns)


class DerivedRows(Rows):
    """Rows as rows of one space, along a few axes or with other neighbours.

    Args:
        rows: the rows.
        basis: Float[D P], orthonormal axes; None: the rows' own.
        neighbors: Int[N M], −1 behind the last one of a row that has fewer; None: the rows' own.
    """

    def __init__(self, rows: Rows, basis: Tensor | None = None, neighbors: Tensor | None = None) -> None:
        self.count, self.dimension = rows.count, rows.dimension if basis is None else basis.shape[1]
        self.spaces: tuple[str, ...] = (EMBEDDINGS,)
        self.dimensions = {EMBEDDINGS: self.dimension}
        self._rows, self._basis, self._neighbors = rows, basis, neighbors
        self._x = rows.tensor()
        if basis is not None:
            self._x = torch.cat([block.to(basis) @ basis for block in torch.split(self._x, _BLOCK)])

    def tensor(self, space: str | None = None) -> Tensor:
        """Return Float[N P]."""
        return self._x

    def blocks(self, space: str | None = None) -> Iterator[Tensor]:
        """Yield Float[B P] blocks of this worker's rows."""
        for block in self._rows.blocks():
            yield block if self._basis is None else block.to(self._basis) @ self._basis

    def neighbors(self) -> Tensor:
        """Return those that were given, or those of the rows."""
        return self._rows.neighbors() if self._neighbors is None else self._neighbors
