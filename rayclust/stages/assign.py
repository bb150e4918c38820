"""Stage `assign`: the cluster of every row, with a calibrated probability that it is right."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch

from rayclust.clustering import hierarchy
from rayclust.config import RunConfig
from rayclust.errors import ConfigError
from rayclust.features import SpaceTransforms
from rayclust.methods.base import Method, Prototypes
from rayclust.methods.settings import EMBEDDINGS
from rayclust.metrics.calibration import MEASURED_ROWS, MOST_ROWS, ROWS_PER_CLUSTER, Calibration, calibrate
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.encoder import worker_device
from rayclust.runtime.pipeline import Manifests, StageContext, StageResult, content_digest
from rayclust.runtime.rows import part_embeddings, row_starts, rows_by_part, transform_of
from rayclust.runtime.tasks import Task, TaskResult, run_tasks
from rayclust.runtime.tensors import load_method, method_inputs, transform_rows
from rayclust.store import tables
from rayclust.store.manifest import AssignOutputs, EncodeOutputs, Manifest, digest_of, drop_stale_parts, put_table
from rayclust.store.run import Run

CALIBRATION_PARTS = 64
"""Most parts of which the rows are drawn that confidence is calibrated on."""


def run(context: StageContext) -> StageResult:
    """Assign part by part."""
    encode, config = context.inputs["encode"], context.config
    model = content_digest(context.inputs["train"])
    clusters = config.method.clusters
    # 1. The coarser levels, each cluster's parent by number of clusters; the first may be the clusters themselves.
    coarser = [size for place, size in enumerate(config.assign.levels) if place or size != clusters]
    levels: dict[int, np.ndarray] = {}
    if coarser:
        levels = run_remotely(nested, context.run.uri, model, coarser, config.seed)
    # 2. What the method's probabilities are worth, on a sample.
    transform = transform_of(encode, config.features)
    calibration: Calibration = run_remotely(calibrated, context.run, row_starts(encode), transform, model)
    # 3. The parts.
    work = partial(_assign_part, config, transform, model, levels, calibration)
    tasks = [
        Task(i, digest_of([context.digest, i]), size=rows)
        for i, rows in enumerate(encode.outputs_of(EncodeOutputs).parts)
    ]
    sizes = np.zeros(clusters, np.int64)
    results = run_tasks(
        context.run,
        "assign",
        tasks,
        work,
        # Summed at once: K numbers for each of many parts would be as much as rows.
        on_result=lambda _, result: np.add(sizes, result.extra.pop("sizes"), out=sizes),
        gpus=config.resources.gpus,
    )
    drop_stale_parts(context.run.assignments_folder, len(tasks))
    outputs = {path: written for result in results for path, written in result.outputs.items()}
    occupied = int((sizes > 0).sum())
    count = row_starts(encode)[-1]
    summary = f"{count:,} rows in {occupied} of {len(sizes)} clusters"
    extra = {"sizes": sizes.tolist(), "calibration": asdict(calibration)} | ({"levels": list(levels)} if levels else {})
    return StageResult(outputs, {"rows": count, "occupied": occupied}, extra, summary)


def nested(uri: str, model: str, sizes: list[int], seed: int) -> dict[int, np.ndarray]:
    """Return each cluster's parent, Int32[K], in the levels above a fitted method's clusters, by level size.

    Raises:
        ConfigError: the sizes do not fall, or the method's clusters have no prototypes.
    """
    method = load_method(uri, model)
    if not isinstance(method, Prototypes):
        raise ConfigError(f"assign.levels = {sizes}: {method.config.name} has no prototypes, remove the levels")
    levels = hierarchy.nest(method.prototypes(), sizes, seed)
    return {size: level.numpy().astype(np.int32) for size, level in zip(sizes, levels, strict=True)}


def calibrated(run: Run, starts: list[int], transform: SpaceTransforms, model: str) -> Calibration:
    """Calibrate a fitted method's probabilities on a seeded sample of the run's rows."""
    torch.set_num_threads(1)
    method, rng = load_method(run.uri, model), np.random.default_rng(0)
    clusters, spans = method.config.clusters, [np.arange(*span) for span in pairwise(starts) if span[1] > span[0]]
    rows = np.concatenate([spans[i] for i in rng.permutation(len(spans))[:CALIBRATION_PARTS]])
    count = min(len(rows), MOST_ROWS, max(MEASURED_ROWS, ROWS_PER_CLUSTER * clusters))
    rows = np.sort(rng.permutation(rows)[:count])
    embeddings = np.concatenate([part_embeddings(run, part)[local] for part, local in rows_by_part(starts, rows)])
    embeddings = embeddings[rng.permutation(len(rows))]
    blocks = np.array_split(embeddings, -(-len(embeddings) // 4096))
    found = [assign(method, method_inputs(method, transform, block)) for block in blocks]
    labels, probability = (torch.from_numpy(np.concatenate(column)) for column in zip(*found, strict=True))
    features = transform(embeddings)
    if method.config.reads_pixels:  # what is near among bare pixels tells nothing
        features = transform_rows(method, features)
    return calibrate(torch.from_numpy(features), labels.long(), probability, clusters)


def calibration_of(config: RunConfig, encode: Manifest, train: Manifest) -> Calibration:
    """Return the calibration of the run's assignments; where they are not made yet, one that is made now."""
    assigned = Manifests(config).of("assign")
    kept = assigned.outputs_of(AssignOutputs).calibration if assigned is not None else None
    if kept is not None:
        return Calibration(**kept)
    return calibrated(
        Run(config.run, config.spaces), row_starts(encode), transform_of(encode, config.features), content_digest(train)
    )


def _assign_part(
    config: RunConfig,
    transform: SpaceTransforms,
    model: str,
    levels: dict[int, np.ndarray],
    calibration: Calibration,
    task: Task,
) -> TaskResult:
    """Write the assignments of one part, on a GPU where the worker has one."""
    torch.set_num_threads(1)
    run = Run(config.run, config.spaces)
    method = load_method(run.uri, model).to(worker_device(config))
    table = tables.read_table(run.rows(task.index), ["row", "key"])
    clusters, confidence = assign(method, method_inputs(method, transform, part_embeddings(run, task.index)))
    columns = [table["row"], table["key"], pa.array(clusters), pa.array(calibration(confidence))]
    columns += [pa.array(parents[clusters]) for parents in levels.values()]
    written = put_table(run, run.assignments(task.index), pa.table(columns, schema=tables.assignments(list(levels))))
    sizes = np.bincount(clusters, minlength=method.config.clusters)
    return TaskResult(written, {"rows": table.num_rows}, {"sizes": sizes.tolist()})


def assign(method: Method, features: np.ndarray | dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable clusters, Int32[B], and their probabilities, Float32[B], of `method_inputs`."""
    by_space = features if isinstance(features, dict) else {EMBEDDINGS: features}
    if not all(map(len, by_space.values())):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    x = {name: torch.from_numpy(values).to(method.device) for name, values in by_space.items()}
    with torch.inference_mode():
        probability, cluster = method.predict_proba(x if isinstance(features, dict) else x[EMBEDDINGS]).max(dim=1)
    return cluster.cpu().numpy().astype(np.int32), probability.float().cpu().numpy()
