"""The second half of encode inside a Ray worker: chunks of pixels to embeddings, on a GPU or a CPU."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.config import RunConfig
from rayclust.encoders.base import GPU_BATCH
from rayclust.stages.meter import worker_name
from rayclust.stages.models import load_run_encoder, worker_device

COUNTS = pa.schema(
    [
        ("images", pa.int64()),
        ("rejected", pa.int64()),
        ("encoder", pa.string()),
        ("encoding", pa.float64()),
        ("writing", pa.float64()),
    ]
)
"""What a chunk leaves behind, beside the columns of its decoder; seconds."""
CPU_CHUNK = 32
"""Images that travel together where encoders are CPUs."""


def chunk_rows(config: RunConfig) -> int:
    """Images of a chunk: a pass of a GPU's network, or a second's work of a CPU's."""
    return config.encoder.batch_size or (GPU_BATCH if config.resources.gpus_per_worker else CPU_CHUNK)


class EncodeChunks:
    """Chunks of pixels to embeddings, handed to the writer of their shard; only counts and times go on."""

    def __init__(self, config: RunConfig, writers: list[Any]) -> None:
        self._encoder = load_run_encoder(config, worker_device(config))
        self._writers = writers

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encodes each chunk and hands it on; counts of images and rejects, and who took how long."""
        import ray

        done: list[dict[str, Any]] = []
        for row in range(batch.num_rows):
            unit = batch["unit"][row].as_py()
            records, rejects = batch["records"][row].as_py(), batch["rejects"][row].as_py()
            started = time.monotonic()
            embeddings = self._embeddings(batch["pixels"][row], len(records))
            encoded = time.monotonic()
            writer = self._writers[json.loads(unit)["index"] % len(self._writers)]
            chunk, last = batch["chunk"][row].as_py(), batch["last"][row].as_py()
            # Waiting here keeps the writers from falling behind without bound.
            written = ray.get(writer.add.remote(unit, chunk, last, records, rejects, embeddings))
            done.append({"images": len(records), "rejected": len(rejects), "encoder": worker_name()})
            done[-1] |= {"encoding": encoded - started, "writing": written}
        of_decoder = {name: batch[name].combine_chunks() for name in ("worker", "reading", "decoding")}
        table = pa.Table.from_pylist(done, schema=COUNTS)
        return pa.table(of_decoder | {name: table[name] for name in COUNTS.names})

    def _embeddings(self, pixels: pa.Scalar, count: int) -> np.ndarray:
        if not count:
            return np.zeros((0, self._encoder.dimension), np.float16)
        array = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(count, *self._encoder.preprocess.shape)
        with np.errstate(over="ignore"):  # what overflows becomes a reject
            return self._encoder.encode_images(array).astype(np.float16)
