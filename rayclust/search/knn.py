"""Exact nearest neighbours by inner product: blocks of the database with a running merge.

`RunningTopK` and `top_k` compare large blocks, on any device. `TopKInt64` is for many small products on a CPU: a
similarity and an id are one integer, so that a merge is one sort and ties need no care.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError, ShapeError
from rayclust.kernels.screening import MIN_COLUMNS, RoundedRows, has_fast_bf16, pair_products, screen

_SCORES_ON_CPU, _SCORES_ON_GPU = 2**24, 2**28
_QUERIES_AT_ONCE, _SCREENED_QUERIES_AT_ONCE = 1024, 8192
_SCREENED_QUERIES, _SCREENED_ROWS, _SCREENED_WIDTH = 1024, 4096, 64
_MIN_SCREENED_QUERIES = 64
_SCREENED_ROWS_PER_NEIGHBOR = 64
"""Least rows at once for each neighbour that is wanted: of fewer too many reach their bound."""
_MAX_WAITING = 2**22
_NO_ID = -1

_ID_BITS = 37
_MAX_IDS = 1 << _ID_BITS
_STEPS = 2**24
"""Steps of a similarity between 0 and 1: float32 has as many between one half and one."""
_NO_KEY = torch.iinfo(torch.int64).min
_KEYED_SCORES_AT_ONCE = 2**18
"""Measured: at 2**21 a product took twice the time for each score, for it left the processor's cache."""
_GROUP = 16


def _screens(queries: Tensor) -> bool:
    """Return whether Float[B D] queries are compared by way of bf16 products."""
    is_large = len(queries) >= _MIN_SCREENED_QUERIES and queries.shape[1] >= _SCREENED_WIDTH
    return is_large and queries.device.type == "cpu" and has_fast_bf16("cpu")


