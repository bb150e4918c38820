"""Reads the shards of an input: records of images, rows of ready embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from rayclust.errors import DataError
from rayclust.store.sources import arrays, embeddings, folder, parquet, webdataset
from rayclust.store.sources.arrays import LoadTensors
from rayclust.store.sources.shard import MAX_RECORD_BYTES, Record, Rows, Shard

_READERS: dict[str, Callable[[Shard, int], Iterator[Record]]] = {
    "folder": folder.read,
    "webdataset": webdataset.read,
    "parquet": parquet.read,
}


def read_records(shard: Shard, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record]:
    """The images of a shard in order of key, one at a time, and a reject for each that cannot be read.

    Args:
        shard: of a kind that holds images.
        max_bytes: bytes of one encoded image above which it is rejected without being read.

    Raises:
        DataError: the storage as a whole cannot be read (worth trying again), or a column is missing.
    """
    if shard.has_embeddings:
        raise DataError(f"{shard.uri}: holds ready embeddings, not images; read its rows")
    for record in _READERS[shard.kind](shard, max_bytes):
        is_unknown = record.reason is not None and record.label is None  # a reject that might be of any class
        if not is_unknown and not shard.wants(record.key, record.label):
            continue
        yield replace(record, label=None) if shard.labels == "none" and record.label is not None else record


def read_rows(shard: Shard, load_tensors: LoadTensors | None = None, width: int | None = None) -> Rows:
    """The usable rows of a shard of ready embeddings in order of key, and the rejects.

    Args:
        shard: of a kind that holds embeddings.
        load_tensors: reads a `.pt` file by its local path without running code in it; needed for those only.
        width: D that every row must have; None takes the width of most rows of this shard.

    Returns:
        Float16 embeddings, finite and not zero. Rows that are null, of another width, not finite, above the largest
        float16 or all zero are rejects, and a damaged file is one.

    Raises:
        DataError: the file is no table of embeddings, its labels do not fit, or the storage cannot be read.
    """
    if not shard.has_embeddings:
        raise DataError(f"{shard.uri}: holds images, not ready embeddings; read its records")
    if shard.kind == "embeddings_parquet":
        return embeddings.read_parquet(shard, width)
    if shard.kind == "embeddings_npy":
        return arrays.read_npy(shard, width)
    return arrays.read_pt(shard, width, load_tensors)
