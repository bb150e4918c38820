"""Running nearest neighbours whose similarity and id are one number each: a merge is one sort, a tie needs no care."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ID_BITS = 37
_MOST_IDS = 1 << _ID_BITS
_STEPS = 2**24
"""Steps of a similarity between 0 and 1: float32 has as many between one half and one."""
_NONE = torch.iinfo(torch.int64).min
_SCORES_AT_ONCE = 2**18
"""Measured: at 2**21 a product took twice the time for each score, for it left the processor's cache."""
_GROUP = 16


class PackedTopK:
    """The k nearest rows of each query, kept as int64 keys that order by similarity, then by smaller id.

    As `knn.RunningTopK`, for many small products: a block of rows comes for some of the queries, and rows that cannot
    enter are left out by one comparison with what the query has so far. Similarities are kept in steps of 2⁻²⁴,
    what float32 resolves below 1.

    Args:
        queries: number of queries.
        k: how many, above 0.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.keys = torch.full((queries, k), _NONE, dtype=torch.int64)
        """Int64[Q k], nearest first."""

    def update(self, places: Tensor, queries: Tensor, own: Tensor, rows: Tensor, ids: Tensor) -> None:
        """Compares some queries with some rows that they have not seen.

        Args:
            places: Int64[q], which queries, each at most once.
            queries: Float32[q D], unit or zero rows, up to rounding.
            own: Int64[q], ids that are not to be found.
            rows: Float32[m D], unit or zero rows, up to rounding.
            ids: Int64[m], from 0 to 2³⁷ − 1.
        """
        if len(rows) == 0:
            return
        lowest = int(ids.min())
        size = max(16, _SCORES_AT_ONCE // len(rows))
        for start in range(0, len(places), size):
            some = slice(start, start + size)
            kept = self.keys[places[some]]
            scores = queries[some] @ rows.T
            row, key = self._candidates(scores, kept, own[some], ids, lowest)
            if len(row):
                self.keys[places[some]] = _merged(kept, row, key)

    def _candidates(self, scores: Tensor, kept: Tensor, own: Tensor, ids: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
        """Those that may enter: Int64[c] places among the queries, in order, and Int64[c] keys."""
        found = scores >= self._floor(scores, kept[:, -1], lowest)[:, None]
        flat = torch.from_numpy(np.flatnonzero(found.numpy()))
        row = flat // scores.shape[1]
        near = ids[flat - row * scores.shape[1]]
        key = pack(scores.view(-1)[flat], near)
        return row, key.masked_fill_(near == own[row], _NONE)

    def _floor(self, scores: Tensor, last: Tensor, lowest: int) -> Tensor:
        """Float32[q]: what enters is at least so near."""
        ids, similarity = unpack(last)
        # A row that ties with the last enters if its id is smaller, which is known for the whole block at once mostly.
        floor = similarity + torch.where(ids < lowest, 0.5, -0.5) / _STEPS
        if bool((last == _NONE).any()):
            # Of the maxima of groups, one more than k (the query may be among them) are at least as large as this.
            group = min(_GROUP, scores.shape[1] // (2 * (self.k + 1)))
            if group > 1:
                whole = scores.shape[1] // group * group
                maxima = scores[:, :whole].reshape(len(scores), group, -1).amax(1)
                floor = torch.maximum(floor, maxima.topk(self.k + 1, dim=1)[0][:, -1] - 0.5 / _STEPS)
        return floor


def _merged(kept: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Int64[q k] of what was kept and of what came, Int64[c] keys at sorted places Int64[c]."""
    counts = torch.bincount(row, minlength=len(kept))
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    came = kept.new_full((len(kept), int(counts.max())), _NONE)
    came[row, column] = key
    return torch.cat([kept, came], dim=1).topk(kept.shape[1], dim=1)[0]


def pack(similarity: Tensor, ids: Tensor) -> Tensor:
    """Int64[...] keys of Float[...] similarities, from −1.5 to 1.5 as rounded rows may pass 1, and Int64[...] ids."""
    steps = (similarity.clamp(-1.5, 1.5) * _STEPS).round().long()
    return steps * _MOST_IDS + (_MOST_IDS - 1 - ids)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Int64[...] ids and Float32[...] similarities of Int64[...] keys; −1 and −inf where nothing was found."""
    steps = keys >> _ID_BITS
    ids = _MOST_IDS - 1 - (keys - (steps << _ID_BITS))
    missing = keys == _NONE
    return ids.masked_fill(missing, -1), (steps.float() / _STEPS).masked_fill(missing, -torch.inf)
