"""The rows of a run on local disk, to be found by number and by cluster without reading the run again."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayclust.export.rows import RunRows
from rayclust.runtime.pipeline import content_digest
from rayclust.runtime.rows import cache_folder
from rayclust.store import tables
from rayclust.store.manifest import AssignOutputs, digest_of, read_manifest

BLOCK = 1 << 20
"""Rows that are summed at once."""
KEYS = pa.schema([("key", pa.string()), ("uri", pa.string()), ("label", pa.string())])


class RowIndex:
    """Rows sorted by cluster, in mapped files of this machine that are made once for a run's assignments.

    Memory is taken for the rows that are asked for; the operating system keeps as much of the files as it likes.
    """

    def __init__(self, rows: RunRows) -> None:
        assign = read_manifest(rows.run, "assign")
        digest = digest_of(["explore", rows.run.uri, content_digest(rows.encode), assign and content_digest(assign)])
        folder = cache_folder(digest)
        if not (folder / "done").exists():
            _build(rows, folder)
        self._starts = np.array(rows.starts)
        file = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow")))
        # One batch a part; empty parts have theirs as well.
        self._batches = [file.get_batch(part) for part in range(file.num_record_batches)]
        self.keys = pa.chunked_array([batch.column(0) for batch in self._batches], pa.string())
        """Keys of all rows, mapped."""
        self.clusters: NDArray[np.int32] = np.load(folder / "clusters.npy", mmap_mode="r")
        """Int32[N], the method's own cluster of each row."""
        self.confidence: NDArray[np.float32] = np.load(folder / "confidence.npy", mmap_mode="r")
        """Float32[N]."""
        self.order: NDArray[np.int64] = np.load(folder / "order.npy", mmap_mode="r")
        """Int64[N], the rows by these clusters, of each the most certain first; mapped."""
        sizes = assign.outputs_of(AssignOutputs).sizes if assign else ()
        self.bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        """Int64[K + 1], the place in `order` at which each cluster begins, and N."""
        self.confidence_sums = np.zeros(len(sizes))
        """Float64[K], of each of the method's own clusters."""
        for start in range(0, rows.count, BLOCK):
            block = slice(start, start + BLOCK)
            self.confidence_sums += np.bincount(self.clusters[block], self.confidence[block], len(sizes))

    def records(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return row, key, uri, label and confidence of rows, in their order."""
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        found = []
        for row, part in zip(rows.tolist(), parts.tolist(), strict=True):
            batch, place = self._batches[part], int(row - self._starts[part])
            cells = {name: batch.column(i)[place].as_py() for i, name in enumerate(KEYS.names)}
            found.append({"row": row, **cells, "confidence": round(float(self.confidence[row]), 4)})
        return found

    def find(self, keys: pa.Array) -> tuple[NDArray[np.int64], pa.Array]:
        """Return the rows that have one of some keys, Int64[n] in order, and their keys."""
        rows, found = [np.zeros(0, np.int64)], [pa.array([], pa.string())]
        for start, batch in zip(self._starts.tolist(), self._batches, strict=False):
            places = np.flatnonzero(pc.is_in(batch.column(0), value_set=keys).to_numpy(zero_copy_only=False))
            if len(places):
                rows.append(start + places)
                found.append(batch.column(0).take(pa.array(places)))
        return np.concatenate(rows), pa.concat_arrays(found)


def _build(rows: RunRows, folder: Path) -> None:
    """Write the files; a reader sees all of them or none, and two builders write the same."""
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    clusters, confidence = np.empty(rows.count, np.int32), np.empty(rows.count, np.float32)
    with pa.OSFile(str(work / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, KEYS) as writer:
        for part, (start, stop) in enumerate(pairwise(rows.starts)):
            table = tables.read_table(rows.run.rows(part), KEYS.names).cast(KEYS)
            assigned = tables.read_table(rows.run.assignments(part), ["cluster", "confidence"])
            clusters[start:stop], confidence[start:stop] = assigned["cluster"], assigned["confidence"]
            columns = [column.combine_chunks() for column in table.columns]
            writer.write_batch(pa.record_batch(columns, schema=KEYS))
    np.save(work / "clusters.npy", clusters)
    np.save(work / "confidence.npy", confidence)
    np.save(work / "order.npy", np.lexsort((-confidence, clusters)))
    (work / "done").touch()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("rows.arrow", "clusters.npy", "confidence.npy", "order.npy", "done"):
        (work / name).replace(folder / name)
    work.rmdir()
