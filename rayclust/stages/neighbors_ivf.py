"""Neighbours by inverted lists over workers: rows are sorted into lists and searched shard by shard.

The tasks of each phase follow from the rows alone; each phase reads and writes an amount linear in them:

1. centres: k-means of a sample in one worker gives the lists.
2. sorting: each group of parts writes its rows in order of their lists, and which are nearest to a few queries.
3. probing: what all groups found are the queries' true neighbours; where these lie tells how many lists to open.
4. sharding: equally many rows in order of the lists, from all groups.
5. searching: the rows of a shard look into their lists, most of which lie in it.
6. collecting: each group of parts reads its rows' neighbours from the shards.

Every shard reads from every group, and every group from every shard: G · S requests. Beyond `FAN_IN` files some √G of
them are first merged with each other, for a range of what is wanted (merging, gathering), and then √G are read: about
4 · S · √G requests in both rounds together, and one more pass over the rows.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from rayclust.errors import ArtefactError, DataError
from rayclust.runtime.rows import rows_by_part
from rayclust.runtime.tasks import STORAGE_THREADS, Item, Result, Task, TaskResult, finished_tasks, run_tasks
from rayclust.runtime.tensors import unit_rows
from rayclust.search.index import recall_at_k
from rayclust.search.ivf import ListCenters, choose_probes, list_count, ranked_lists, train_centers
from rayclust.search.knn import TopKInt64, unpack_keys
from rayclust.store import storage
from rayclust.store.manifest import Outputs, digest_of, put_bytes, put_neighbors, read_unchanged
from rayclust.store.run import Run

THREADS = 16
"""Ranges that a worker reads at once."""
BLOCK_BYTES = 2**25
"""Rows of other shards that are compared at once."""
READ_BYTES = 2**27
"""Rows of other shards that are read at once."""
PAIRS_AT_ONCE = 2**22
"""Pairs of a row and a list that a worker keeps."""
QUERIES_AT_ONCE = 2**14
SEED = 0
"""Seed of the samples and the first centres; not the run's, since the recall that they give is measured."""
QUERIES = 1000
"""Most rows on which the recall is measured."""
SAMPLED_PER_LIST = 64
SAMPLE_BYTES = 2**32
"""Most bytes of the sample that trains the centres, as float32."""
SAMPLED_PARTS = 512
"""Most parts that the sample is read from."""
FAN_IN = 256
"""Most files that a task reads a range of; more are merged in two rounds."""
_BOUND = np.dtype("<i8")
logger = logging.getLogger(__name__)


# Scratch files: records, read in ranges, and arrays, read whole.


@dataclass(frozen=True)
class IvfLayout:
    """Division of the rows into parts, groups of parts, and shards of equally many rows."""

    run: Run
    digest: str
    """The stage's."""
    starts: Sequence[int]
    """First row of each part, and N."""
    groups: Sequence[tuple[int, ...]]
    """Consecutive parts of each group."""
    shard_rows: int
    """Rows of each shard but the last."""
    width: int
    """D."""
    k: int
    features: Callable[[int], np.ndarray] | None = None
    """Returns the features of a part's rows, Float32[B D]; any length. None: of no rows, the layout alone."""
    table: Callable[[int], str] | None = None
    """Returns the URI of a part's table of neighbours; None: the run's."""
    stage: str = "neighbors"
    """The stage whose marks the tasks leave, and below whose folder the scratch files lie."""
    first: int = 0
    """Number of the task of the first group."""

    @property
    def count(self) -> int:
        """N."""
        return self.starts[-1]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_rows)

    def units(self, part: int) -> Tensor:
        """Return Float32[B D], unit features of the rows of a part."""
        if self.features is None:
            raise ValueError("IvfLayout.features = None: the layout has no rows")
        return unit_rows(torch.from_numpy(self.features(part)))

    def span(self, group: int) -> tuple[int, int]:
        """Return the first row of a group and the one behind its last."""
        parts = self.groups[group]
        return self.starts[parts[0]], self.starts[parts[-1] + 1]

    def places(self, shard: int) -> tuple[int, int]:
        """Return the first position of a shard in the order of the lists and the one behind its last."""
        return shard * self.shard_rows, min(self.count, (shard + 1) * self.shard_rows)

    def at(self, kind: str, index: int = 0) -> str:
        """Return the URI of a file.

        Args:
            kind: of a group `sorted` or `nearest`, of a shard `shard` or `found`, of all `centers` or `lists`, and of
                the first of two rounds `merging` or `gathering`.
            index: of the group, the shard, or the task of that round.
        """
        return self.run.at(self.stage, "scratch", self.digest, f"{kind}-{index:05d}")


