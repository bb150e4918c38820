"""index: a faiss index over unit embeddings, for search by image and by text; ids are rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from rayclust.config import IndexConfig
from rayclust.features import FeatureTransform
from rayclust.search.index import build_index
from rayclust.stages.cluster import run_remotely
from rayclust.stages.neighbors import blocks
from rayclust.stages.outputs import Outputs, put_bytes
from rayclust.stages.pipeline import StageContext, StageResult
from rayclust.stages.rows import row_starts
from rayclust.store import filesystem
from rayclust.store.layout import Run

ENCODER_INDEX = "encoder.faiss"
"""File of the index over the encoder's own space."""
UNIT = FeatureTransform(normalize=True)
"""The encoder's space as text and images share it: unit rows, not centred."""


def run(context: StageContext) -> StageResult:
    """Builds the index in one worker."""
    starts = row_starts(context.inputs["encode"])
    outputs, extra = run_remotely(_build, context.run, starts, context.config.index, context.config.seed)
    recall = f", recall@10 {extra['recall']:.3f}" if extra["kind"] == "ivf" else ""
    return StageResult(outputs, {"rows": starts[-1]}, extra, f"{extra['kind']} over {starts[-1]:,} rows{recall}")


def _build(run: Run, starts: list[int], config: IndexConfig, seed: int) -> tuple[Outputs, dict[str, Any]]:
    kind = config.kind
    if kind == "auto":
        kind = "ivf" if starts[-1] > config.flat_rows else "flat"

    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block, ids in blocks(run, starts, UNIT):
            yield block.numpy(), ids.numpy()

    index = build_index(stream, count=starts[-1], kind=kind, seed=seed, k=10)
    outputs = put_bytes(run, filesystem.join(run.index_folder, ENCODER_INDEX), index.to_bytes())
    return outputs, {"kind": kind, "recall": index.recall}
