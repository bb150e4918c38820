"""Stage `index`: faiss indexes with rows as ids, over unit embeddings and over the method's own space if it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayclust.config import IndexConfig, RunConfig
from rayclust.features import FeatureTransform
from rayclust.methods import has_transform
from rayclust.runtime.artefacts import Outputs, put_bytes, put_json, put_table
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.models import load_method, transform_rows
from rayclust.runtime.pipeline import Stage, StageContext, StageResult, content_digest, settings_of
from rayclust.runtime.rows import blocks, features_at, part_features, row_starts, transform_of
from rayclust.runtime.tasks import Task, TaskResult, run_tasks
from rayclust.search.index import VectorIndex, build_index
from rayclust.store import storage, tables
from rayclust.store.manifest import IndexOutputs, digest_of
from rayclust.store.run import Run

ENCODER, OWN = "encoder", "z"
"""The spaces that a run can be searched in."""
ENCODER_INDEX, OWN_INDEX = "encoder.faiss", "z.faiss"
"""Files of the indexes."""
RETRIEVAL = "retrieval.json"
"""A few rows with their nearest others in either space."""
QUERIES, SHOWN = 4, 8
"""How many rows, and how many others each."""
UNIT = FeatureTransform(normalize=True)
"""The encoder's space as text and images share it: unit rows, not centred."""

Blocks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def run(context: StageContext) -> StageResult:
    """Build the indexes, each in one worker."""
    starts = row_starts(context.inputs["encode"])
    job = _Job(context.run, starts, context.config.index, context.config.seed)
    outputs, extra, found = run_remotely(_encoder, job)
    summary = f"{extra['kind']} over {starts[-1]:,} rows{_recall(extra)}"
    if "train" in context.inputs:
        more, extra[OWN], found[OWN] = _own_space(context, job)
        outputs |= more
        outputs |= put_json(context.run, storage.join(context.run.index_folder, RETRIEVAL), found)
        summary += f"; in {OWN}: {extra[OWN]['kind']}{_recall(extra[OWN])}"
    return StageResult(outputs, {"rows": starts[-1]}, extra, summary)


def _recall(extra: dict[str, Any]) -> str:
    return f", recall@10 {extra['recall']:.3f}" if extra["kind"] == "ivf" else ""


@dataclass(frozen=True)
class _Job:
    """Inputs of the workers."""

    run: Run
    starts: list[int]
    config: IndexConfig
    seed: int

    @property
    def queries(self) -> np.ndarray:
        """Int64[q], sorted: example queries of the report, the same in both spaces."""
        count = self.starts[-1]
        return np.sort(np.random.default_rng(self.seed).choice(count, min(QUERIES, count), replace=False))


def _encoder(job: _Job) -> tuple[Outputs, dict[str, Any], dict[str, Any]]:
    """Build the index over the encoder's space and search it for the queries."""

    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block, ids in blocks(job.run, job.starts, UNIT):
            yield block.numpy(), ids.numpy()

    outputs, extra, index = _build(job, stream, ENCODER_INDEX)
    queries = features_at(job.run, job.starts, UNIT, job.queries)
    return outputs, extra, {"rows": job.queries.tolist(), ENCODER: _nearest(index, queries, job.queries)}


def _build(job: _Job, stream: Blocks, name: str) -> tuple[Outputs, dict[str, Any], VectorIndex]:
    kind = job.config.kind
    if kind == "auto":
        kind = "ivf" if job.starts[-1] > job.config.flat_rows else "flat"
    index = build_index(stream, count=job.starts[-1], kind=kind, seed=job.seed, k=10)
    outputs = put_bytes(job.run, storage.join(job.run.index_folder, name), index.to_bytes())
    return outputs, {"kind": kind, "recall": index.recall}, index


def _nearest(index: VectorIndex, queries: np.ndarray, own: np.ndarray) -> list[list[dict[str, Any]]]:
    """Return each query's nearest rows, itself left out, with their cosines."""
    ids, similarity = index.search(queries, SHOWN + 1)
    return [
        [
            {"row": int(row), "similarity": round(float(s), 4)}
            for row, s in zip(some, near, strict=True)
            if row >= 0 and row != query
        ][:SHOWN]
        for some, near, query in zip(ids, similarity, own, strict=True)
    ]


def _own_space(context: StageContext, job: _Job) -> tuple[Outputs, dict[str, Any], list[list[dict[str, Any]]]]:
    """Transform all rows to the method's own space part by part, then index them in one worker."""
    encode = context.inputs["encode"]
    transform = transform_of(encode, context.config.features)
    model = content_digest(context.inputs["train"])
    work = _OwnSpace(job, transform, model, context.run.at("index", "scratch", context.digest))
    units = [Task(i, digest_of([context.digest, i]), size=n) for i, n in enumerate(encode.extra["parts"])]
    run_tasks(context.run, "index", units, work.represent)
    found: tuple[Outputs, dict[str, Any], list[list[dict[str, Any]]]] = run_remotely(work.build)
    # Marks first: without marks the rows are made again, marks without rows would be wrong.
    storage.remove_tree(context.run.at("manifests", "index"))
    storage.remove_tree(context.run.at("index", "scratch"))
    return found


@dataclass(frozen=True)
class _OwnSpace:
    """Rows in the own space, part by part, in a scratch folder: building the index may read them three times."""

    job: _Job
    transform: FeatureTransform
    model: str
    folder: str

    def represent(self, unit: Task) -> TaskResult:
        """Write the rows of one part."""
        torch.set_num_threads(1)
        run = self.job.run
        rows = transform_rows(load_method(run.uri, self.model), part_features(run, unit.index, self.transform))
        table = pa.table({"z": tables.fixed_list(rows.astype(np.float16))})
        return TaskResult(put_table(run, self._at(unit.index), table), {"rows": len(rows)})

    def build(self) -> tuple[Outputs, dict[str, Any], list[list[dict[str, Any]]]]:
        """Index all rows and search the queries."""
        job = self.job
        outputs, extra, index = _build(job, self._stream, OWN_INDEX)
        method = load_method(job.run.uri, self.model)
        queries = transform_rows(method, features_at(job.run, job.starts, self.transform, job.queries))
        return outputs, extra, _nearest(index, queries, job.queries)

    def _stream(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        starts = self.job.starts
        for part, start in enumerate(starts[:-1]):
            if starts[part + 1] > start:
                rows = tables.matrix(tables.read_table(self._at(part), ["z"])["z"])
                yield UNIT(rows), np.arange(start, starts[part + 1])

    def _at(self, part: int) -> str:
        return storage.join(self.folder, f"part-{part:05d}.parquet")


def _settings(config: RunConfig) -> dict[str, Any]:
    features = {"features": settings_of(config.features)} if has_transform(config.method.name) else {}
    return {"index": settings_of(config.index), "seed": config.seed} | features


STAGE = Stage("index", _settings, run, needs=("encode",), own_space_needs=("train",), outputs=IndexOutputs)