def row_records(width: int) -> np.dtype[Any]:
    """Return the record of a row: its number and unit features."""
    return np.dtype([("row", "<i8"), ("unit", "<f2", (width,))])


def found_records(k: int) -> np.dtype[Any]:
    """Return the record of a result: the row and its neighbours' keys (similarity and row in one integer)."""
    return np.dtype([("row", "<i8"), ("keys", "<i8", (k,))])


def put_records(run: Run, uri: str, records: np.ndarray, bounds: np.ndarray | None = None) -> Outputs:
    """Write records, sorted by group, behind the bounds of their groups, Int64[G + 1]; None: there are no groups."""
    return put_bytes(run, uri, (b"" if bounds is None else bounds.astype(_BOUND).tobytes()) + records.tobytes())


def read_bounds(uri: str, first: int, last: int) -> np.ndarray:
    """Return where groups `first` … `last` − 1 begin and the last ends, Int64[last − first + 1]; see `read_records`."""
    return read_records(uri, _BOUND, first, last + 1)


def read_records(uri: str, kind: np.dtype[Any], start: int, end: int, groups: int | None = None) -> np.ndarray:
    """Return the records `start` … `end` − 1 of a file with the bounds of so many groups before them, or without.

    Raises:
        ArtefactError: the file is shorter than that.
    """
    if end <= start:
        return np.empty(0, kind)
    head = 0 if groups is None else (groups + 1) * _BOUND.itemsize
    data = storage.read_bytes(uri, head + start * kind.itemsize, head + end * kind.itemsize)
    if len(data) != (end - start) * kind.itemsize:
        raise ArtefactError(f"{uri}: is shorter than was written; remove it and run `rayclust neighbors RUN.yaml`")
    return np.frombuffer(data, kind)


@dataclass(frozen=True)
class SortedFile:
    """A file of records in order of their keys, lists or groups of parts, behind the bounds of these."""

    uri: str
    first: int
    """The first key."""
    end: int
    """The one behind the last."""


