"""Stage `index`: faiss indexes with rows as ids, over unit embeddings and over the method's own space if it has one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayclust.config import RunConfig
from rayclust.features import FeatureTransform, SpaceTransforms
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.pipeline import StageContext, StageResult, content_digest
from rayclust.runtime.rows import features_at, part_features, row_starts, transform_of, unit_transform
from rayclust.runtime.spaces import ENCODER, OWN, OWN_INDEX, index_file
from rayclust.runtime.tasks import Task, TaskResult, run_tasks
from rayclust.runtime.tensors import blocks, load_method, transform_rows
from rayclust.search.index import build_index
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, Outputs, digest_of, put_bytes, put_json, put_table
from rayclust.store.run import PART, Run

RETRIEVAL = "retrieval.json"
"""A few rows with their nearest others in either space."""
QUERIES, SHOWN = 4, 8
"""How many rows, and how many others each."""
UNIT = FeatureTransform(normalize=True)
"""To unit rows."""

Nearest = list[list[dict[str, Any]]]
"""Each query's nearest rows, itself left out, with their cosines."""


def run(context: StageContext) -> StageResult:
    """Build the indexes, each in one worker."""
    run, encode, config = context.run, context.inputs["encode"], context.config
    starts, transform = row_starts(encode), transform_of(encode, config.features)
    # Example queries of the report, the same in both spaces.
    drawn = np.random.default_rng(config.seed).choice(starts[-1], min(QUERIES, starts[-1]), replace=False)
    queries, scratch = np.sort(drawn), run.at("index", "scratch", context.digest)
    model = content_digest(context.inputs["train"]) if "train" in context.inputs else ""
    gpus = config.resources.gpus
    work = _Indexing(run, config, encode.outputs_of(EncodeOutputs), queries, transform, model, scratch)
    first, *others = config.spaces or (None,)
    outputs, extra, nearest = run_remotely(work.index, first, gpus=gpus)
    summary = f"{extra['kind']} over {starts[-1]:,} rows{_recall(extra)}"
    for space in others:
        more, found, _ = run_remotely(work.index, space, gpus=gpus)
        outputs |= more
        extra["spaces"] = extra.get("spaces", {}) | {space: found}
        summary += f"; in {space}: {found['kind']}{_recall(found)}"
    if model:
        # All rows in the method's own space part by part, then their index in one worker.
        tasks = [Task(i, digest_of([context.digest, i]), size=n) for i, n in enumerate(work.encode.parts)]
        run_tasks(run, "index", tasks, work.represent)
        more, extra[OWN], own_nearest = run_remotely(work.index, OWN, gpus=gpus)
        # Marks first: without marks the rows are made again, marks without rows would be wrong.
        storage.remove_tree(run.at("manifests", "index"))
        storage.remove_tree(run.at("index", "scratch"))
        found = {"rows": queries.tolist(), ENCODER: nearest, OWN: own_nearest}
        outputs |= more | put_json(run, storage.join(run.index_folder, RETRIEVAL), found)
        summary += f"; in {OWN}: {extra[OWN]['kind']}{_recall(extra[OWN])}"
    return StageResult(outputs, {"rows": starts[-1]}, extra, summary)


def _recall(extra: dict[str, Any]) -> str:
    return f", recall@10 {extra['recall']:.3f}" if extra["kind"] == "ivf" else ""


@dataclass(frozen=True)
class _Indexing:
    """The work of the stage's workers."""

    run: Run
    config: RunConfig
    encode: EncodeOutputs
    queries: np.ndarray
    """Int64[q], sorted: rows."""
    transform: SpaceTransforms
    model: str
    """Digest of the method; empty where only the encoder's space is indexed."""
    folder: str
    """Scratch folder of rows in the own space, part by part: building the index may read them three times."""

    def represent(self, task: Task) -> TaskResult:
        """Write the rows of one part in the own space."""
        torch.set_num_threads(1)
        method = load_method(self.run.uri, self.model)
        rows = transform_rows(method, part_features(self.run, task.index, self.transform))
        table = pa.table({"z": tables.fixed_list(rows.astype(np.float16))})
        return TaskResult(
            put_table(self.run, storage.join(self.folder, PART.format(task.index)), table), {"rows": len(rows)}
        )

    def index(self, space: str | None) -> tuple[Outputs, dict[str, Any], Nearest]:
        """Build and write the index over a space, and search it for the queries.

        Args:
            space: of an encoder, None for the only one; `OWN` is the method's.
        """
        # 1. The queries, and a stream of the rows: building may read them several times.
        starts = self.encode.starts
        if space == OWN:
            features = features_at(self.run, starts, self.transform, self.queries)
            name, queries = OWN_INDEX, transform_rows(load_method(self.run.uri, self.model), features)
        else:
            unit = unit_transform(self.encode, space)
            name, queries = index_file(space, self.run.spaces), features_at(self.run, starts, unit, self.queries)

        def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            """Yield Float32[B d] unit rows with their numbers."""
            if space != OWN:
                for block, ids in blocks(self.run, starts, unit):
                    yield block.numpy(), ids.numpy()
                return
            for part, (start, stop) in enumerate(pairwise(starts)):
                if stop > start:
                    table = tables.read_table(storage.join(self.folder, PART.format(part)), ["z"])
                    yield UNIT(tables.matrix(table["z"])), np.arange(start, stop)

        # 2. The index.
        kind = self.config.index.kind
        if kind == "auto":
            kind = "ivf" if starts[-1] > self.config.index.flat_rows else "flat"
        index = build_index(stream, count=starts[-1], kind=kind, seed=self.config.seed, k=10)
        outputs = put_bytes(self.run, storage.join(self.run.index_folder, name), index.to_bytes())
        # 3. The nearest to the queries.
        ids, similarity = index.search(queries, SHOWN + 1)
        nearest = [
            [
                {"row": int(row), "similarity": round(float(s), 4)}
                for row, s in zip(some, near, strict=True)
                if row >= 0 and row != query
            ][:SHOWN]
            for some, near, query in zip(ids, similarity, self.queries, strict=True)
        ]
        return outputs, {"kind": kind, "recall": index.recall}, nearest
