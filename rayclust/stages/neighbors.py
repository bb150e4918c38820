"""neighbors: each row's nearest other rows by cosine, exact or through an inverted file with measured recall."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayclust.config import RunConfig
from rayclust.errors import DataError
from rayclust.features import FeatureTransform
from rayclust.search.index import build_index, load_index, without_self
from rayclust.search.knn import RunningTopK
from rayclust.stages.cluster import run_remotely
from rayclust.stages.outputs import Outputs, drop_stale_parts, put_bytes, put_table
from rayclust.stages.pipeline import StageContext, StageResult
from rayclust.stages.rows import part_features, row_starts, transform_of
from rayclust.stages.units import Unit, UnitResult, run_units
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import digest_of

logger = logging.getLogger(__name__)

UNIT_ROWS = 2048
"""Rows of the smallest unit; large sets take N / 64, so that each unit's pass over all rows is worth its reading."""
INVERTED_FILE = "ivf.faiss"


def run(context: StageContext) -> StageResult:
    """Searches unit by unit; a unit is a run of embedding parts."""
    config, encode = context.config, context.inputs["encode"]
    count = row_starts(encode)[-1]
    k = min(config.neighbors.k, count - 1)
    if k < 1:
        raise DataError(f"neighbors: the run has {count} row: at least 2 are needed")
    transform = transform_of(encode, config.features)
    starts = row_starts(encode)
    method, extra, outputs = _method(config, count), {}, {}
    if method == "ivf":
        extra, outputs = run_remotely(_build_inverted_file, context.run, starts, transform, k, config)
    inverted_file = next((written["digest"] for written in outputs.values()), None)
    job = _Search(context.run, starts, transform, k, inverted_file)
    units = _units(encode.extra["parts"], context.digest)
    results = run_units(context.run, "neighbors", units, job.search)
    drop_stale_parts(context.run.neighbors_folder, len(starts) - 1)
    for result in results:
        outputs |= result.outputs
    extra |= {"method": method, "k": k}
    recall = f", recall@{k} {extra['recall']:.3f}" if "recall" in extra else ""
    return StageResult(outputs, {"rows": count}, extra, f"{k} neighbours of {count:,} rows ({method}{recall})")


def _method(config: RunConfig, count: int) -> str:
    chosen = config.neighbors.method
    if chosen != "auto":
        return chosen
    return "ivf" if count > config.neighbors.exact_rows else "exact"


def _units(parts: list[int], digest: str) -> list[Unit]:
    """Groups of consecutive parts; the same for any number of workers."""
    wanted = max(UNIT_ROWS, sum(parts) // 64)
    units: list[Unit] = []
    group: list[int] = []
    rows = 0
    for index, count in enumerate(parts):
        group.append(index)
        rows += count
        if rows >= wanted or index == len(parts) - 1:
            units.append(Unit(len(units), digest_of([digest, group]), tuple(group), rows))
            group, rows = [], 0
    return units


class _Search:
    """What a unit's worker needs to know."""

    def __init__(
        self, run: Run, starts: list[int], transform: FeatureTransform, k: int, inverted_file: str | None = None
    ) -> None:
        self._run, self._starts, self._transform, self._k = run, starts, transform, k
        self._inverted_file = inverted_file

    def search(self, unit: Unit) -> UnitResult:
        """The neighbours of the rows of the unit's parts, written part by part."""
        torch.set_num_threads(1)
        queries = torch.from_numpy(np.concatenate([part_features(self._run, p, self._transform) for p in unit.payload]))
        rows = torch.cat([torch.arange(self._starts[p], self._starts[p + 1]) for p in unit.payload])
        if self._inverted_file is None:
            neighbors, similarity = self._exact(queries, rows)
        else:
            neighbors, similarity = self._inverted(queries, rows, self._inverted_file)
        outputs: Outputs = {}
        done = 0
        for part in unit.payload:
            count = self._starts[part + 1] - self._starts[part]
            some = slice(done, done + count)
            outputs |= self._write(part, rows[some], neighbors[some], similarity[some])
            done += count
        return UnitResult(outputs, {"rows": len(rows)})

    def _exact(self, queries: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best = RunningTopK(unit_rows(queries), rows, self._k)
        for block, ids in blocks(self._run, self._starts, self._transform):
            best.update(block, ids)
        return best.result()

    def _inverted(self, queries: torch.Tensor, rows: torch.Tensor, digest: str) -> tuple[torch.Tensor, torch.Tensor]:
        index = _load(filesystem.join(self._run.neighbors_folder, INVERTED_FILE), digest)
        ids, similarity = index.search(unit_rows(queries).numpy(), self._k + 1)
        found, nearness = map(torch.from_numpy, without_self(ids, similarity, rows.numpy()))
        short = (found < 0).any(dim=1)
        if short.any():  # the lists that were opened held too few: these rows are compared with all
            found[short], nearness[short] = self._exact(queries[short], rows[short])
        return found, nearness

    def _write(self, part: int, rows: torch.Tensor, neighbors: torch.Tensor, similarity: torch.Tensor) -> Outputs:
        columns = [
            pa.array(rows.numpy()),
            tables.fixed_list(neighbors.numpy().astype(np.int64)),
            tables.fixed_list(similarity.numpy().astype(np.float16)),
        ]
        table = pa.table(columns, schema=tables.NEIGHBORS(self._k))
        return put_table(self._run, self._run.neighbors(part), table)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1, whatever `features` left them at: neighbours are by cosine."""
    return torch.nn.functional.normalize(x, dim=1)


def blocks(run: Run, starts: list[int], transform: FeatureTransform) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Unit features and rows of every part, in order."""
    for part in range(len(starts) - 1):
        if starts[part + 1] > starts[part]:
            features = torch.from_numpy(part_features(run, part, transform))
            yield unit_rows(features), torch.arange(starts[part], starts[part + 1])


@lru_cache(1)
def _load(uri: str, digest: str) -> Any:
    """The inverted file at `uri`; a worker that lives on reads one of another digest anew."""
    return load_index(filesystem.read_bytes(uri))


def _build_inverted_file(
    run: Run, starts: list[int], transform: FeatureTransform, k: int, config: RunConfig
) -> tuple[dict[str, Any], Outputs]:
    """Builds the index over all rows in one worker and measures its recall against exact search."""

    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block, ids in blocks(run, starts, transform):
            yield block.numpy(), ids.numpy()

    index = build_index(
        stream, count=starts[-1], kind="ivf", seed=config.seed, k=k, min_recall=config.neighbors.min_recall
    )
    if index.recall < config.neighbors.min_recall:
        raise DataError(
            f"neighbors.min_recall = {config.neighbors.min_recall}: the inverted file reaches {index.recall:.3f}; "
            "lower the bound or set neighbors.method: exact"
        )
    uri = filesystem.join(run.neighbors_folder, INVERTED_FILE)
    outputs = put_bytes(run, uri, index.to_bytes())
    return {"recall": index.recall, "nlist": index.nlist, "nprobe": index.nprobe}, outputs