def merge_sorted(
    files: Sequence[SortedFile], kind: np.dtype[Any], first: int, end: int, window: slice | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read the records of some keys from several files.

    Args:
        files: of each key in the order in which its records shall come.
        kind: of the records.
        first: key.
        end: the key behind the last.
        window: which of these records to read; None reads all.

    Returns:
        The records in order of (key, file), and where those of each key begin and the last ones end, without a window:
        Int64[end − first + 1].
    """
    files = [file for file in files if file.first < end and file.end > first]
    keys = [slice(max(first, file.first) - first, min(end, file.end) - first) for file in files]
    # 1. Where each file has its records of each key, and how many there are.
    spans = [
        (some.start + first - file.first, some.stop + first - file.first)
        for file, some in zip(files, keys, strict=True)
    ]
    own = map_threads(lambda n: read_bounds(files[n].uri, *spans[n]), range(len(files)))
    counts = np.zeros((len(files), end - first), np.int64)
    for n, some in enumerate(keys):
        counts[n, some] = np.diff(own[n])
    bounds = np.concatenate([[0], counts.sum(axis=0).cumsum()])
    low, high = (0, int(bounds[-1])) if window is None else (window.start, window.stop)
    # 2. Where these come: within a key the records of one file after those of another.
    begin = bounds[:-1] + counts.cumsum(axis=0) - counts
    records = np.empty(high - low, kind)

    def fill(n: int) -> None:
        start, size = int(own[n][0]), counts[n, keys[n]]
        places = np.repeat(begin[n, keys[n]] - own[n][:-1] + start, size) + np.arange(size.sum())
        some = slice(*np.searchsorted(places, [low, high]).tolist())
        count = files[n].end - files[n].first
        records[places[some] - low] = read_records(files[n].uri, kind, start + some.start, start + some.stop, count)

    map_threads(fill, range(len(files)))
    return records, bounds


def put_tensors(run: Run, uri: str, tensors: Mapping[str, Tensor]) -> Outputs:
    """Write arrays by name."""
    return put_bytes(run, uri, safetensors.torch.save({name: x.contiguous() for name, x in tensors.items()}))


def read_tensors(uri: str, digest: str) -> dict[str, Tensor]:
    """Return arrays by name; raise ArtefactError if the file's SHA-256 is not `digest`."""
    return safetensors.torch.load(read_unchanged(uri, digest, "neighbors"))


kept_tensors = lru_cache(1)(read_tensors)
"""Cached, for the file that a worker reads for each of its tasks."""


def map_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map a function over items in threads; results are in the order of the items."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(function, items))


# The phases.


def _train(layout: IvfLayout, index: int) -> TaskResult:
    """Train the lists' centres and draw the queries on which the recall is measured."""
    torch.set_num_threads(1)
    wanted, random = list_count(layout.count), np.random.default_rng(SEED)
    queries = np.sort(random.choice(layout.count, min(QUERIES, layout.count), replace=False))
    # A sample: rows of parts that are drawn, as large a share of each.
    most = max(wanted, min(SAMPLED_PER_LIST * wanted, SAMPLE_BYTES // (4 * layout.width)))
    counts = np.diff(layout.starts)
    filled = np.flatnonzero(counts)
    parts = np.sort(random.choice(filled, min(SAMPLED_PARTS, len(filled)), replace=False))
    share = min(1.0, most / counts[parts].sum())
    drawn = []
    for part in parts.tolist():
        count = int(counts[part])
        some = np.sort(random.choice(count, int(np.ceil(share * count)), replace=False))
        drawn.append(layout.units(part)[some])
    sample = torch.cat(drawn)
    centers = train_centers(sample, wanted, SEED)
    units = torch.cat([layout.units(part)[local] for part, local in rows_by_part(list(layout.starts), queries)])
    tensors = {"centers": centers.centers, "parents": centers.parents, "starts": centers.starts}
    tensors |= {"query": torch.from_numpy(queries), "query_unit": units.half()}
    return TaskResult(put_tensors(layout.run, layout.at("centers"), tensors), {"rows": len(sample)})


def _sort(layout: IvfLayout, centers: str, group: int) -> TaskResult:
    """Sort the rows of a group by (list, row), and find the nearest of them to the queries."""
    torch.set_num_threads(1)
    found = kept_tensors(layout.at("centers"), centers)
    lists = ListCenters(found["centers"], found["parents"], found["starts"])
    queries, query_rows = found["query_unit"].float(), found["query"]
    nearest, everyone = TopKInt64(len(queries), layout.k), torch.arange(len(queries))
    first, end = layout.span(group)
    units = torch.empty((end - first, layout.width), dtype=torch.float16)
    homes = torch.empty(end - first, dtype=torch.int64)
    for part in layout.groups[group]:
        start, stop = layout.starts[part : part + 2]
        if stop > start:
            own = layout.units(part).half()
            some = slice(start - first, stop - first)
            units[some], homes[some] = own, lists.assign(own.float())
            nearest.update(everyone, queries, query_rows, own.float(), torch.arange(start, stop))
    order = homes.argsort(stable=True)
    records = np.empty(end - first, row_records(layout.width))
    records["row"], records["unit"] = (first + order).numpy(), units[order].numpy()
    bounds = np.searchsorted(homes[order].numpy(), np.arange(len(lists.centers) + 1))
    outputs = put_records(layout.run, layout.at("sorted", group), records, bounds)
    # Lists of the rows found and of the queries, −1 outside the group.
    ids, _ = unpack_keys(nearest.keys)
    places = {"lists": ids - first, "homes": query_rows - first}
    known = torch.cat([homes, torch.tensor([-1])])
    tensors = {name: known[torch.where((x >= 0) & (x < len(homes)), x, -1)] for name, x in places.items()}
    tensors["keys"] = nearest.keys
    return TaskResult(outputs | put_tensors(layout.run, layout.at("nearest", group), tensors), {"rows": end - first})


def _probe(layout: IvfLayout, centers: str, nearest: Sequence[str], min_recall: float, index: int) -> TaskResult:
    """Compute the lists' bounds over all rows, the queries' true neighbours, and how many lists to probe."""
    torch.set_num_threads(1)
    found = read_tensors(layout.at("centers"), centers)
    nlist = len(found["centers"])
    # Keys of the queries' true neighbours Int64[q k], their lists Int64[q k], the queries' own lists Int64[q].
    keys = TopKInt64(len(found["query"]), layout.k).keys
    lists, homes = torch.full_like(keys, -1), torch.full((len(keys),), -1)
    for group, digest in enumerate(nearest):
        near = read_tensors(layout.at("nearest", group), digest)
        keys, order = torch.cat([keys, near["keys"]], dim=1).topk(layout.k, dim=1)
        lists = torch.cat([lists, near["lists"]], dim=1).gather(1, order)
        homes = torch.maximum(homes, near["homes"])
    # Sizes of the lists over all groups.
    sizes = np.zeros(nlist, np.int64)
    for first in range(0, len(layout.groups), STORAGE_THREADS):  # bounds of as many groups are held at a time
        some = range(first, min(first + STORAGE_THREADS, len(layout.groups)))
        for bounds in map_threads(lambda group: read_bounds(layout.at("sorted", group), 0, nlist), some):
            sizes += np.diff(bounds)
    reach, nprobe = choose_probes(
        found["centers"], torch.from_numpy(sizes), found["query_unit"].float(), homes, lists, min_recall
    )
    tensors = {name: found[name] for name in ("centers", "query")}
    tensors |= {"keys": keys, "bounds": torch.from_numpy(np.concatenate([[0], sizes.cumsum()]))}
    logger.debug("neighbors: %d of %d lists for a recall of %.3f, the nearest of %d", nprobe, nlist, min_recall, reach)
    return TaskResult(
        put_tensors(layout.run, layout.at("lists"), tensors),
        {"rows": layout.count},
        {"nlist": nlist, "reach": reach, "nprobe": nprobe},
    )


@dataclass(frozen=True)
class ListSearch:
    """The lists over all rows and the parameters of their search."""

    layout: IvfLayout
    digest: str
    """SHA-256 of the file with centres, bounds and queries."""
    nlist: int
    reach: int
    nprobe: int

    def cuts(self) -> list[int]:
        """Return the first list of every √S-th shard, and the number of lists."""
        bounds = read_tensors(self.layout.at("lists"), self.digest)["bounds"].numpy()
        places = np.arange(0, self.layout.shards, math.isqrt(self.layout.shards)) * self.layout.shard_rows
        return [*np.unique(np.searchsorted(bounds, places, "right") - 1).tolist(), self.nlist]

    def shard(self, files: Sequence[SortedFile], shard: int) -> TaskResult:
        """Merge sorted files of all rows into one shard, in order of (list, row)."""
        layout = self.layout
        bounds = kept_tensors(layout.at("lists"), self.digest)["bounds"].numpy()
        low, high = layout.places(shard)
        first, end = int(np.searchsorted(bounds, low, "right")) - 1, int(np.searchsorted(bounds, high, "left"))
        window = slice(low - int(bounds[first]), high - int(bounds[first]))
        records, _ = merge_sorted(files, row_records(layout.width), first, end, window)
        return TaskResult(put_records(layout.run, layout.at("shard", shard), records), {"rows": high - low})

    def search(self, shard: int) -> TaskResult:
        """Search the neighbours of a shard's rows, and count the hits of the queries among them."""
        torch.set_num_threads(1)
        layout = self.layout
        known = kept_tensors(layout.at("lists"), self.digest)
        low, high = layout.places(shard)
        own = _read(layout, low, high)
        best, halo = TopKInt64(high - low, layout.k), 0
        most = max(1024, PAIRS_AT_ONCE // self.nprobe)
        for start in range(low, high, most):
            places, lists = self._pairs(own, known, start, min(high, start + most))
            # The rows of these lists that lie in other shards.
            opened = lists.unique()
            first, end = known["bounds"][opened], known["bounds"][opened + 1]
            inside = (end.clamp(max=high) - first.clamp(min=low)).clamp(min=0)
            halo += int((end - first - inside).sum())
            for some, rows, units in _blocks(layout, own, places, lists, known["bounds"]):
                for queries in some.split(QUERIES_AT_ONCE):
                    best.update(queries, own.units[queries].float(), own.rows[queries], units, rows)
        # In order of the rows, for the groups of parts.
        order = own.rows.argsort()
        records = np.empty(high - low, found_records(layout.k))
        records["row"], records["keys"] = own.rows[order].numpy(), best.keys[order].numpy()
        bounds = np.searchsorted(records["row"], [layout.span(group)[0] for group in range(len(layout.groups))])
        outputs = put_records(layout.run, layout.at("found", shard), records, np.append(bounds, high - low))
        # True neighbours of the queries among the rows, and how many of these were found.
        query = known["query"].numpy()
        at = np.searchsorted(records["row"], query)
        is_here = records["row"][np.minimum(at, len(records) - 1)] == query
        found, near = unpack_keys(torch.from_numpy(records["keys"][at[is_here]]))
        truth, nearest = unpack_keys(known["keys"][torch.from_numpy(is_here)])
        recall = recall_at_k(found.numpy(), near.numpy(), truth.numpy(), nearest.numpy())
        measured = {"wanted": truth.numel(), "hits": round(recall * truth.numel())}
        return TaskResult(outputs, {"rows": high - low, "halo": halo}, measured)

    def _pairs(self, own: _Block, known: dict[str, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return Int64[p] rows (positions in the shard) and Int64[p] lists that they probe.

        In order of the list, but each row's own list first: its results prune most candidates of the others.
        """
        bounds, sizes = known["bounds"], known["bounds"].diff()
        options = {"k": self.layout.k, "reach": self.reach, "nprobe": self.nprobe}
        homes = torch.searchsorted(bounds, torch.arange(start, end), right=True) - 1
        found = []
        for home, count in zip(*(part.tolist() for part in homes.unique_consecutive(return_counts=True)), strict=True):
            first = max(start, int(bounds[home])) - own.low
            x = own.units[first : first + count].float()
            lists, opened = ranked_lists(known["centers"], sizes, x, home, **options)
            lists, places = lists[opened], first + opened.nonzero()[:, 0]
            found.append((places, torch.where(lists == home, lists, lists + self.nlist)))
        places, order = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
        order, by = order.sort(stable=True)
        return places[by], order % self.nlist


@dataclass(frozen=True)
class _Block:
    """Consecutive rows in the order of the lists."""

    low: int
    """Place of the first."""
    rows: Tensor
    """Int64[m]."""
    units: Tensor
    """Float16[m D]."""


def _read(layout: IvfLayout, low: int, high: int) -> _Block:
    """Read the rows at these positions from the shards that hold them."""
    kind, size = row_records(layout.width), layout.shard_rows
    parts = [
        read_records(layout.at("shard", shard), kind, max(low - start, 0), min(high, start + size) - start)
        for shard, start in ((shard, shard * size) for shard in range(low // size, -(-high // size)))
    ]
    records = parts[0] if len(parts) == 1 else np.concatenate(parts)
    rows, units = (torch.from_numpy(records[name].copy()) for name in ("row", "unit"))
    return _Block(low, rows, units)


def _blocks(
    layout: IvfLayout, own: _Block, places: Tensor, lists: Tensor, bounds: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the rows of lists with the rows that probe them; lists of another shard that lie close are read together.

    Close are lists with at most one between them: some requests fewer are worth a list that nobody probes.

    Args:
        layout: of the rows.
        own: rows of a shard.
        places: Int64[p], positions of the rows that probe.
        lists: Int64[p], equal ones side by side.
        bounds: Int64[L + 1].

    Yields:
        Int64[q] places, Int64[m] rows, Float32[m D]; a long list comes in several blocks.
    """
    opened, counts = lists.unique_consecutive(return_counts=True)
    spans = torch.stack([bounds[opened], bounds[opened + 1]], dim=1).tolist()
    is_close = ((opened.diff() > 0) & (opened.diff() <= 2)).tolist()
    most, ahead = (max(1, size // row_records(layout.width).itemsize) for size in (BLOCK_BYTES, READ_BYTES))
    other = _Block(0, own.rows[:0], own.units[:0])
    for index, some in enumerate(places.split(counts.tolist())):
        first, end = spans[index]
        for low in range(first, end, most):
            high = min(low + most, end)
            holders = (block for block in (own, other) if block.low <= low and high <= block.low + len(block.rows))
            block = next(holders, None)
            if block is None:
                stop, following = min(end, max(high, low + ahead)), index
                while stop == spans[following][1] and following < len(is_close) and is_close[following]:
                    following += 1
                    if spans[following][1] > low + ahead:
                        break
                    stop = spans[following][1]
                block = other = _read(layout, low, stop)
            part = slice(low - block.low, high - block.low)
            yield some, block.rows[part], block.units[part].float()


def collect(layout: IvfLayout, summary: dict[str, Any], files: Sequence[SortedFile], task: Task) -> TaskResult:
    """Write the tables of a group's parts from the results of all shards; its mark keeps recall and parameters."""
    group = task.index - layout.first
    records, _ = merge_sorted(files, found_records(layout.k), group, group + 1)
    records = records[records["row"].argsort()]
    first, end = layout.span(group)
    if not np.array_equal(records["row"], np.arange(first, end)):
        raise ArtefactError(f"neighbors: {len(records)} rows are there for the rows {first} to {end - 1}; run it again")
    neighbors, similarity = unpack_keys(torch.from_numpy(records["keys"].copy()))
    cosine = similarity.clamp(-1, 1)  # float16 makes some rows a little longer than 1
    uris = {part: (layout.table or layout.run.neighbors)(part) for part in layout.groups[group]}
    outputs = put_neighbors(layout.run, uris, layout.starts, neighbors.numpy(), cosine.numpy())
    return TaskResult(outputs, {"rows": end - first}, summary)


def search_ivf(layout: IvfLayout, min_recall: float, groups: Sequence[Task]) -> tuple[list[TaskResult], dict[str, Any]]:
    """Search the neighbours of all rows and write them part by part.

    Args:
        layout: of the rows.
        min_recall: wanted recall@k, from 0 to 1.
        groups: tasks of the layout's groups, numbered from `layout.first`; their marks outlive the scratch files.

    Returns:
        What `groups` wrote; recall, nlist, nprobe, and the halo: rows read from other shards for each row.

    Raises:
        DataError: the recall that was found is below the wanted one.
    """
    finished = finished_tasks(layout.run, layout.stage, groups)
    if len(finished) == len(groups):  # killed while the scratch files were removed
        results = [finished[task.index] for task in groups]
        return results, results[0].extra
    # Tasks of the phases before the last, one for each file, are numbered behind those of the last.
    numbers, count = itertools.count(layout.first + len(groups)), layout.count

    def run(section: str, sizes: Sequence[int], work: Callable[[int], TaskResult]) -> list[TaskResult]:
        tasks = [Task(next(numbers), digest_of([layout.digest, section, i]), i, n) for i, n in enumerate(sizes)]
        return run_tasks(layout.run, layout.stage, tasks, lambda task: work(task.payload), section=section)

    def in_rounds(
        section: str, kind: np.dtype[Any], files: Sequence[SortedFile], cuts: Callable[[], Sequence[int]]
    ) -> Sequence[SortedFile]:
        """Return the files, or where they are many those of a first round: each √F merged, for keys between cuts."""
        if len(files) <= FAN_IN:
            return files
        step = math.isqrt(len(files))
        batches = [files[start : start + step] for start in range(0, len(files), step)]
        pieces = [(batch, *keys) for batch in batches for keys in itertools.pairwise(cuts())]
        merged = [SortedFile(layout.at(section, n), first, end) for n, (_, first, end) in enumerate(pieces)]

        def merge(n: int) -> TaskResult:
            records, bounds = merge_sorted(pieces[n][0], kind, *pieces[n][1:])
            return TaskResult(put_records(layout.run, merged[n].uri, records, bounds), {"rows": len(records)})

        run(section, [count // len(pieces)] * len(pieces), merge)
        return merged

    shards = [high - low for low, high in map(layout.places, range(layout.shards))]
    [centers] = _digests(run("centres", [count], partial(_train, layout)))
    sort = partial(_sort, layout, centers)
    nearest = _digests(run("sorting", [task.size for task in groups], sort), "nearest")
    plan = run("probing", [count], partial(_probe, layout, centers, nearest, min_recall))
    [digest] = _digests(plan)
    lists = ListSearch(layout, digest, **plan[0].extra)
    rows: Sequence[SortedFile] = [SortedFile(layout.at("sorted", n), 0, lists.nlist) for n in range(len(groups))]
    rows = in_rounds("merging", row_records(layout.width), rows, lists.cuts)
    run("sharding", shards, partial(lists.shard, rows))
    found = run("searching", shards, lists.search)
    # The recall of the search's own results, over the queries of all shards.
    recall = sum(result.extra["hits"] for result in found) / sum(result.extra["wanted"] for result in found)
    if recall < min_recall:
        raise DataError(
            f"neighbors.min_recall = {min_recall}: the inverted file reaches {recall:.3f}; "
            "lower the bound or set neighbors.method: exact"
        )
    halo = round(sum(result.counts["halo"] for result in found) / count, 3)
    summary = {"recall": recall, "nlist": lists.nlist, "nprobe": lists.nprobe, "halo": halo}
    near: Sequence[SortedFile] = [SortedFile(layout.at("found", n), 0, len(groups)) for n in range(layout.shards)]
    step = math.isqrt(len(groups))
    near = in_rounds("gathering", found_records(layout.k), near, lambda: [*range(0, len(groups), step), len(groups)])
    work = partial(collect, layout, summary, near)
    results = run_tasks(layout.run, layout.stage, groups, work, section="collecting")
    return results, results[0].extra


def _digests(results: Sequence[TaskResult], kind: str = "") -> list[str]:
    """Return the digests of the files of a kind that tasks wrote, in their order."""
    return [
        written["digest"]
        for result in results
        for path, written in result.outputs.items()
        if path.rpartition("/")[2].startswith(kind)
    ]


def drop_scratch(run: Run, tasks: int, stage: str = "neighbors") -> None:
    """Remove scratch files, and the marks of all but the first `tasks` tasks.

    Marks go first: without marks the files are made again, marks without files would be wrong.
    """
    marks = storage.walk(run.at("manifests", stage), suffixes=(".json",), missing_ok=True)
    stale = [file.uri for file in marks if file.key.startswith("part-") and int(file.key[5:-5]) >= tasks]
    map_threads(storage.remove, stale)
    storage.remove_tree(run.at(stage, "scratch"))
