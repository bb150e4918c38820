"""Stage `neighbors`: each row's nearest other rows by cosine, exact or through inverted lists with measured recall."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayclust.config import RunConfig
from rayclust.errors import ConfigError, DataError
from rayclust.features import SpaceTransforms
from rayclust.runtime.encoder import worker_device
from rayclust.runtime.pipeline import StageContext, StageResult
from rayclust.runtime.rows import fitted_count, kept_aside, part_features, row_starts, transform_of, unit_transform
from rayclust.runtime.tasks import Task, TaskResult, group_parts, run_tasks, search_task_rows
from rayclust.runtime.tensors import blocks, unit_rows
from rayclust.search.knn import RunningTopK, agreeing_neighbors
from rayclust.stages.neighbors_ivf import IvfLayout, drop_scratch, search_ivf
from rayclust.store import storage
from rayclust.store.manifest import EncodeOutputs, drop_stale_parts, put_neighbors
from rayclust.store.run import Run

_OLD_INDEX = "ivf.faiss"
"""Index that earlier versions left beside the tables."""


def run(context: StageContext) -> StageResult:
    """Search task by task; a task is a range of consecutive parts."""
    config, encode, extra = context.config, context.inputs["encode"], dict[str, Any]()
    starts, encoded = row_starts(encode), encode.outputs_of(EncodeOutputs)
    count, fitted = starts[-1], fitted_count(encode)
    k = min(config.neighbors.k, fitted - 1)
    if k < 1:
        raise DataError(f"neighbors: the run has {fitted} row: at least 2 are needed")
    is_raw = config.neighbors.features == "raw"
    transform = unit_transform(encoded) if is_raw else transform_of(encode, config.features)
    method = config.neighbors.method
    if method == "auto":
        method = "ivf" if count > config.neighbors.exact_rows and not encoded.test else "exact"
    if method == "ivf" and config.neighbors.spaces == "agree":
        raise ConfigError("neighbors.spaces = agree: needs exact neighbours; set neighbors.method: exact")
    rows = search_task_rows(count, encoded.dimension, k)
    tasks = group_parts(encoded.parts, context.digest, rows)
    if method == "ivf":
        groups = [task.payload for task in tasks]
        features = partial(part_features, context.run, transform=transform)
        layout = IvfLayout(context.run, context.digest, starts, groups, rows, encoded.dimension, k, features)
        results, extra = search_ivf(layout, config.neighbors.min_recall, tasks)
    else:
        search = partial(_search_exactly, config, encoded, transform, k)
        results = run_tasks(context.run, "neighbors", tasks, search, gpus=config.resources.gpus)
    drop_stale_parts(context.run.neighbors_folder, len(starts) - 1)
    drop_scratch(context.run, len(tasks))
    storage.remove(storage.join(context.run.neighbors_folder, _OLD_INDEX))
    outputs = {path: written for result in results for path, written in result.outputs.items()}
    extra |= {"method": method, "k": k}
    recall = f", recall@{k} {extra['recall']:.3f}" if "recall" in extra else ""
    return StageResult(outputs, {"rows": count}, extra, f"{k} neighbours of {count:,} rows ({method}{recall})")


def _search_exactly(
    config: RunConfig, encode: EncodeOutputs, transform: SpaceTransforms, k: int, task: Task
) -> TaskResult:
    """Search the neighbours of the rows of a task's parts and write them part by part, on a GPU where it has one.

    With a split all rows find theirs among the rows that are not kept aside.
    """
    torch.set_num_threads(1)
    run, starts, device = Run(config.run, config.spaces), encode.starts, worker_device(config)
    rows = torch.cat([torch.arange(starts[part], starts[part + 1]) for part in task.payload])
    aside = kept_aside(run, encode)

    def nearest(of: SpaceTransforms, wanted: int) -> tuple[Tensor, Tensor]:
        """Return the nearest others of the task's rows by some spaces, and their cosines."""
        queries = torch.from_numpy(np.concatenate([part_features(run, part, of) for part in task.payload]))
        best = RunningTopK(unit_rows(queries).to(device), rows, wanted)
        for block, ids in blocks(run, starts, of, aside):
            best.update(block, ids)
        ids, similarity = best.result()
        return ids.cpu(), similarity.cpu()

    if config.neighbors.spaces == "joint":
        neighbors, similarity = nearest(transform, k)
    else:
        most = min(2 * k, sum(encode.parts) - sum(encode.test) - 1)
        lists = [nearest(transform.only(space), most) for space in transform.transforms]
        neighbors, similarity = agreeing_neighbors([ids for ids, _ in lists], [cosines for _, cosines in lists], k)
    uris = {part: run.neighbors(part) for part in task.payload}
    outputs = put_neighbors(run, uris, starts, neighbors.numpy(), similarity.numpy())
    return TaskResult(outputs, {"rows": len(rows)})
