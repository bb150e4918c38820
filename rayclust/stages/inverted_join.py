"""The inverted-file route of neighbors, over workers: rows are sorted into lists and searched shard by shard.

The phases work in units whose number follows from the rows alone; each reads and writes an amount linear in them:

1. centres: k-means of a sample gives the lists, in one worker.
2. sorting: each group of parts writes its rows in order of their lists, and which are nearest to a few queries.
3. probing: what all groups found are the queries' true neighbours; where these lie tells how many lists to open.
4. sharding: equally many rows in order of the lists, from all groups.
5. searching: the rows of a shard look into their lists, most of which lie in it.
6. collecting: each group of parts takes its rows' neighbours from the shards.

The last three are in `list_search`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayclust.errors import DataError
from rayclust.features import FeatureTransform
from rayclust.search.inverted_lists import ListCenters, choose_probes, list_count, train_centers
from rayclust.search.packed import PackedTopK, unpack
from rayclust.stages import list_search
from rayclust.stages.list_files import (
    Layout,
    at_once,
    kept_tensors,
    put_records,
    put_tensors,
    read_bounds,
    read_tensors,
    row_records,
)
from rayclust.stages.rows import features_at, part_features, unit_rows
from rayclust.stages.units import STORAGE_THREADS, Unit, UnitResult, finished, run_units
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.manifest import digest_of

logger = logging.getLogger(__name__)

STAGE = "neighbors"
SEED = 0
"""Of the samples and the first centres; not the run's, since the recall that they give is measured."""
QUERIES = 1000
"""Most rows on which the recall is measured."""
SAMPLED_PER_LIST = 64
SAMPLE_BYTES = 2**32
"""Most bytes of the sample that trains the centres, as float32."""
SAMPLED_PARTS = 512
"""Most parts that the sample is read from."""


def join(
    layout: Layout, transform: FeatureTransform, min_recall: float, units: Sequence[Unit]
) -> tuple[list[UnitResult], dict[str, Any]]:
    """The neighbours of all rows, written part by part.

    Args:
        layout: of the rows.
        transform: embeddings to features.
        min_recall: wanted recall@k, from 0 to 1.
        units: the layout's groups, numbered from 0; their markers stay when the scratch files go.

    Returns:
        What `units` wrote; recall, nlist, nprobe, and the halo: rows read from other shards for each row.

    Raises:
        DataError: the recall that was found is below the wanted one.
    """
    done = finished(layout.run, STAGE, units)
    if len(done) == len(units):  # a run that ended while the scratch files went
        results = [done[unit.index] for unit in units]
    else:
        said = _Phases(layout, transform, min_recall, units).run()
        collect = partial(list_search.collect, layout, said)
        results = run_units(layout.run, STAGE, units, collect, section="collecting")
    return results, results[0].extra


def drop_scratch(run: Run, units: int) -> None:
    """Removes scratch files, and the markers of all but the first so many units.

    Markers go first: without them the files are made again, without the files they would stand for nothing.
    """
    markers = filesystem.walk(run.at("manifests", STAGE), suffixes=(".json",), missing_ok=True)
    stale = [file.uri for file in markers if file.key.startswith("part-") and int(file.key[5:-5]) >= units]
    with ThreadPoolExecutor(STORAGE_THREADS) as threads:
        list(threads.map(filesystem.remove, stale))
    filesystem.remove_tree(run.at("neighbors", "scratch"))


