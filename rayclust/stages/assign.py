"""Stage `assign`: the cluster of every row, with the probability that the method gives it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayclust.clustering import hierarchy
from rayclust.config import RunConfig
from rayclust.errors import ConfigError
from rayclust.features import FeatureTransform
from rayclust.methods.base import Method, Prototypes
from rayclust.runtime.artefacts import drop_stale_parts, put_table
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.models import load_method
from rayclust.runtime.pipeline import Stage, StageContext, StageResult, content_digest, settings_of
from rayclust.runtime.rows import row_starts, transform_of
from rayclust.runtime.tasks import Task, TaskResult, run_tasks
from rayclust.store import tables
from rayclust.store.manifest import AssignOutputs, digest_of
from rayclust.store.run import Run


def run(context: StageContext) -> StageResult:
    """Assign part by part."""
    encode = context.inputs["encode"]
    transform = transform_of(encode, context.config.features)
    model = content_digest(context.inputs["train"])
    levels = _levels(context, model)
    work = _Assignment(context.run, transform, model, levels)
    units = [Task(i, digest_of([context.digest, i]), size=rows) for i, rows in enumerate(encode.extra["parts"])]
    sizes = np.zeros(context.config.method.clusters, np.int64)

    def add(unit: Task, result: TaskResult) -> None:  # K numbers for each of many parts would be as much as rows
        np.add(sizes, result.extra.pop("sizes"), out=sizes)

    results = run_tasks(context.run, "assign", units, work.assign, on_result=add)
    drop_stale_parts(context.run.assignments_folder, len(units))
    outputs = {path: written for result in results for path, written in result.outputs.items()}
    occupied = int((sizes > 0).sum())
    count = row_starts(encode)[-1]
    summary = f"{count:,} rows in {occupied} of {len(sizes)} clusters"
    extra = {"sizes": sizes.tolist()} | ({"levels": list(levels)} if levels else {})
    return StageResult(outputs, {"rows": count, "occupied": occupied}, extra, summary)


def _levels(context: StageContext, model: str) -> dict[int, np.ndarray]:
    """Return Int32[K] by number of clusters: each cluster's parent in each coarser level."""
    clusters = context.config.method.clusters
    sizes = [size for place, size in enumerate(context.config.assign.levels) if place or size != clusters]
    if not sizes:
        return {}
    found: dict[int, np.ndarray] = run_remotely(nested, context.run.uri, model, sizes, context.config.seed)
    return found


def nested(uri: str, model: str, sizes: list[int], seed: int) -> dict[int, np.ndarray]:
    """Return the levels above the clusters of a fitted method; see `clustering.hierarchy.nest`.

    Raises:
        ConfigError: the sizes do not fall, or the method's clusters have no prototypes.
    """
    method = load_method(uri, model)
    if not isinstance(method, Prototypes):
        raise ConfigError(f"assign.levels = {sizes}: {method.config.name} has no prototypes, remove the levels")
    levels = hierarchy.nest(method.prototypes(), sizes, seed)
    return {size: level.numpy().astype(np.int32) for size, level in zip(sizes, levels, strict=True)}


class _Assignment:
    """Assigns one part in a worker."""

    def __init__(self, run: Run, transform: FeatureTransform, model: str, levels: dict[int, np.ndarray]) -> None:
        self._run, self._transform, self._model, self._levels = run, transform, model, levels

    def assign(self, unit: Task) -> TaskResult:
        """Write the assignments of one part."""
        torch.set_num_threads(1)
        method = load_method(self._run.uri, self._model)
        table = tables.read_table(self._run.embeddings(unit.index), ["row", "key", "embedding"])
        features = self._transform(tables.matrix(table["embedding"]))
        clusters, confidence = assign(method, features)
        columns = [table["row"], table["key"], pa.array(clusters), pa.array(confidence)]
        columns += [pa.array(parents[clusters]) for parents in self._levels.values()]
        content = pa.table(columns, schema=tables.assignments(list(self._levels)))
        written = put_table(self._run, self._run.assignments(unit.index), content)
        sizes = np.bincount(clusters, minlength=method.config.clusters)
        return TaskResult(written, {"rows": table.num_rows}, {"sizes": sizes.tolist()})


def assign(method: Method, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable cluster of each row and its probability.

    Args:
        method: fitted.
        features: Float32[B D].

    Returns:
        Int32[B] and Float32[B].
    """
    if not len(features):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    with torch.inference_mode():
        probability, cluster = method.predict_proba(torch.from_numpy(features)).max(dim=1)
    return cluster.numpy().astype(np.int32), probability.float().numpy()


def _settings(config: RunConfig) -> dict[str, Any]:
    levels = {"levels": config.assign.levels, "seed": config.seed} if config.assign.levels else {}
    return {"features": settings_of(config.features)} | levels


STAGE = Stage("assign", _settings, run, needs=("encode", "train"), outputs=AssignOutputs)
