"""The join over inverted lists from the sorted groups on: shards in order of the lists, their search, the parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayclust.errors import ArtefactError
from rayclust.search.index import recall_at_k
from rayclust.search.inverted_lists import Probing
from rayclust.search.packed import PackedTopK, unpack
from rayclust.stages.list_files import (
    Layout,
    at_once,
    found_records,
    kept_tensors,
    put_records,
    read_bounds,
    read_records,
    row_records,
)
from rayclust.stages.outputs import Outputs, put_neighbors
from rayclust.stages.units import Unit, UnitResult

BLOCK_BYTES = 2**25
"""Rows that are read at once from other shards."""
PAIRS_AT_ONCE = 2**22
"""Pairs of a row and a list that a worker keeps."""
QUERIES_AT_ONCE = 2**14


@dataclass(frozen=True)
class Lists:
    """The lists over all rows and how they are searched; what the workers need to know."""

    layout: Layout
    digest: str
    """SHA-256 of the file with centres, bounds and queries."""
    nlist: int
    reach: int
    nprobe: int

    def shard(self, shard: int) -> UnitResult:
        """Writes the rows of a shard, in order of (list, row), from what the groups have sorted."""
        layout, bounds = self.layout, self._tensors()["bounds"].numpy()
        low, high = layout.places(shard)
        kind = row_records(layout.width)
        first, end = int(np.searchsorted(bounds, low, "right")) - 1, int(np.searchsorted(bounds, high, "left"))
        groups = range(len(layout.groups))
        own = np.stack(at_once(lambda group: read_bounds(layout.at("sorted", group), first, end), groups))
        counts = np.diff(own, axis=1)
        # Within a list come the rows of one group after those of another.
        begin = bounds[first:end] + counts.cumsum(axis=0) - counts
        records = np.empty(high - low, kind)

        def fill(group: int) -> None:
            places = np.repeat(begin[group] - (own[group, :-1] - own[group, 0]), counts[group]) + np.arange(
                own[group, -1] - own[group, 0]
            )
            some = slice(*np.searchsorted(places, [low, high]))
            start, stop = own[group, 0] + some.start, own[group, 0] + some.stop
            found = read_records(layout.at("sorted", group), kind, int(start), int(stop), self.nlist)
            records[places[some] - low] = found

        at_once(fill, groups)
        return UnitResult(put_records(layout.run, layout.at("shard", shard), records), {"rows": high - low})

    def search(self, shard: int) -> UnitResult:
        """The neighbours of a shard's rows in order of the row, and the recall of the queries among them."""
        torch.set_num_threads(1)
        layout, known = self.layout, self._tensors()
        low, high = layout.places(shard)
        own = _read(layout, low, high)
        best, halo = PackedTopK(high - low, layout.k), 0
        most = max(1024, PAIRS_AT_ONCE // self.nprobe)
        for start in range(low, high, most):
            places, lists = self._pairs(own, known, start, min(high, start + most))
            halo += _outside(lists.unique(), known["bounds"], low, high)
            for some, rows, units in _blocks(layout, own, places, lists, known["bounds"]):
                for queries in some.split(QUERIES_AT_ONCE):
                    best.update(queries, own.units[queries].float(), own.rows[queries], units, rows)
        order = own.rows.argsort()
        records = np.empty(high - low, found_records(layout.k))
        records["row"], records["keys"] = own.rows[order].numpy(), best.keys[order].numpy()
        bounds = np.searchsorted(records["row"], [layout.span(group)[0] for group in range(len(layout.groups))])
        outputs = put_records(layout.run, layout.at("found", shard), records, np.append(bounds, high - low))
        counts = {"rows": high - low, "halo": halo}
        return UnitResult(outputs, counts, _measured(records, known["query"], known["keys"]))

    def _tensors(self) -> dict[str, Tensor]:
        return kept_tensors(self.layout.at("lists"), self.digest)

    def _pairs(self, own: _Held, known: dict[str, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
        """Int64[p] rows, by their places in the shard, and Int64[p] lists that they look into.

        In order of the list, but first each row's own: what is found there keeps most of the others out.
        """
        bounds = known["bounds"]
        probing = Probing(known["centers"], bounds.diff(), self.layout.k, self.reach, self.nprobe)
        homes = torch.searchsorted(bounds, torch.arange(start, end), right=True) - 1
        found = []
        for home, count in zip(*(part.tolist() for part in homes.unique_consecutive(return_counts=True)), strict=True):
            first = max(start, int(bounds[home])) - own.low
            places, lists = probing.opened(own.units[first : first + count].float(), home)
            found.append((first + places, torch.where(lists == home, lists, lists + self.nlist)))
        places, order = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
        order, by = order.sort(stable=True)
        return places[by], order % self.nlist


@dataclass(frozen=True)
class _Held:
    """Rows that follow each other in the order of the lists."""

    low: int
    """Place of the first."""
    rows: Tensor
    """Int64[m]."""
    units: Tensor
    """Float16[m D]."""

    def has(self, low: int, high: int) -> bool:
        """Whether all rows at these places are among them."""
        return self.low <= low and high <= self.low + len(self.rows)

    def part(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Int64[n] rows at these places, and Float32[n D]."""
        some = slice(low - self.low, high - self.low)
        return self.rows[some], self.units[some].float()


def _read(layout: Layout, low: int, high: int) -> _Held:
    """The rows at these places, from all shards that hold some."""
    kind, size = row_records(layout.width), layout.shard_rows
    parts = [
        read_records(layout.at("shard", shard), kind, max(low - start, 0), min(high, start + size) - start)
        for shard, start in ((shard, shard * size) for shard in range(low // size, -(-high // size)))
    ]
    records = parts[0] if len(parts) == 1 else np.concatenate(parts)
    rows, units = (torch.from_numpy(records[name].copy()) for name in ("row", "unit"))
    return _Held(low, rows, units)


def _blocks(
    layout: Layout, own: _Held, places: Tensor, lists: Tensor, bounds: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows of lists, with those who look into them; lists side by side in another shard are read together.

    Args:
        layout: of the rows.
        own: rows of a shard.
        places: Int64[p] of those who look.
        lists: Int64[p], equal ones side by side.
        bounds: Int64[L + 1].

    Returns:
        Int64[q] places, Int64[m] rows, Float32[m D]; a long list comes in several blocks.
    """
    opened, counts = lists.unique_consecutive(return_counts=True)
    spans = torch.stack([bounds[opened], bounds[opened + 1]], dim=1).tolist()
    most = max(1, BLOCK_BYTES // row_records(layout.width).itemsize)
    other = _Held(0, own.rows[:0], own.units[:0])
    for index, some in enumerate(places.split(counts.tolist())):
        first, end = spans[index]
        for low in range(first, end, most):
            high = min(low + most, end)
            if not own.has(low, high) and not other.has(low, high):
                other = _read(layout, low, _run_end(high, spans[index + 1 :], low + most))
            yield some, *(own if own.has(low, high) else other).part(low, high)


def _run_end(end: int, spans: list[list[int]], most: int) -> int:
    """How far rows can be read in one go for lists that follow, up to a place."""
    for low, high in spans:
        if low != end or high > most:
            break
        end = high
    return end


def _outside(lists: Tensor, bounds: Tensor, low: int, high: int) -> int:
    """How many rows of some lists, Int64[l], lie before or behind these places."""
    first, end = bounds[lists], bounds[lists + 1]
    inside = (end.clamp(max=high) - first.clamp(min=low)).clamp(min=0)
    return int((end - first - inside).sum())


def _measured(records: np.ndarray, query: Tensor, keys: Tensor) -> dict[str, Any]:
    """How many true neighbours the queries among the rows have, and how many of these were found.

    Args:
        records: of `found_records`, sorted by row.
        query: Int64[q], sorted.
        keys: Int64[q k] of their true neighbours.
    """
    at = np.searchsorted(records["row"], query.numpy())
    is_here = records["row"][np.minimum(at, len(records) - 1)] == query.numpy()
    (found, near), (truth, nearest) = (
        (part.numpy() for part in unpack(own))
        for own in (torch.from_numpy(records["keys"][at[is_here]]), keys[torch.from_numpy(is_here)])
    )
    return {"wanted": truth.size, "hits": round(recall_at_k(found, near, truth, nearest) * truth.size)}


def collect(layout: Layout, said: dict[str, Any], unit: Unit) -> UnitResult:
    """The tables of a group's parts, from what was found for the rows of all shards.

    Args:
        layout: of the rows.
        said: what the search has to say; kept in the marker, which is there when the scratch files have gone.
        unit: a group.
    """
    group, kind = unit.index, found_records(layout.k)

    def read(shard: int) -> np.ndarray:
        start, end = read_bounds(layout.at("found", shard), group, group + 1).tolist()
        return read_records(layout.at("found", shard), kind, start, end, len(layout.groups))

    records = np.concatenate(at_once(read, range(layout.shards)))
    records = records[records["row"].argsort()]
    first, end = layout.span(group)
    if not np.array_equal(records["row"], np.arange(first, end)):
        raise ArtefactError(f"neighbors: {len(records)} rows are there for the rows {first} to {end - 1}; run it again")
    outputs: Outputs = {}
    for part in layout.groups[group]:
        some = records[layout.starts[part] - first : layout.starts[part + 1] - first]
        neighbors, similarity = unpack(torch.from_numpy(some["keys"].copy()))
        cosine = similarity.clamp(-1, 1)  # float16 makes some rows a little longer than 1
        outputs |= put_neighbors(layout.run, part, some["row"].copy(), neighbors.numpy(), cosine.numpy())
    return UnitResult(outputs, {"rows": end - first}, said)