class RunningTopK:
    """The k nearest rows of a database that is read block by block, in any order.

    Greater similarity first; ties go to the smaller id. A query never finds the row of its own id. The cut of the
    database does not matter, but for similarities that differ by less than a float32 product's rounding.

    Args:
        queries: Float[B D], unit rows for cosine.
        query_ids: Int64[B], excluded ids; None where queries are not rows of the database.
        k: how many, above 0.

    Raises:
        ConfigError: `k` is below 1.
        ShapeError: `queries` is no matrix, or ids are not one per query.
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
        self._screens = _screens(queries)
        self._rounded: list[tuple[slice, RoundedRows]] = []
        self._waiting: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        self._seen = self._merged = 0

    def update(self, block: Tensor, ids: Tensor) -> None:
        """Compare the queries with one block of the database.

        Args:
            block: Float[B' D], on any device.
            ids: Int64[B'], at least 0; unique over all blocks.

        Raises:
            ShapeError: the widths differ, or ids are not one per row.
        """
        require_matrix(block, "block", self._queries.shape[1])
        if tuple(ids.shape) != (len(block),):
            raise ShapeError(f"ids has shape {tuple(ids.shape)}: one id for each of {len(block)} rows is needed")
        if len(self._queries) == 0 or len(block) == 0:
            return
        least = max(MIN_COLUMNS, _SCREENED_ROWS_PER_NEIGHBOR * self._k)
        pieces = max(1, len(block) // max(_SCREENED_ROWS, least)) if self._screens else 1
        for rows, row_ids in zip(block.tensor_split(pieces), ids.tensor_split(pieces), strict=True):
            if self._screens and len(rows) >= least:
                self._screen(rows.float().cpu(), row_ids.cpu())
            else:
                self._compare(rows, row_ids)

    def _screen(self, rows: Tensor, ids: Tensor) -> None:
        """Compare all queries with some rows by way of bf16 products; see `kernels/screening.py`."""
        if not self._rounded:
            start = 0
            for part in self._queries.tensor_split(-(-len(self._queries) // _SCREENED_QUERIES)):
                self._rounded.append((slice(start, start + len(part)), RoundedRows.of(part, padded=False)))
                start += len(part)
        rounded, found = RoundedRows.of(rows), list[tuple[Tensor, Tensor, Tensor]]()
        for span, queries in self._rounded:
            floor = self._similarity[span, -1] if self._similarity.shape[1] == self._k else None
            pairs = screen(queries, rounded, self._k + 1, floor)
            if pairs is None:  # rows that rounding cannot tell apart, here and probably later
                self._screens = False
                self._compare(rows, ids)
                return
            query, row = pairs
            value, near = pair_products(self._queries[span], rows, query, row), ids[row]
            if self._own is not None:
                other = near != self._own[span][query]
                query, value, near = query[other], value[other], near[other]
            found.append((query, value, near))
        self._waiting.append(found)
        # Merged whenever the rows seen have doubled: until then a floor lets in some k rows more than need be.
        self._seen += len(rows)
        held = sum(len(query) for part in self._waiting for query, _, _ in part)
        if self._seen >= 2 * self._merged or held > _MAX_WAITING:
            self._merge_waiting()

    def _merge_waiting(self) -> None:
        """Merge the pairs that wait, from a list in order of queries to a matrix of some queries at a time."""
        if not self._waiting:
            return
        merged = []
        for (span, queries), parts in zip(self._rounded, zip(*self._waiting, strict=True), strict=True):
            query, value, near = (torch.cat(columns) for columns in zip(*parts, strict=True))
            query, order = query.sort(stable=True)
            value, near = value[order], near[order]
            counts = torch.bincount(query, minlength=queries.count)
            bounds = functional.pad(counts.cumsum(0), (1, 0))
            width = int(counts.max())
            step = max(1, _MAX_WAITING // max(width, 1))
            for low in range(0, queries.count, step):
                high = min(low + step, queries.count)
                some = slice(int(bounds[low]), int(bounds[high]))
                place = query[some] - low, torch.arange(some.start, some.stop) - bounds[query[some]]
                similarity = value.new_full((high - low, width), -torch.inf)
                ids = near.new_full(similarity.shape, torch.iinfo(torch.int64).max)
                similarity[place], ids[place] = value[some], near[some]
                merged.append(self._largest(slice(span.start + low, span.start + high), similarity, ids))
        self._similarity, self._ids = (torch.cat(parts) for parts in zip(*merged, strict=True))
        self._merged = self._seen
        self._waiting.clear()

    def _largest(self, span: slice, similarity: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return Float32[b k] and Int64[b k], the k greatest of some queries' result and of others, ties by id."""
        similarity, ids = torch.cat([self._similarity[span], similarity], 1), torch.cat([self._ids[span], ids], 1)
        ids, order = ids.sort(dim=1)
        similarity, by_similarity = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
        return similarity[:, : self._k], ids.gather(1, by_similarity)[:, : self._k]

    def _compare(self, block: Tensor, ids: Tensor) -> None:
        """Compare all queries with some rows by float32 products."""
        k, device = self._k, self._queries.device
        scores = _SCORES_ON_GPU if self._queries.is_cuda else _SCORES_ON_CPU
        size = max(k + 1, scores // len(self._queries))
        for rows, row_ids in zip(torch.split(block, size), torch.split(ids, size), strict=True):
            rows, row_ids = rows.to(device).float(), row_ids.to(device)
            similarity = self._queries @ rows.T
            # 1. A query does not find its own row.
            if self._own is not None:
                ordered, order = row_ids.sort()
                place = torch.searchsorted(ordered, self._own).clamp_(max=len(rows) - 1)
                here = (ordered[place] == self._own).nonzero().squeeze(1)
                similarity[here, order[place[here]]] = -torch.inf
            # 2. The block's k greatest, with the smaller ids where a tie crosses the cut.
            best, where = similarity.topk(min(k + 1, len(rows)), dim=1)
            best_ids = row_ids[where]
            if len(rows) > k:
                # topk keeps any of the columns that tie at the cut: choose again where there is such a tie.
                cut = best[:, k - 1 : k]
                crossed = (best[:, k] == cut[:, 0]).nonzero().squeeze(1)
                best, best_ids = best[:, :k], best_ids[:, :k]
                for some in torch.split(crossed, 64):
                    tied = torch.where(similarity[some] == cut[some], row_ids, torch.iinfo(torch.int64).max)
                    smallest = tied.topk(k, dim=1, largest=False)[0]
                    above = best[some] > cut[some]
                    place = torch.arange(k, device=row_ids.device) - above.sum(1, keepdim=True)
                    best_ids[some] = torch.where(above, best_ids[some], smallest.gather(1, place.clamp(min=0)))
            # 3. Merge with the running result.
            self._similarity, self._ids = self._largest(slice(None), best, best_ids)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return Int64[B k] ids and Float32[B k] similarities, nearest first; −1 and −inf after the last row seen."""
        self._merge_waiting()
        missing = self._k - self._ids.shape[1]
        similarity = functional.pad(self._similarity, (0, missing), value=-torch.inf)
        ids = functional.pad(self._ids, (0, missing), value=_NO_ID)
        return ids.masked_fill(similarity == -torch.inf, _NO_ID), similarity


def top_k(
    queries: Tensor,
    database: Tensor,
    k: int,
    *,
    query_ids: Tensor | None = None,
    database_ids: Tensor | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return Int64[B k] ids and Float32[B k] similarities of the rows with the greatest inner products, exactly.

    Greater similarity first, then smaller id.

    Args:
        queries: Float[B D], unit rows for cosine.
        database: Float[N D].
        k: how many; at most N, or N − 1 with `query_ids`.
        query_ids: Int64[B], the queries' own ids in the database, which are excluded; None excludes nothing.
        database_ids: Int64[N], at least 0; None numbers the rows from 0.
        block: rows of the database compared at once; None fits the memory. Does not change the result.

    Raises:
        ConfigError: `k` is below 1 or above the number of rows that can be found.
        ShapeError: widths or numbers of ids differ.
    """
    require_matrix(database, "database", queries.shape[-1])
    available = len(database) - (query_ids is not None)
    if k > available:
        raise ConfigError(f"k = {k}: at most {available} of {len(database)} rows can be neighbours")
    ids = torch.arange(len(database)) if database_ids is None else database_ids
    size = block or max(len(database), 1)
    results, at_once = [], _SCREENED_QUERIES_AT_ONCE if _screens(queries) else _QUERIES_AT_ONCE
    for start in range(0, max(len(queries), 1), at_once):
        span = slice(start, start + at_once)
        best = RunningTopK(queries[span], None if query_ids is None else query_ids[span], k)
        for rows, row_ids in zip(torch.split(database, size), torch.split(ids, size), strict=True):
            best.update(rows, row_ids)
        results.append(best.result())
    return torch.cat([part[0] for part in results]), torch.cat([part[1] for part in results])


def nearest_others(x: Tensor, k: int) -> Tensor:
    """Return the k nearest other rows of each row by cosine, exactly, nearest first: Float[N D] to Int64[N k].

    Raises:
        ConfigError: `k` is below 1 or above N − 1.
        ShapeError: `x` is no matrix.
    """
    unit = functional.normalize(x, dim=-1)
    return top_k(unit, unit, k, query_ids=torch.arange(len(x), device=x.device))[0]


class TopKInt64:
    """The k nearest rows of each query, kept as int64 keys that order by similarity, then by smaller id.

    As `RunningTopK`, for many small products: each update compares some of the queries with some rows, and one
    comparison with a query's k-th best discards most of them. Similarities are kept in steps of 2⁻²⁴, what float32
    resolves below 1.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.keys = torch.full((queries, k), _NO_KEY, dtype=torch.int64)
        """Int64[Q k], nearest first; see `unpack_keys`."""

    def update(self, places: Tensor, queries: Tensor, own: Tensor, rows: Tensor, ids: Tensor) -> None:
        """Compare some queries with some rows, each pair once.

        Args:
            places: Int64[q], which queries, each at most once.
            queries: Float32[q D], unit or zero rows, up to rounding.
            own: Int64[q], excluded ids.
            rows: Float32[m D], unit or zero rows, up to rounding.
            ids: Int64[m], from 0 to 2³⁷ − 1.
        """
        if len(rows) == 0:
            return
        lowest = int(ids.min())
        size = max(16, _KEYED_SCORES_AT_ONCE // len(rows))
        for start in range(0, len(places), size):
            span = slice(start, start + size)
            kept = self.keys[places[span]]
            scores = queries[span] @ rows.T
            # 1. The least similarity with which a row may enter. One that ties with the last enters if its id is
            # smaller, which is known for the whole block at once mostly.
            last_ids, last = unpack_keys(kept[:, -1])
            floor = last + torch.where(last_ids < lowest, 0.5, -0.5) / _STEPS
            # Of the maxima of groups, one more than k (the query may be among them) are at least as large as this.
            group = min(_GROUP, scores.shape[1] // (2 * (self.k + 1)))
            if group > 1 and bool((kept[:, -1] == _NO_KEY).any()):
                whole = scores.shape[1] // group * group
                maxima = scores[:, :whole].reshape(len(scores), group, -1).amax(1)
                floor = torch.maximum(floor, maxima.topk(self.k + 1, dim=1)[0][:, -1] - 0.5 / _STEPS)
            # 2. Rows that may enter, as a sparse list: place among the queries, in order, and key.
            flat = torch.from_numpy(np.flatnonzero((scores >= floor[:, None]).numpy()))
            if not len(flat):
                continue
            row = flat // scores.shape[1]
            near = ids[flat - row * scores.shape[1]]
            key = pack_keys(scores.view(-1)[flat], near).masked_fill_(near == own[span][row], _NO_KEY)
            # 3. Pad the list to a matrix and keep the k greatest keys.
            counts = torch.bincount(row, minlength=len(kept))
            column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
            entered = kept.new_full((len(kept), int(counts.max())), _NO_KEY)
            entered[row, column] = key
            self.keys[places[span]] = torch.cat([kept, entered], dim=1).topk(self.k, dim=1)[0]


def pack_keys(similarity: Tensor, ids: Tensor) -> Tensor:
    """Return Int64[...] keys that order by similarity, then by smaller id.

    Args:
        similarity: Float[...], from −1.5 to 1.5, as the products of rounded unit rows may pass 1.
        ids: Int64[...], from 0 to 2³⁷ − 1.
    """
    steps = (similarity.clamp(-1.5, 1.5) * _STEPS).round().long()
    return steps * _MAX_IDS + (_MAX_IDS - 1 - ids)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return Int64[...] ids and Float32[...] similarities of Int64[...] keys; −1 and −inf for an empty key."""
    steps = keys >> _ID_BITS
    ids = _MAX_IDS - 1 - (keys - (steps << _ID_BITS))
    missing = keys == _NO_KEY
    return ids.masked_fill(missing, _NO_ID), (steps.float() / _STEPS).masked_fill(missing, -torch.inf)


def agreeing_neighbors(
    ids: Sequence[Tensor], similarity: Sequence[Tensor], k: int, least: int = 3
) -> tuple[Tensor, Tensor]:
    """Return the neighbours that stand in the lists of all spaces, those of larger mean similarity first.

    Args:
        ids: Int64[B M_s] for each space, each row's nearest others.
        similarity: Float[B M_s] for each space, their cosines.
        k: how many are kept at most.
        least: how many are kept at least; where fewer stand in all lists, then those that stand in most, and of these
            the most similar ones.

    Returns:
        Int64[B k], −1 behind the last; Float32[B k], the mean cosine in the spaces whose lists hold it, −1 behind.
    """
    spaces = len(ids)
    found, order = torch.cat(list(ids), dim=1).sort(dim=1, stable=True)
    cosines = torch.cat(list(similarity), dim=1).float().gather(1, order)
    # 1. Each id once, with the number of lists that hold it and the sum of its cosines.
    is_first = torch.ones_like(found, dtype=torch.bool)
    is_first[:, 1:] = found[:, 1:] != found[:, :-1]
    place = is_first.long().cumsum(1) - 1
    lists = torch.zeros_like(cosines).scatter_add_(1, place, torch.ones_like(cosines))
    mean = torch.zeros_like(cosines).scatter_add_(1, place, cosines) / lists.clamp(min=1)
    unique = torch.full_like(found, _NO_ID).scatter_(1, place, found)
    # 2. Those in more lists first, then the more similar ones; the smaller id where they are equal.
    rank = torch.where(lists > 0, 4 * lists + mean, torch.full_like(mean, -1.0))
    order = rank.argsort(dim=1, descending=True, stable=True)[:, :k]
    lists, mean, unique = (values.gather(1, order) for values in (lists, mean, unique))
    # 3. What all spaces agree on, and so many others that there are enough.
    is_kept = (lists == spaces) | ((lists > 0) & (torch.arange(order.shape[1], device=order.device) < least))
    missing = k - order.shape[1]
    kept, cosine = torch.where(is_kept, unique, _NO_ID), torch.where(is_kept, mean, -1.0)
    return functional.pad(kept, (0, missing), value=_NO_ID), functional.pad(cosine, (0, missing), value=-1.0)
