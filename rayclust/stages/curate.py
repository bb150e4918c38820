"""Stage `curate`: duplicates, outliers, pruning and a balanced sample of a run's rows.

1. preparing: one worker hashes the stored rows, so that identical ones are one, and sorts the rest into clusters where
   the table of neighbours is not used.
2. searching: tasks find the near pairs, of the neighbours of a part or of the rows of some clusters.
3. curating: one worker decides, and writes a table for each part.

Workers map all rows, as features, from a file on their node; beside it they hold some numbers a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayclust.arrays import IntArray, unit_rows
from rayclust.clustering import outliers
from rayclust.clustering.balanced_sampling import (
    Levels,
    Points,
    allocate,
    draw,
    fit_levels,
    key_hashes,
    resampled_kmeans,
)
from rayclust.clustering.duplicates import (
    MOST_NEAR,
    Decision,
    Edges,
    cluster_pairs,
    decide,
    even_ranges,
    first_of_equal,
    ranks,
    recall,
)
from rayclust.clustering.row_stats import even_sample
from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, DataError
from rayclust.features import SpaceTransforms
from rayclust.runtime.cluster import on_every_node, run_remotely
from rayclust.runtime.pipeline import CURATE, StageContext, StageResult, settings_of
from rayclust.runtime.rows import (
    cache_folder,
    drop_cache,
    kept_aside,
    part_clusters,
    part_embeddings,
    table_at,
    transform_of,
    unit_transform,
)
from rayclust.runtime.tasks import Task, TaskResult, run_tasks
from rayclust.runtime.tensors import BLOCK, blocks, mapped
from rayclust.search.ivf import train_centers
from rayclust.store import storage, tables
from rayclust.store.manifest import (
    EncodeOutputs,
    Outputs,
    digest_of,
    drop_stale_parts,
    put_bytes,
    put_json,
    put_table,
    versions,
)
from rayclust.store.run import PART, Run

logger = logging.getLogger(__name__)

FOLDER = "curation"
FACTS = "curation.json"
"""Settings, counts, the curve over ε, and examples, in `FOLDER`."""
OUTLIERS_SHOWN = 100
GROUPS_SHOWN, GROUP_ROWS = 8, 6
PAIRS_SHOWN = 4
REASONS = ("", "identical", "near", "outlier", "prune", "sample")
"""Why a row is removed; the first is kept."""
_SAMPLED_PER_LIST = 64
_PAIRS_AT_ONCE = 2**15
_HALF_STEP = 2.0**-11
"""Similarities are stored in halves, which are this far apart below 1."""


def run(context: StageContext) -> StageResult:
    """Search near pairs task by task; decide and write in one worker."""
    config, encode = context.config, context.inputs["encode"]
    outputs = encode.outputs_of(EncodeOutputs)
    transform = unit_transform(outputs) if config.neighbors.features == "raw" else transform_of(encode, config.features)
    search = config.curate.duplicates.search
    if search == "auto":
        is_exact = sum(outputs.parts) <= config.neighbors.exact_rows and config.neighbors.spaces == "joint"
        search = "neighbors" if is_exact else "clusters"
    work = Curation(context.run, config, outputs, transform, context.digest, search == "neighbors")
    ranges = run_remotely(work.prepare)
    units = [range(rows) for rows in outputs.parts] if work.by_neighbors else ranges
    tasks = [Task(i, digest_of([context.digest, i]), unit, len(unit)) for i, unit in enumerate(units)]
    facts = {"wanted": 0, "compared": 0}

    def count(_: Task, result: TaskResult) -> None:
        for name in facts:
            facts[name] += result.extra.pop(name, 0)

    run_tasks(context.run, CURATE, tasks, work.search, on_result=count)
    written, found = run_remotely(work.curate, len(tasks), facts)
    # Marks first: without marks pairs are searched again, marks without pairs would be wrong.
    storage.remove_tree(context.run.at("manifests", CURATE))
    storage.remove_tree(work.at("scratch"))
    on_every_node(drop_cache, context.digest)
    for name in ("duplicates", "outliers", "curated"):
        drop_stale_parts(work.at(name), len(outputs.parts))
    counts = found["counts"]
    removed = ", ".join(f"{counts[reason]:,} {reason}" for reason in REASONS[1:] if counts[reason])
    summary = f"{counts['kept']:,} of {counts['rows']:,} rows kept" + (f" (not: {removed})" if removed else "")
    extra = {"epsilon": found["epsilon"], "recall": found["recall"]}
    return StageResult(written, counts, extra, summary)


@dataclass
class Columns:
    """What is known of each row that is curated, N of them; rows kept aside by a split are not."""

    rows: IntArray
    """Int64[N], rows of the run."""
    first: IntArray
    """Int64[N], the first row identical to each. All numbers of rows here are places in `rows`."""
    clusters: IntArray
    """Int32[N], the run's."""
    distance: NDArray[np.float32]
    """Float32[N], 1 − cos to the mean direction of the cluster."""
    scores: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Columns of the table of outliers."""
    reason: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))
    """Int8[N], index in `REASONS`."""


@dataclass(frozen=True)
class Curation:
    """The work of the stage's workers."""

    run: Run
    config: RunConfig
    encode: EncodeOutputs
    transform: SpaceTransforms
    digest: str
    by_neighbors: bool
    """Whether near pairs are those of the table of neighbours."""

    def at(self, *names: str) -> str:
        """Return the URI of one of the stage's files."""
        return self.run.at(FOLDER, *names)

    def _scratch(self, name: str) -> str:
        return self.at("scratch", self.digest, name)

    # 1. Preparing.

    def prepare(self) -> list[range]:
        """Find identical rows and, without the neighbours, sort the others into clusters; return ranges of these."""
        torch.set_num_threads(1)
        aside, spans = kept_aside(self.run, self.encode), enumerate(pairwise(self.encode.starts))
        first = first_of_equal(
            part_embeddings(self.run, part)[slice(None) if aside is None else ~aside[start:stop]]
            for part, (start, stop) in spans
        )
        rows = np.arange(self.encode.starts[-1]) if aside is None else np.flatnonzero(~aside)
        tables.write_table(self._scratch("rows.parquet"), pa.table({"row": rows, "first": first}))
        if self.by_neighbors:
            return []
        x, unique = self._rows(rows), np.flatnonzero(first == np.arange(len(first)))
        lists = max(1, round(len(unique) ** 0.5))
        sample = torch.from_numpy(unique)[even_sample(len(unique), _SAMPLED_PER_LIST * lists, self.config.seed)]
        centers = train_centers(x[sample], lists, self.config.seed)
        assigned = [centers.assign(x[ids]) for ids in torch.split(torch.from_numpy(unique), BLOCK)]
        # Rows in order of their clusters, ties by row, and where each cluster begins.
        clusters = torch.cat(assigned).numpy()
        order = np.argsort(clusters, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(clusters, minlength=len(centers.centers)))])
        tables.write_table(self._scratch("order.parquet"), pa.table({"place": unique[order]}))
        columns = {"end": bounds[1:], "center": tables.fixed_list(centers.centers.numpy())}
        tables.write_table(self._scratch("lists.parquet"), pa.table(columns))
        return even_ranges(bounds, max(BLOCK, len(unique) // 64))

    def _rows(self, rows: IntArray) -> Tensor:
        """Return Float32[N D] unit rows, mapped from a file on this node."""
        aside = kept_aside(self.run, self.encode)
        found = (block.numpy() for block, _ in blocks(self.run, self.encode.starts, self.transform, aside))
        return mapped(cache_folder(self.digest) / "unit.npy", (len(rows), self.encode.dimension), np.float32, found)

    # 2. Searching.

    def search(self, task: Task) -> TaskResult:
        """Write the near pairs of one part, or of some clusters, and the rows whose lists are full."""
        torch.set_num_threads(1)
        pairs, saturated, extra = (self._of_part if self.by_neighbors else self._of_clusters)(task)
        table = pa.table({"first": pairs.first, "second": pairs.second, "cosine": pairs.cosine})
        outputs = put_table(self.run, self._scratch(f"pairs-{task.index:05d}.parquet"), table)
        full = pa.table({"place": saturated})
        outputs |= put_table(self.run, self._scratch(f"full-{task.index:05d}.parquet"), full)
        return TaskResult(outputs, {"rows": task.size}, extra)

    def _of_part(self, task: Task) -> tuple[Edges, IntArray, dict[str, int]]:
        """Find the near pairs among the neighbours of one part's rows."""
        held = _read_scratch(self._scratch("rows.parquet"))
        rows, first = held["row"].to_numpy(), held["first"].to_numpy()
        least, own, found, similarity = (
            1 - self.config.curate.duplicates.largest_epsilon,
            *self._neighbors(task.index, rows, first),
        )
        near = similarity >= least - _HALF_STEP
        full = own[near.all(axis=1)] if near.shape[1] else own[:0]
        place, column = np.nonzero(near & (found != own[:, None]))
        i, j = own[place], found[place, column]
        cosine = _cosines(self._rows(rows), i, j)
        exact = cosine >= least
        return Edges.merge([Edges(i[exact], j[exact], cosine[exact])]), full, {"compared": near.size}

    def _neighbors(self, part: int, rows: IntArray, first: IntArray) -> tuple[IntArray, IntArray, NDArray[Any]]:
        """Return places Int64[n] of a part's rows that have no earlier identical one, and their neighbours.

        Returns:
            Places; Int64[n k] first rows identical to each neighbour; Float16[n k] similarities.
        """
        low, high = np.searchsorted(rows, self.encode.starts[part : part + 2])
        own = np.arange(low, high)
        own = own[first[low:high] == own]
        table = tables.read_table(self.run.neighbors(part), ["neighbors", "similarity"])
        local = rows[own] - self.encode.starts[part]
        neighbors, similarity = (tables.matrix(table[name])[local] for name in ("neighbors", "similarity"))
        return own, first[np.searchsorted(rows, neighbors)], similarity

    def _of_clusters(self, task: Task) -> tuple[Edges, IntArray, dict[str, int]]:
        """Find the near pairs of some clusters' rows."""
        order = _read_scratch(self._scratch("order.parquet"))["place"].to_numpy().copy()
        lists, options = _read_scratch(self._scratch("lists.parquet")), self.config.curate.duplicates
        bounds = np.concatenate([[0], lists["end"].to_numpy()])
        x = self._rows(_read_scratch(self._scratch("rows.parquet"))["row"].to_numpy())
        some = (x[ids].numpy() for ids in torch.split(torch.from_numpy(order), BLOCK))
        path, shape = cache_folder(self.digest) / "sorted.npy", (len(order), self.encode.dimension)
        found = cluster_pairs(
            mapped(path, shape, np.float32, some),
            bounds,
            torch.from_numpy(tables.matrix(lists["center"]).copy()),
            task.payload,
            epsilon=options.largest_epsilon,
            probes=options.probes,
        )
        pairs = found.pairs
        full = np.flatnonzero(np.bincount(pairs.first, minlength=len(order)) >= MOST_NEAR)
        renamed = Edges.merge([Edges(order[pairs.first], order[pairs.second], pairs.cosine)])
        return renamed, order[full], {"wanted": found.wanted, "compared": found.compared}

    # 3. Curating.

    def curate(self, tasks: int, facts: dict[str, int]) -> tuple[Outputs, dict[str, Any]]:
        """Decide about every row and write the stage's files; return also the content of `FACTS`."""
        torch.set_num_threads(1)
        options, seed = self.config.curate, self.config.seed
        held = tables.read_table(self._scratch("rows.parquet"))
        rows, first = held["row"].to_numpy(), held["first"].to_numpy()
        x = self._rows(rows)
        columns = self._scored(x, rows, first)
        columns.reason = np.zeros(len(rows), np.int8)
        hashes = np.concatenate([key_hashes(keys.to_pylist(), seed) for keys in self._part_columns("key", rows)])
        # 1. Duplicates.
        decision, searched = self._duplicates(x, columns, hashes, tasks)
        if options.duplicates.remove:
            copies = first != np.arange(len(rows))
            columns.reason[~decision.kept] = np.where(copies[~decision.kept], 1, 2)
        # 2. Outliers and prototypical rows.
        if options.outliers.remove:
            columns.reason[(columns.reason == 0) & columns.scores["flagged"]] = 3
        if options.prune.keep < 1:
            left = np.flatnonzero(columns.reason == 0)
            clusters = min(self.config.method.clusters, len(left))
            anew = resampled_kmeans(Points(x, left), clusters, 0, seed)
            spared = outliers.prune(anew.distances, anew.labels, **settings_of(options.prune))
            columns.reason[left[~spared]] = 4
        # 3. The sample.
        left = np.flatnonzero(columns.reason == 0)
        sample = self._sample(x, columns, left, hashes[left])
        columns.reason[left[sample.copies == 0]] = 5
        sizes = np.bincount(decision.group)
        groups = sizes[sizes > 1]
        tally = {name: int((columns.reason == code).sum()) for code, name in enumerate(REASONS) if code}
        counts = {
            "rows": len(rows),
            "kept": int((columns.reason == 0).sum()),
            "drawn": int(sample.copies.sum()),
        } | tally
        found = {
            "settings": settings_of(options),
            "seed": seed,
            "versions": versions(),
            "search": "neighbors" if self.by_neighbors else "clusters",
            "counts": counts,
            "epsilon": decision.epsilon,
            "curve": list(decision.curve),
            "groups": {"count": len(groups), "rows": int(groups.sum()), "largest": int(groups.max(initial=0))},
            "unscored": int(np.isnan(columns.scores["knn"]).sum()),
            "examples": _examples(decision, columns),
            **searched,
            "compared": facts["compared"],
        }
        if not self.by_neighbors:
            # Probes wanted by a row, and the skew of the clusters' sizes.
            unique = int((first == np.arange(len(rows))).sum())
            lengths = np.diff(tables.read_table(self._scratch("lists.parquet"))["end"].to_numpy(), prepend=0)
            found["probes_wanted"] = facts["wanted"] / unique
            found["skew"] = float((lengths.astype(float) ** 2).sum() / (unique**2 / len(lengths)))
        return self._write(x, columns, decision, sample, found), found

    def _part_columns(self, name: str, rows: IntArray) -> Iterator[pa.ChunkedArray]:
        """Yield a column of the rows, part by part, of the rows that are curated."""
        for part, (start, stop) in enumerate(pairwise(self.encode.starts)):
            low, high = np.searchsorted(rows, [start, stop])
            yield tables.read_table(self.run.rows(part), [name])[name].take(pa.array(rows[low:high] - start))

    def _scored(self, x: Tensor, rows: IntArray, first: IntArray) -> Columns:
        """Compute distances to the run's clusters, and the outlier scores; identical rows count as one."""
        from scipy import sparse

        # 1. Mean directions of the clusters, Float32[K D], in one pass; in a second angles to the nearest two.
        found, K = [], self.config.method.clusters
        for part, (start, stop) in enumerate(pairwise(self.encode.starts)):
            low, high = np.searchsorted(rows, [start, stop])
            found.append(part_clusters(self.run, part)[rows[low:high] - start])
        clusters = np.concatenate(found)
        sums: Any = np.zeros((K, x.shape[1]))
        for start in range(0, len(rows), BLOCK):
            own, block = clusters[start : start + BLOCK], x[start : start + BLOCK].double().numpy()
            members = sparse.csr_array((np.ones(len(own)), (own, np.arange(len(own)))), shape=(K, len(own)))
            sums = sums + members @ block
        means = torch.from_numpy(unit_rows(sums).astype(np.float32))
        distance, margin = np.empty(len(rows), np.float32), np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), BLOCK):
            some = slice(start, start + BLOCK)
            cosine = (x[some] @ means.T).clamp_(-1, 1)
            places = torch.from_numpy(clusters[some].astype(np.int64))
            distance[some] = 1 - cosine.gather(1, places[:, None])[:, 0].numpy()
            if K > 1:
                angles = cosine.topk(2, dim=1)[0].acos()
                margin[some] = (angles[:, 1] - angles[:, 0]).numpy()
        # 2. Scores by neighbours, in two passes: the ratio needs the distances of all.
        knn, ratio, in_degree = np.full(len(rows), np.nan), np.full(len(rows), np.nan), np.zeros(len(rows), np.int64)
        for part in range(len(self.encode.parts)):
            own, near, similarity = self._neighbors(part, rows, first)
            counted = _counted(own, near)
            knn[own] = outliers.knn_distances(similarity, counted)
            in_degree += np.bincount(near[counted], minlength=len(rows))
        for part in range(len(self.encode.parts)):
            own, near, _ = self._neighbors(part, rows, first)
            ratio[own] = outliers.distance_ratios(knn[own], knn, near, _counted(own, near))
        # 3. The order, among rows without an earlier identical one.
        unique = np.flatnonzero(first == np.arange(len(rows)))
        centroid_z, rank, flagged = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(len(rows), bool)
        centroid_z[unique] = outliers.robust_z(distance[unique], clusters[unique])
        share = self.config.curate.outliers.share
        rank[unique], flagged[unique] = outliers.oddest(knn[unique], centroid_z[unique], share)
        scores = {"knn": knn, "ratio": ratio, "centroid_z": centroid_z, "margin": margin, "in_degree": in_degree}
        scores |= {"rank": rank, "flagged": flagged}
        return Columns(rows, first, clusters, distance, {name: values[first] for name, values in scores.items()})

    def _duplicates(
        self, x: Tensor, columns: Columns, hashes: NDArray[np.uint64], tasks: int
    ) -> tuple[Decision, dict[str, Any]]:
        """Gather the pairs of all tasks and decide; return also how good the search was."""
        options, first = self.config.curate.duplicates, columns.first
        names = ("first", "second", "cosine")
        read = [tables.read_table(self._scratch(f"pairs-{task:05d}.parquet")) for task in range(tasks)]
        edges = Edges.merge(Edges(*(table[name].to_numpy() for name in names)) for table in read)
        saturated = np.zeros(len(first), bool)
        for task in range(tasks):
            saturated[tables.read_table(self._scratch(f"full-{task:05d}.parquet"))["place"].to_numpy()] = True
        unique = np.flatnonzero(first == np.arange(len(first)))
        drawn = np.sort(unique[np.argsort(hashes[unique], kind="stable")[: options.recall_rows]])
        share = recall(x, edges, drawn, options.largest_epsilon, unique) if len(drawn) else None
        decision = decide(
            x,
            edges,
            first,
            self._order(columns),
            saturated,
            policy=options.policy,
            largest=options.largest_epsilon,
            epsilon=options.epsilon if options.keep_share is None else None,
            keep_share=options.keep_share,
        )
        return decision, {"recall": share, "recall_rows": len(drawn), "saturated": int(saturated.sum())}

    def _order(self, columns: Columns) -> IntArray:
        """Return Int64[N], the place of each row in the order of `duplicates.keep`."""
        options, count = self.config.curate.duplicates, len(columns.rows)
        if options.values is None:
            is_first = options.keep == "first"
            return ranks(None if is_first else columns.distance, count, largest_first=options.keep == "hard")
        try:
            table = tables.read_table(storage.absolute(options.values), ["key", options.keep])
            names, numbers = table["key"].cast(pa.string()), table[options.keep].cast(pa.float64())
        except (ArtefactError, pa.ArrowException) as error:
            text = f"must be a table of key and numbers called {options.keep} ({error})"
            raise DataError(f"curate.duplicates.values = {options.values}: {text}") from None
        places = [pc.index_in(keys, value_set=names) for keys in self._part_columns("key", columns.rows)]
        values = pa.chunked_array([chunk for place in places for chunk in place.chunks], pa.int32())
        if values.null_count == count:
            raise DataError(f"curate.duplicates.values = {options.values}: has none of the run's keys")
        found = numbers.combine_chunks().take(values.combine_chunks())
        return ranks(np.nan_to_num(found.fill_null(-np.inf).to_numpy(zero_copy_only=False), nan=-np.inf), count)

    def _sample(self, x: Tensor, columns: Columns, left: IntArray, hashes: NDArray[np.uint64]) -> Sample:
        """Draw the sample from the rows that are left, of which there is one at least."""
        options, seed = self.config.curate.sample, self.config.seed
        points, K = Points(x, left), self.config.method.clusters
        own = Levels(columns.clusters[left].astype(np.int64), (), (K,), columns.distance[left])
        if options.rows is None or not len(left):
            return Sample(own, np.ones(len(left), np.int64), None)
        sizes: list[int] = []
        if options.levels == "auto":
            sizes = [size for size in (len(left) // 10**power for power in (2, 3, 4)) if size > 1]
        elif options.levels != "run":
            sizes = list(options.levels)
        levels = own
        if sizes:
            steps = [0] + [options.resamples] * (len(sizes) - 1)
            levels = fit_levels(points, sizes, steps=steps, seed=seed, weights=options.weights)
        if options.rows > options.copies * len(left):
            logger.warning(
                "curate.sample.rows = %d: only %d can be drawn from %d rows; raise sample.copies or lower it",
                *(options.rows, options.copies * len(left), len(left)),
            )
        quota = allocate(levels, options.rows, hashes, options.copies)
        return Sample(levels, draw(levels, quota[0], hashes, options.draw, points), quota)

    def _write(self, x: Tensor, columns: Columns, decision: Decision, sample: Sample, facts: dict[str, Any]) -> Outputs:
        """Write the tables part by part, the lists of keys, the levels and the facts."""
        rows, first, group = columns.rows, columns.first, decision.group
        sizes = np.bincount(group, minlength=len(rows))
        cosine = _cosines(x, np.arange(len(rows)), decision.keeper)
        copies, place = np.zeros(len(rows), np.int64), np.full(len(rows), -1)
        left = np.flatnonzero((columns.reason == 0) | (columns.reason == 5))
        copies[left], place[left] = sample.copies, np.arange(len(left))
        outputs: Outputs = {}
        kept, removed, broken = list[str](), list[str](), 0
        standing = np.unique(decision.keeper[sizes[group] > 1])
        # They lie in any part.
        standing_keys = table_at(self.run.rows, self.encode.starts, rows[standing], ["key"])["key"]
        spans = [np.searchsorted(rows, span) for span in pairwise(self.encode.starts)]
        for part, (keys, (low, high)) in enumerate(zip(self._part_columns("key", rows), spans, strict=True)):
            names, own = keys.combine_chunks(), np.arange(low, high)
            # 1. Duplicates: rows in groups of two or more.
            some = own[sizes[group[own]] > 1]
            keeper = np.searchsorted(standing, decision.keeper[some])
            duplicates = {
                "key": names.take(pa.array(some - low)),
                "row": rows[some],
                "group": rows[group[some]],
                "size": sizes[group[some]].astype(np.int32),
                "kept": decision.kept[some],
                "keeper": standing_keys.take(pa.array(keeper)),
                "cosine": cosine[some].astype(np.float32),
                "kind": pa.array(np.where(first[some] != some, "identical", "near")),
            }
            # 2. Outliers: all rows.
            scores = {name: values[own] for name, values in columns.scores.items()}
            narrow = {name: v.astype(np.float32) if v.dtype.kind == "f" else v for name, v in scores.items()}
            # 3. What is kept.
            drawn = own[copies[own] > 0]
            curated = {
                "key": names.take(pa.array(drawn - low)),
                "row": rows[drawn],
                "copies": copies[drawn].astype(np.int16),
                "path": pa.array(list(sample.levels.paths(place[drawn])), pa.list_(pa.int32())),
                "reason": pa.array(sample.reasons(place[drawn]), pa.string()),
            }
            for name, content in (
                ("duplicates", duplicates),
                ("outliers", {"key": names, "row": rows[own], **narrow}),
                ("curated", curated),
            ):
                table = pa.table(content).replace_schema_metadata({"digest": self.digest})
                outputs |= put_table(self.run, self.at(name, PART.format(part)), table)
            for key, number in zip(names.to_pylist(), columns.reason[own].tolist(), strict=True):
                if "\n" in key or "\r" in key:  # would be two lines
                    broken += 1
                    continue
                (removed if number else kept).append(f"{key}\t{REASONS[number]}\n" if number else f"{key}\n")
        if broken:
            logger.warning(
                "curate: %d keys hold line breaks and are in the tables alone, not in the .txt files", broken
            )
        outputs |= put_bytes(self.run, self.at("kept.txt"), "".join(kept).encode())
        outputs |= put_bytes(self.run, self.at("removed.txt"), "".join(removed).encode())
        outputs |= put_table(self.run, self.at("levels.parquet"), sample.table())
        return outputs | put_json(self.run, self.at(FACTS), facts)


@dataclass(frozen=True)
class Sample:
    """What is drawn of the rows that were left."""

    levels: Levels
    copies: IntArray
    """Int64[n], of each of these rows."""
    quota: list[IntArray] | None
    """Of the clusters of each level, finest first; None where all rows are taken."""

    def reasons(self, places: IntArray) -> list[str]:
        """Return why rows are in the sample: all are, their cluster is `whole`, or the cluster's `quota` took them."""
        if self.quota is None:
            return ["all"] * len(places)
        leaf = self.levels.leaves[places]
        sizes = np.bincount(self.levels.leaves, minlength=self.levels.clusters[0])
        return np.where(self.quota[0][leaf] >= sizes[leaf], "whole", "quota").tolist()

    def table(self) -> pa.Table:
        """Return a line for each cluster of each level; level 1 is that of the rows, and the last has no parent."""
        levels = self.levels
        rows = levels.sums(np.bincount(levels.leaves, minlength=levels.clusters[0]))
        drawn = levels.sums(np.bincount(levels.leaves, self.copies, levels.clusters[0]).astype(np.int64))
        parents = [*levels.parents, np.full(levels.clusters[-1], -1)]
        found = [
            {
                "level": np.full(count, level + 1, np.int32),
                "cluster": np.arange(count, dtype=np.int32),
                "parent": parents[level].astype(np.int32),
                "rows": rows[level],
                "quota": rows[level] if self.quota is None else self.quota[level],
                "drawn": drawn[level],
            }
            for level, count in enumerate(levels.clusters)
        ]
        return pa.concat_tables(map(pa.table, found))


def _cosines(x: Tensor, i: IntArray, j: IntArray) -> NDArray[np.float64]:
    """Return Float64[n], cosines of pairs of unit rows."""
    pairs = zip(*(torch.split(torch.from_numpy(ends), _PAIRS_AT_ONCE) for ends in (i, j)), strict=True)
    found = [(x[a].double() * x[b].double()).sum(1) for a, b in pairs]
    return np.asarray(torch.cat(found).numpy())


def _counted(own: IntArray, near: IntArray) -> NDArray[np.bool_]:
    """Return Bool[n k], the neighbours that count: not a row identical to the own, and of identical ones the first."""
    order = np.argsort(near, axis=1, kind="stable")
    ordered = np.take_along_axis(near, order, axis=1)
    is_new = np.ones(near.shape, bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counted = np.empty(near.shape, bool)
    np.put_along_axis(counted, order, is_new, axis=1)
    return counted & (near != own[:, None])


def _examples(decision: Decision, columns: Columns) -> dict[str, Any]:
    """Return rows to show: the largest groups, pairs just within several ε, the oddest rows."""
    rows, first, sizes = columns.rows, columns.first, np.bincount(decision.group)
    largest = np.argsort(-sizes, kind="stable")[:GROUPS_SHOWN]
    groups = []
    for group in largest[sizes[largest] > 1].tolist():
        members = np.flatnonzero(decision.group == group)
        order = np.lexsort((members, first[members] != members, ~decision.kept[members]))[:GROUP_ROWS]
        groups.append({"size": int(sizes[group]), "rows": rows[members[order]].tolist()})
    pairs = []
    for epsilon in (decision.epsilon / 10, decision.epsilon / 3, decision.epsilon):
        near = decision.edges.within(epsilon)
        last = np.argsort(near.cosine, kind="stable")[:PAIRS_SHOWN]
        found = [[int(rows[near.first[e]]), int(rows[near.second[e]]), round(float(near.cosine[e]), 4)] for e in last]
        pairs.append({"epsilon": epsilon, "pairs": found})
    unique = np.flatnonzero(first == np.arange(len(first)))
    odd = unique[np.argsort(-columns.scores["rank"][unique], kind="stable")[:OUTLIERS_SHOWN]]
    return {"groups": groups, "pairs": pairs, "outliers": rows[odd].tolist()}


_read_scratch = lru_cache(3)(tables.read_table)
"""Cached: a worker does many tasks. The URIs hold the stage's digest."""