class _Phases:
    """The phases before the last, one after the other; their units are numbered behind those of the last."""

    def __init__(self, layout: Layout, transform: FeatureTransform, min_recall: float, units: Sequence[Unit]) -> None:
        self._layout, self._min_recall = layout, min_recall
        self._sorting = _Sorting(layout, transform)
        self._groups, self._next = units, len(units)

    def run(self) -> dict[str, Any]:
        """What there is to say of the search, whose results lie in the scratch files."""
        layout = self._layout
        rows = [unit.size for unit in self._groups]
        own = [min(layout.shard_rows, layout.count - layout.places(shard)[0]) for shard in range(layout.shards)]
        centers = _digests(self._do("centres", [layout.count], self._sorting.train))
        sort = partial(self._sorting.sort, centers[0])
        nearest = _digests(self._do("sorting", rows, sort), "nearest")
        probe = partial(_probe, layout, centers[0], nearest, self._min_recall)
        plan = self._do("probing", [layout.count], probe)
        lists = list_search.Lists(layout, _digests(plan)[0], **plan[0].extra)
        self._do("sharding", own, lists.shard)
        found = self._do("searching", own, lists.search)
        halo = round(sum(result.counts["halo"] for result in found) / layout.count, 3)
        recall = self._recall([result.extra for result in found])
        return {"recall": recall, "nlist": lists.nlist, "nprobe": lists.nprobe, "halo": halo}

    def _do(self, section: str, sizes: Sequence[int], work: Callable[[int], UnitResult]) -> list[UnitResult]:
        """One phase: a unit for each of its files."""
        first, digest = self._next, self._layout.digest
        self._next += len(sizes)
        units = [Unit(first + i, digest_of([digest, section, i]), i, size) for i, size in enumerate(sizes)]
        return run_units(self._layout.run, STAGE, units, lambda unit: work(unit.payload), section=section)

    def _recall(self, measured: Sequence[dict[str, int]]) -> float:
        """Of the search's own results, over the queries of all shards."""
        hits, wanted = (sum(found[name] for found in measured) for name in ("hits", "wanted"))
        recall = hits / wanted
        if recall < self._min_recall:
            raise DataError(
                f"neighbors.min_recall = {self._min_recall}: the inverted file reaches {recall:.3f}; "
                "lower the bound or set neighbors.method: exact"
            )
        return recall


def _digests(results: Sequence[UnitResult], kind: str = "") -> list[str]:
    """Of the files of a kind that units wrote, in their order."""
    return [
        written["digest"]
        for result in results
        for path, written in result.outputs.items()
        if path.rpartition("/")[2].startswith(kind)
    ]


