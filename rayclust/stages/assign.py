"""assign: the cluster of every row, with the probability that the method gives it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from rayclust.features import FeatureTransform
from rayclust.methods.base import Method
from rayclust.stages.models import load_method
from rayclust.stages.outputs import drop_stale_parts, put_table
from rayclust.stages.pipeline import StageContext, StageResult, content_digest
from rayclust.stages.rows import row_starts, transform_of
from rayclust.stages.units import Unit, UnitResult, run_units
from rayclust.store import tables
from rayclust.store.layout import Run
from rayclust.store.manifest import digest_of


def run(context: StageContext) -> StageResult:
    """Assigns part by part."""
    encode = context.inputs["encode"]
    transform = transform_of(encode, context.config.features)
    work = _Assignment(context.run, transform, content_digest(context.inputs["train"]))
    units = [Unit(i, digest_of([context.digest, i]), size=rows) for i, rows in enumerate(encode.extra["parts"])]
    results = run_units(context.run, "assign", units, work.assign)
    drop_stale_parts(context.run.assignments_folder, len(units))
    outputs = {path: written for result in results for path, written in result.outputs.items()}
    sizes = np.sum([result.extra["sizes"] for result in results], axis=0)
    occupied = int((sizes > 0).sum())
    count = row_starts(encode)[-1]
    summary = f"{count:,} rows in {occupied} of {len(sizes)} clusters"
    return StageResult(outputs, {"rows": count, "occupied": occupied}, {"sizes": sizes.tolist()}, summary)


class _Assignment:
    """What a unit's worker needs to know."""

    def __init__(self, run: Run, transform: FeatureTransform, model: str) -> None:
        self._run, self._transform, self._model = run, transform, model

    def assign(self, unit: Unit) -> UnitResult:
        """Writes the assignments of one part."""
        torch.set_num_threads(1)
        method = load_method(self._run.uri, self._model)
        table = tables.read_table(self._run.embeddings(unit.index), ["row", "key", "embedding"])
        features = self._transform(tables.matrix(table["embedding"]))
        clusters, confidence = assign(method, features)
        columns = [table["row"], table["key"], pa.array(clusters), pa.array(confidence)]
        written = put_table(self._run, self._run.assignments(unit.index), pa.table(columns, schema=tables.ASSIGNMENTS))
        sizes = np.bincount(clusters, minlength=method.config.clusters)
        return UnitResult(written, {"rows": table.num_rows}, {"sizes": sizes.tolist()})


def assign(method: Method, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable cluster of each row and its probability.

    Args:
        method: fitted.
        features: Float32[B D].

    Returns:
        Int32[B] and Float32[B].
    """
    if not len(features):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    with torch.inference_mode():
        probability, cluster = method.assign(torch.from_numpy(features)).max(dim=1)
    return cluster.numpy().astype(np.int32), probability.float().numpy()
