"""What runs inside Ray workers during encode: read and decode on CPUs, encode on GPUs or CPUs, one writer per shard.

A row of the Ray data set is a *chunk*: consecutive records of one shard, in the order of their keys. An embedding
depends on its image alone, to the bit: neither the cut nor the number of workers shows in the result.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.config import RunConfig
from rayclust.encoders.base import GPU_BATCH
from rayclust.encoders.decode import Preprocess, Undecodable, decode
from rayclust.stages.shards import write_shard
from rayclust.stages.units import Unit, write_marker
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.sources import Record, Shard, read_records

logger = logging.getLogger(__name__)

CPU_CHUNK = 32
"""Images that travel together where encoders are CPUs."""

RECORD = pa.struct([("key", pa.string()), ("uri", pa.string()), ("label", pa.string())])
REJECT = pa.struct([("key", pa.string()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
CHUNK = pa.schema(
    [
        ("unit", pa.string()),  # JSON of the shard's index and digest and of the row it is expected to start at
        ("chunk", pa.int32()),
        ("last", pa.bool_()),
        ("records", pa.list_(RECORD)),
        ("rejects", pa.list_(REJECT)),
        ("pixels", pa.large_binary()),  # uint8[B H W C], C order
    ]
)


def chunk_rows(config: RunConfig) -> int:
    """Images of a chunk: a pass of a GPU's network, or a second's work of a CPU's."""
    return config.encoder.batch_size or (GPU_BATCH if config.resources.gpus_per_worker else CPU_CHUNK)


class ReadAndDecode:
    """Input shards to chunks of pixels. Images that cannot be decoded become rejects with a reason."""

    def __init__(self, config: RunConfig, preprocess: Preprocess) -> None:
        self._rows = chunk_rows(config)
        self._max_bytes = config.images.max_bytes
        self._preprocess = preprocess

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Chunks of each shard named in `batch`, in order."""
        for unit, shard in zip(batch["unit"].to_pylist(), batch["shard"].to_pylist(), strict=True):
            yield from self._chunks(unit, Shard.from_json(filesystem.read_json(shard)))

    def _chunks(self, unit: str, shard: Shard) -> Iterator[pa.Table]:
        records = iter(read_records(shard, self._max_bytes))
        group = list(islice(records, self._rows))
        number = 0
        while True:
            following = list(islice(records, self._rows))
            yield self._chunk(unit, number, group, last=not following)
            if not following:
                return
            group, number = following, number + 1

    def _chunk(self, unit: str, number: int, group: list[Record], *, last: bool) -> pa.Table:
        kept: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        pixels: list[np.ndarray] = []
        for record in group:
            reason, detail = record.reason, record.detail
            if reason is None:
                try:
                    pixels.append(decode(record.data or b"", self._preprocess))
                    kept.append({"key": record.key, "uri": record.uri, "label": record.label})
                except Undecodable as error:
                    reason, detail = error.reason, error.detail
            if reason is not None:
                rejects.append({"key": record.key, "uri": record.uri, "reason": reason, "detail": detail})
        row = {
            "unit": unit,
            "chunk": number,
            "last": last,
            "records": kept,
            "rejects": rejects,
            "pixels": np.stack(pixels).tobytes() if pixels else b"",
        }
        return pa.Table.from_pylist([row], schema=CHUNK)


class EncodeChunks:
    """Chunks of pixels to embeddings, handed to the writer of their shard; only counts go on."""

    def __init__(self, config: RunConfig, writers: list[Any]) -> None:
        from rayclust.stages.models import load_run_encoder

        self._encoder = load_run_encoder(config)
        self._writers = writers

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encodes each chunk and hands it on; counts of images and rejects."""
        import ray

        images, rejected = 0, 0
        for row in range(batch.num_rows):
            unit = batch["unit"][row].as_py()
            records, rejects = batch["records"][row].as_py(), batch["rejects"][row].as_py()
            embeddings = self._embeddings(batch["pixels"][row], len(records))
            writer = self._writers[json.loads(unit)["index"] % len(self._writers)]
            chunk, last = batch["chunk"][row].as_py(), batch["last"][row].as_py()
            # Waiting here keeps the writers from falling behind without bound.
            ray.get(writer.add.remote(unit, chunk, last, records, rejects, embeddings))
            images += len(records)
            rejected += len(rejects)
        return pa.table({"images": [images], "rejected": [rejected]})

    def _embeddings(self, pixels: pa.Scalar, count: int) -> np.ndarray:
        if not count:
            return np.zeros((0, self._encoder.dimension), np.float16)
        array = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(count, *self._encoder.preprocess.shape)
        with np.errstate(over="ignore"):  # what overflows becomes a reject
            return self._encoder.encode_images(array).astype(np.float16)


class ShardWriter:
    """Gathers the chunks of each shard and writes it when it is whole; a Ray actor.

    A chunk that comes twice (its worker died after sending) is taken once. If the writer itself dies, its unfinished
    shards have no marker and the driver sends them through again.
    """

    def __init__(self, run: str, dimension: int) -> None:
        self._run, self._dimension = Run(run), dimension
        self._open: dict[str, dict[int, tuple[Any, ...]]] = {}
        self._lengths: dict[str, int] = {}
        self._written: set[str] = set()

    def add(
        self, unit: str, chunk: int, last: bool, records: list[Any], rejects: list[Any], embeddings: np.ndarray
    ) -> None:
        """Takes one chunk of the shard that `unit` names."""
        if unit in self._written:
            return
        chunks = self._open.setdefault(unit, {})
        chunks[chunk] = (records, rejects, np.array(embeddings))
        if last:
            self._lengths[unit] = chunk + 1
        if len(chunks) == self._lengths.get(unit):
            self._write(unit, [chunks[number] for number in range(len(chunks))])
            self._written.add(unit)
            del self._open[unit], self._lengths[unit]

    def _write(self, unit: str, chunks: list[tuple[Any, ...]]) -> None:
        named = json.loads(unit)
        records = [record for kept, _, _ in chunks for record in kept]
        shard = Unit(named["index"], named["digest"])
        result = write_shard(
            self._run,
            shard,
            named["row_start"],
            records,
            np.concatenate([embeddings for _, _, embeddings in chunks]),
            [reject for _, rejects, _ in chunks for reject in rejects],
        )
        write_marker(self._run.shard_manifest(shard.index), shard, result)

    def ping(self) -> bool:
        """Answers once the actor is up."""
        return True