@dataclass(frozen=True)
class _Sorting:
    """Makes the lists, and sorts rows into them."""

    layout: Layout
    transform: FeatureTransform

    def train(self, index: int) -> UnitResult:
        """The lists' centres, and the queries on which the recall is measured."""
        torch.set_num_threads(1)
        layout, wanted = self.layout, list_count(self.layout.count)
        random = np.random.default_rng(SEED)
        queries = np.sort(random.choice(layout.count, min(QUERIES, layout.count), replace=False))
        most = max(wanted, min(SAMPLED_PER_LIST * wanted, SAMPLE_BYTES // (4 * layout.width)))
        sample = self._sample(random, most)
        found = train_centers(sample, wanted, SEED)
        units = unit_rows(torch.from_numpy(features_at(layout.run, list(layout.starts), self.transform, queries)))
        tensors = {"centers": found.centers, "parents": found.parents, "starts": found.starts}
        tensors |= {"query": torch.from_numpy(queries), "query_unit": units.half()}
        return UnitResult(put_tensors(layout.run, layout.at("centers"), tensors), {"rows": len(sample)})

    def _sample(self, random: np.random.Generator, most: int) -> Tensor:
        """Float32[S D]: rows of parts that are drawn, as large a share of each."""
        counts = np.diff(self.layout.starts)
        filled = np.flatnonzero(counts)
        parts = np.sort(random.choice(filled, min(SAMPLED_PARTS, len(filled)), replace=False))
        share = min(1.0, most / counts[parts].sum())
        found = []
        for part in parts.tolist():
            count = int(counts[part])
            some = np.sort(random.choice(count, int(np.ceil(share * count)), replace=False))
            found.append(part_features(self.layout.run, part, self.transform)[some])
        return unit_rows(torch.from_numpy(np.concatenate(found)))

    def sort(self, centers: str, group: int) -> UnitResult:
        """The rows of a group in order of (list, row), behind the lists' bounds; the nearest of them to the queries."""
        torch.set_num_threads(1)
        layout, found = self.layout, kept_tensors(self.layout.at("centers"), centers)
        lists = ListCenters(found["centers"], found["parents"], found["starts"])
        queries, query_rows = found["query_unit"].float(), found["query"]
        nearest, everyone = PackedTopK(len(queries), layout.k), torch.arange(len(queries))
        first, end = layout.span(group)
        units = torch.empty((end - first, layout.width), dtype=torch.float16)
        homes = torch.empty(end - first, dtype=torch.int64)
        for part in layout.groups[group]:
            start, stop = layout.starts[part : part + 2]
            if stop > start:
                own = unit_rows(torch.from_numpy(part_features(layout.run, part, self.transform))).half()
                some = slice(start - first, stop - first)
                units[some], homes[some] = own, lists.assign(own.float())
                nearest.update(everyone, queries, query_rows, own.float(), torch.arange(start, stop))
        order = homes.argsort(stable=True)
        records = np.empty(end - first, row_records(layout.width))
        records["row"], records["unit"] = (first + order).numpy(), units[order].numpy()
        bounds = np.searchsorted(homes[order].numpy(), np.arange(len(lists.centers) + 1))
        outputs = put_records(layout.run, layout.at("sorted", group), records, bounds)
        ids, _ = unpack(nearest.keys)
        tensors = {
            "keys": nearest.keys,
            "lists": _at_rows(homes, ids - first),
            "homes": _at_rows(homes, query_rows - first),
        }
        return UnitResult(
            outputs | put_tensors(layout.run, layout.at("nearest", group), tensors), {"rows": end - first}
        )


def _at_rows(homes: Tensor, places: Tensor) -> Tensor:
    """The lists of some rows, −1 for those that are not among the group's."""
    own = (places >= 0) & (places < len(homes))
    if not len(homes):
        return places.new_full(places.shape, -1)
    return homes[places.clamp(0, len(homes) - 1)].masked_fill(~own, -1)


def _probe(layout: Layout, centers: str, nearest: Sequence[str], min_recall: float, index: int) -> UnitResult:
    """The lists' bounds over all rows, the queries' true neighbours, and how many lists to open."""
    torch.set_num_threads(1)
    found = read_tensors(layout.at("centers"), centers)
    nlist = len(found["centers"])
    keys, lists, homes = _truth(layout, nearest, len(found["query"]))
    sizes = np.zeros(nlist, np.int64)
    for first in range(0, len(layout.groups), STORAGE_THREADS):  # bounds of as many groups are held at a time
        some = range(first, min(first + STORAGE_THREADS, len(layout.groups)))
        for bounds in at_once(lambda group: read_bounds(layout.at("sorted", group), 0, nlist), some):
            sizes += np.diff(bounds)
    reach, nprobe = choose_probes(
        found["centers"], torch.from_numpy(sizes), found["query_unit"].float(), homes, lists, min_recall
    )
    tensors = {name: found[name] for name in ("centers", "query")}
    tensors |= {"keys": keys, "bounds": torch.from_numpy(np.concatenate([[0], sizes.cumsum()]))}
    logger.debug("neighbors: %d of %d lists for a recall of %.3f, the nearest of %d", nprobe, nlist, min_recall, reach)
    return UnitResult(
        put_tensors(layout.run, layout.at("lists"), tensors),
        {"rows": layout.count},
        {"nlist": nlist, "reach": reach, "nprobe": nprobe},
    )


def _truth(layout: Layout, nearest: Sequence[str], queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the queries: Int64[q k] keys of the nearest of all rows, Int64[q k] lists of these, Int64[q] own lists."""
    best = PackedTopK(queries, layout.k).keys
    lists, homes = torch.full_like(best, -1), torch.full((queries,), -1)
    for group, digest in enumerate(nearest):
        own = read_tensors(layout.at("nearest", group), digest)
        best, order = torch.cat([best, own["keys"]], dim=1).topk(layout.k, dim=1)
        lists = torch.cat([lists, own["lists"]], dim=1).gather(1, order)
        homes = torch.maximum(homes, own["homes"])
    return best, lists, homes
