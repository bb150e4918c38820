"""Exact nearest neighbours by inner product: blocks of the database with a running merge."""

from __future__ import annotations

import torch
from torch import Tensor

from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError, ShapeError

_SCORES_ON_CPU, _SCORES_ON_GPU = 2**24, 2**28
_QUERIES_AT_ONCE = 1024
_NONE = -1


class RunningTopK:
    """The k nearest rows of a database that comes block by block, in any order.

    Greater similarity first; ties go to the smaller id. A query never finds the row of its own id, wherever that comes.
    The result does not depend on how the database is cut, except that similarities which differ by less than a float32
    product's rounding may change places.

    Args:
        queries: Float[B D], unit rows for cosine.
        query_ids: Int64[B], ids that are not to be found; None where queries are not rows of the database.
        k: how many, above 0.
    """

    def __init__(self, queries: Tensor, query_ids: Tensor | None, k: int) -> None:
        require_matrix(queries, "queries")
        if k < 1:
            raise ConfigError(f"k = {k}: must be at least 1")
        if query_ids is not None and tuple(query_ids.shape) != (len(queries),):
            raise ShapeError(f"query_ids has shape {tuple(query_ids.shape)}: one id for each of {len(queries)} queries")
        self._queries, self._k = queries.float(), k
        self._own = None if query_ids is None else query_ids.to(queries.device)
        self._similarity = self._queries.new_empty((len(queries), 0))
        self._ids = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)

    def update(self, block: Tensor, ids: Tensor) -> None:
        """Takes one block of the database.

        Args:
            block: Float[B' D], on any device.
            ids: Int64[B'], at least 0; unique over all blocks.

        Raises:
            ShapeError: the widths differ, or ids are not one per row.
        """
        require_matrix(block, "block", self._queries.shape[1])
        if tuple(ids.shape) != (len(block),):
            raise ShapeError(f"ids has shape {tuple(ids.shape)}: one id for each of {len(block)} rows is needed")
        if len(self._queries) == 0:
            return
        device = self._queries.device
        scores = _SCORES_ON_GPU if self._queries.is_cuda else _SCORES_ON_CPU
        size = max(self._k + 1, scores // len(self._queries))
        for rows, own in zip(torch.split(block, size), torch.split(ids, size), strict=True):
            if len(rows):
                self._take(rows.to(device).float(), own.to(device))

    def result(self) -> tuple[Tensor, Tensor]:
        """Int64[B k] ids and Float32[B k] similarities, nearest first; −1 and −inf after the last row seen."""
        missing = self._k - self._ids.shape[1]
        similarity = torch.nn.functional.pad(self._similarity, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(self._ids, (0, missing), value=_NONE)
        return ids.masked_fill(similarity == -torch.inf, _NONE), similarity

    def _take(self, block: Tensor, ids: Tensor) -> None:
        similarity = self._queries @ block.T
        if self._own is not None:
            _hide_own(similarity, self._own, ids)
        best, found = _block_top(similarity, ids, self._k)
        self._similarity, self._ids = _merged(
            torch.cat([self._similarity, best], dim=1), torch.cat([self._ids, found], dim=1), self._k
        )


def top_k(
    queries: Tensor,
    database: Tensor,
    k: int,
    *,
    query_ids: Tensor | None = None,
    database_ids: Tensor | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of the database with the greatest inner product with each query, exactly.

    Args:
        queries: Float[B D], unit rows for cosine.
        database: Float[N D].
        k: how many; at most N, or N − 1 with `query_ids`.
        query_ids: Int64[B], the queries' own ids in the database, which are not to be found; None looks at all rows.
        database_ids: Int64[N], at least 0; None numbers the rows from 0.
        block: rows of the database compared at once; None fits the memory. Does not change the result.

    Returns:
        Int64[B k] ids, Float32[B k] similarities; greater similarity first, then smaller id.

    Raises:
        ConfigError: `k` is below 1 or above what the database can give.
        ShapeError: widths or numbers of ids differ.
    """
    require_matrix(database, "database", queries.shape[-1])
    available = len(database) - (query_ids is not None)
    if k > available:
        raise ConfigError(f"k = {k}: at most {available} of {len(database)} rows can be neighbours")
    ids = torch.arange(len(database)) if database_ids is None else database_ids
    found = []
    for start in range(0, max(len(queries), 1), _QUERIES_AT_ONCE):
        some = slice(start, start + _QUERIES_AT_ONCE)
        best = RunningTopK(queries[some], None if query_ids is None else query_ids[some], k)
        size = block or max(len(database), 1)
        for rows, own in zip(torch.split(database, size), torch.split(ids, size), strict=True):
            best.update(rows, own)
        found.append(best.result())
    return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])


def _hide_own(similarity: Tensor, own: Tensor, ids: Tensor) -> None:
    """Sets the similarity of each query to the row of its own id to −inf, in place."""
    ordered, order = ids.sort()
    place = torch.searchsorted(ordered, own).clamp_(max=len(ids) - 1)
    here = (ordered[place] == own).nonzero().squeeze(1)
    similarity[here, order[place[here]]] = -torch.inf


def _block_top(similarity: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of each row, Float[B k], and their ids; where ties cross the cut, the smaller ids stay."""
    values, where = similarity.topk(min(k + 1, len(ids)), dim=1)
    found = ids[where]
    if len(ids) <= k:
        return values, found
    # topk keeps any of the columns that tie at the cut: choose again where there is such a tie.
    cut = values[:, k - 1 : k]
    crossed = (values[:, k] == cut[:, 0]).nonzero().squeeze(1)
    values, found = values[:, :k], found[:, :k]
    for rows in torch.split(crossed, 64):
        tied = torch.where(similarity[rows] == cut[rows], ids, torch.iinfo(torch.int64).max)
        smallest = tied.topk(k, dim=1, largest=False)[0]
        above = values[rows] > cut[rows]
        place = torch.arange(k, device=ids.device) - above.sum(1, keepdim=True)
        found[rows] = torch.where(above, found[rows], smallest.gather(1, place.clamp(min=0)))
    return values, found


def _merged(similarity: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of each row by greater similarity, then by smaller id."""
    ids, order = ids.sort(dim=1)
    similarity = similarity.gather(1, order)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], ids.gather(1, order)[:, :k]
