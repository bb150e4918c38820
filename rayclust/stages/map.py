"""Stage `map`: a place on the plane for every row, by PaCMAP of all rows or of a sample, among which the others lie."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayclust.clustering.pacmap import CANDIDATES, near_pairs, place, planar_map
from rayclust.config import RunConfig
from rayclust.features import SpaceTransforms
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.encoder import worker_device
from rayclust.runtime.pipeline import StageContext, StageResult, content_digest
from rayclust.runtime.rows import features_at, part_features, row_starts, transform_of
from rayclust.runtime.tasks import Task, TaskResult, group_parts, run_tasks, search_task_rows
from rayclust.runtime.tensors import load_method, transform_rows, unit_rows
from rayclust.search.knn import RunningTopK
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, Outputs, drop_stale_parts, put_table
from rayclust.store.run import Run

BLOCK = 2048
"""Rows that are compared with all others at once."""
PLACED_BY = 5
"""Neighbours in the sample among which a row lies."""


def run(context: StageContext) -> StageResult:
    """Lay rows out in one worker; where these are not all, place the others task by task."""
    run, config, encode = context.run, context.config, context.inputs["encode"]
    starts, encoded = row_starts(encode), encode.outputs_of(EncodeOutputs)
    model = content_digest(context.inputs["train"]) if "train" in context.inputs else ""
    scratch = run.at("map", "scratch", f"{context.digest}.npz")
    work = _Mapping(run, config, starts, transform_of(encode, config.features), model, scratch)
    count, drawn = starts[-1], min(config.map.rows, starts[-1])
    drop_stale_parts(run.map_folder, len(starts) - 1)
    if drawn == count:
        outputs = run_remotely(work.lay_out, count)
    else:
        if not storage.exists(scratch):
            run_remotely(work.lay_out, drawn)
        rows = search_task_rows(count, encoded.dimension, PLACED_BY)
        tasks = group_parts(encoded.parts, context.digest, rows)
        results = run_tasks(run, "map", tasks, work.place_others, gpus=config.resources.gpus)
        outputs = {path: written for result in results for path, written in result.outputs.items()}
    storage.remove_tree(run.at("map", "scratch"))
    placed = "" if drawn == count else f", {count - drawn:,} of them placed among {drawn:,}"
    return StageResult(outputs, {"rows": count}, {"rows": drawn}, f"of {count:,} rows{placed}")


@dataclass(frozen=True)
class _Sample:
    """Rows that were laid out together."""

    rows: NDArray[np.int64]
    """Int64[n], sorted."""
    x: Tensor
    """Float32[n D], unit rows."""
    places: Tensor
    """Float32[n 2]."""


@dataclass(frozen=True)
class _Mapping:
    """The work of the stage's workers."""

    run: Run
    config: RunConfig
    starts: list[int]
    """First row of each part, and N."""
    transform: SpaceTransforms
    model: str
    """Digest of the method, whose own space is mapped; empty where it has none."""
    scratch: str
    """URI of the sample."""

    def lay_out(self, drawn: int) -> Outputs:
        """Lay out all rows, or a sample drawn by the seed, by PaCMAP of their exact neighbours among themselves.

        The places of all are written part by part, a sample and its places for `place_others`.
        """
        torch.set_num_threads(1)
        rows = np.arange(self.starts[-1])
        if drawn < len(rows):
            rng = np.random.default_rng(self.config.seed)
            rows = np.sort(rng.choice(len(rows), drawn, replace=False, shuffle=False))
        # 1. The neighbours.
        x = self._rows(features_at(self.run, self.starts, self.transform, rows))
        ids, wanted = torch.arange(len(x)), min(len(x) - 1, near_pairs(len(x)) + CANDIDATES)
        near, similarity = torch.zeros((len(x), wanted), dtype=torch.int64), torch.zeros((len(x), wanted))
        for some in torch.split(ids, BLOCK) if wanted else ():
            best = RunningTopK(x[some], some, wanted)
            best.update(x, ids)
            near[some], similarity[some] = best.result()
        # 2. The places.
        places, outputs = torch.from_numpy(planar_map(x, near, similarity, self.config.seed)), Outputs()
        if drawn < self.starts[-1]:
            buffer = io.BytesIO()
            np.savez(buffer, rows=rows, x=x.numpy(), places=places.numpy())
            storage.write_bytes(self.scratch, buffer.getvalue())
            return outputs
        for part, (start, stop) in enumerate(pairwise(self.starts)):
            outputs |= self._write(part, places[start:stop])
        return outputs

    def place_others(self, task: Task) -> TaskResult:
        """Write the places of the rows of a task's parts: their own in the sample, else among their nearest there."""
        torch.set_num_threads(1)
        sample, device = _read_sample(self.scratch), worker_device(self.config)
        outputs: Outputs = {}
        for part in task.payload:
            start, stop = self.starts[part : part + 2]
            places = torch.zeros((stop - start, 2))
            if stop > start:
                x = self._rows(part_features(self.run, part, self.transform))
                for at, block in zip(range(0, len(x), BLOCK), torch.split(x, BLOCK), strict=True):
                    best = RunningTopK(block.to(device), None, min(PLACED_BY, len(sample.rows)))
                    best.update(sample.x, torch.arange(len(sample.x)))
                    near, similarity = best.result()
                    places[at : at + BLOCK] = place(sample.places, near.cpu(), similarity.cpu())
                low, high = np.searchsorted(sample.rows, (start, stop))
                places[torch.from_numpy(sample.rows[low:high] - start)] = sample.places[low:high]
            outputs |= self._write(part, places)
        return TaskResult(outputs, {"rows": task.size})

    def _rows(self, features: NDArray[np.float32]) -> Tensor:
        """Return Float32[B D], unit rows of the method's own space where it has one, else of the features."""
        own = transform_rows(load_method(self.run.uri, self.model), features) if self.model else features
        return unit_rows(torch.from_numpy(own))

    def _write(self, part: int, places: Tensor) -> Outputs:
        start, stop = self.starts[part : part + 2]
        axes = places.numpy().astype(np.float32)
        table = pa.table([np.arange(start, stop), axes[:, 0], axes[:, 1]], schema=tables.MAP)
        return put_table(self.run, self.run.map(part), table)


@lru_cache(1)
def _read_sample(uri: str) -> _Sample:
    """Read the sample once in a worker that does many tasks; its URI holds the stage's digest."""
    with np.load(io.BytesIO(storage.read_bytes(uri))) as found:
        return _Sample(found["rows"], torch.from_numpy(found["x"]), torch.from_numpy(found["places"]))
