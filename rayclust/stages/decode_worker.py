"""The first half of encode inside a Ray worker: input shards to chunks of pixels, on a CPU and without torch.

A row of the Ray data set is a *chunk*: consecutive records of one shard, in the order of their keys. An embedding
depends on its image alone, to the bit: neither the cut nor the number of workers shows in the result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.encoders.decode import Preprocess, Undecodable, decode
from rayclust.stages.meter import worker_name
from rayclust.store import filesystem
from rayclust.store.sources import Record, Shard, read_records

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
        ("worker", pa.string()),  # who made it, and what it took, in seconds
        ("reading", pa.float64()),
        ("decoding", pa.float64()),
    ]
)


class ReadAndDecode:
    """Input shards to chunks of pixels. Images that cannot be decoded become rejects with a reason.

    Args:
        rows: records of a chunk.
        preprocess: what the encoder takes, with the run's limits.
    """

    def __init__(self, rows: int, preprocess: Preprocess) -> None:
        self._rows, self._preprocess = rows, preprocess

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Chunks of each shard named in `batch`, in order."""
        for unit, shard in zip(batch["unit"].to_pylist(), batch["shard"].to_pylist(), strict=True):
            yield from self._chunks(unit, Shard.from_json(filesystem.read_json(shard)))

    def _chunks(self, unit: str, shard: Shard) -> Iterator[pa.Table]:
        records, started = iter(read_records(shard, self._preprocess.max_bytes)), time.monotonic()
        group = list(islice(records, self._rows))
        number = 0
        while True:
            following = list(islice(records, self._rows))
            read = time.monotonic()
            row = self._chunk(unit, number, group, last=not following)
            times = {"worker": worker_name(), "reading": read - started, "decoding": time.monotonic() - read}
            yield pa.Table.from_pylist([row | times], schema=CHUNK)
            if not following:
                return
            group, number, started = following, number + 1, time.monotonic()

    def _chunk(self, unit: str, number: int, group: list[Record], *, last: bool) -> dict[str, Any]:
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
        return {
            "unit": unit,
            "chunk": number,
            "last": last,
            "records": kept,
            "rejects": rejects,
            "pixels": np.stack(pixels).tobytes() if pixels else b"",
        }
