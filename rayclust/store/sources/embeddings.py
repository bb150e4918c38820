"""Ready embeddings: plans tables with a column of vectors and arrays by turns, and reads the tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayclust.errors import DataError
from rayclust.store.filesystem import FileStat, UnreadableError
from rayclust.store.prefetch import prefetch
from rayclust.store.sources import arrays, columns, parquet
from rayclust.store.sources.rows import RawRows, Vectors, checked, unreadable
from rayclust.store.sources.shard import Rows, Shard

SHARD_FACTOR = 32
"""Rows of embeddings are so much smaller than images that a shard takes this many times more."""

_BATCH_ROWS = 4096
_FILES_AHEAD = 8


def plan(files: Iterable[FileStat], template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Shards of Parquet, `.npy` and `.pt` files, as the listing comes; footers and headers are read ahead.

    Args:
        files: of these kinds.
        template: carries the settings that all shards share.
        shard_rows: rows of a shard; Parquet is cut at the row group where they are reached.

    Raises:
        DataError: a file holds no embeddings, or not the column of labels that is asked for.
    """
    for file, found in prefetch(_look, files, _FILES_AHEAD):
        if isinstance(found, arrays.ArrayFile):
            yield from arrays.cut(file, found, template, shard_rows)
        elif found is None or _has_vectors(file, found.schema, template.label_source):
            yield from parquet.cut(file, found, replace(template, kind="embeddings_parquet"), shard_rows)


def _look(file: FileStat) -> arrays.ArrayFile | parquet.Footer | None:
    return parquet.footer(file) if file.key.lower().endswith(".parquet") else arrays.look(file)


def _has_vectors(file: FileStat, schema: pa.Schema, labels: str | None) -> bool:
    """Whether a table is wanted; the metadata that clip-retrieval writes beside arrays is not."""
    if columns.embedding_column(schema) is not None:
        columns.label_column(schema, labels, file.uri)
        return True
    folder, _, name = file.key.rpartition("/")
    if name.startswith("metadata") or folder.rpartition("/")[2] == "metadata":
        return False
    have = columns.described(schema)
    raise DataError(f"{file.uri}: no column `embedding` of lists of numbers; it has {have}")


def read_parquet(shard: Shard, width: int | None) -> Rows:
    """The rows of a range of row groups of a Parquet file; see `read_rows`."""
    try:
        with parquet.opened(shard.uri) as file:
            return checked(shard, _raw_rows(shard, file), width)
    except (*parquet.DAMAGE, UnreadableError) as error:
        return unreadable(shard, " ".join(str(error).split()), width)


def _raw_rows(shard: Shard, file: pq.ParquetFile) -> RawRows:
    schema, groups = file.schema_arrow, parquet.groups_of(shard, file)
    vector = columns.embedding_column(schema)
    if vector is None:
        raise DataError(f"{shard.uri}: no column `embedding`; it has {columns.described(schema)}")
    key, uri = columns.key_column(schema), columns.uri_column(schema)
    label = columns.label_column(schema, shard.label_source, shard.uri)
    wanted = sorted({name for name in (key, uri, label) if name is not None})
    table = file.read_row_groups(groups, columns=wanted)
    vectors = Vectors()
    for batch in file.iter_batches(_BATCH_ROWS, groups, [vector], use_threads=False):
        vectors.add(*_by_width(batch.column(0)))
    rows = range(shard.start, shard.start + len(vectors.widths()))
    parquet.same_length(table, len(rows))
    own = [parquet.row_uri(shard.uri, row) for row in rows]
    given = columns.texts(table[uri]) if uri else own
    return RawRows(
        columns.unique_keys(table, key, [parquet.row_key(shard.name, row) for row in rows]),
        [text or fallback for text, fallback in zip(given, own, strict=True)],
        columns.labels(table, label, shard.label_source) if label else [None] * len(rows),
        vectors,
    )


def _by_width(array: pa.Array) -> tuple[NDArray[np.int64], dict[int, NDArray[Any]]]:
    """Length of each list (-1 for null), and the values of the lists of each length."""
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    widths = pc.if_else(array.is_null(), -1, pc.list_value_length(array)).to_numpy(zero_copy_only=False)
    widths = widths.astype(np.int64)
    values = {}
    for width in np.unique(widths[widths > 0]).tolist():
        lists = array.filter(pa.array(widths == width))
        values[width] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return widths, values
