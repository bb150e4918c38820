"""The tables of a run: schemas, and Parquet files whose bytes depend on nothing but their rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayclust.arrays import require_matrix
from rayclust.errors import ArtefactError, ShapeError
from rayclust.store import storage

HALF_MAX, HALF_MIN = 65504.0, 2.0**-9
"""Bounds on the largest value of a row that is stored in halves."""
ROW_GROUP = 16_384
"""Rows, the least that are decoded to read one."""


def _lists(element: pa.DataType, length: int = -1) -> pa.DataType:
    """Return lists as Parquet names their elements: with Arrow's own name, a table written again had other bytes."""
    return pa.list_(pa.field("element", element), length)


def _required(**types: pa.DataType) -> list[pa.Field]:
    """Return columns without nulls, by their names."""
    return [pa.field(name, kind, nullable=False) for name, kind in types.items()]


def EMBEDDINGS(  # noqa: N802 - stands beside the constants below
    dimension: int, has_split: bool = False, element: pa.DataType | None = None
) -> pa.Schema:
    """Return the schema of rows with embeddings of width `dimension`; row is dense over the run, by (shard, key).

    In a run with a split a column `split` says "train" or "test". Elements are halves, or what `in_storage` gives.
    """
    embedding = _required(embedding=_lists(element or pa.float16(), dimension))
    return pa.schema([*ROWS(has_split), *embedding], metadata={"dimension": str(dimension)})


def ROWS(has_split: bool = False) -> pa.Schema:  # noqa: N802
    """Return the schema of the rows of a run with several encoders: `EMBEDDINGS` without the embeddings."""
    names = [*_required(row=pa.int64(), key=pa.string(), uri=pa.string()), pa.field("label", pa.string())]
    return pa.schema(names + (_required(split=pa.string()) if has_split else []))


def SPACE(dimension: int, element: pa.DataType) -> pa.Schema:  # noqa: N802
    """Return the schema of the embeddings of width `dimension` in one of a run's spaces."""
    columns = _required(row=pa.int64(), embedding=_lists(element, dimension))
    return pa.schema(columns, metadata={"dimension": str(dimension)})


REJECTS = pa.schema(_required(key=pa.string(), uri=pa.string(), reason=pa.string(), detail=pa.string()))
"""Inputs that gave no row, and why."""


def NEIGHBORS(count: int) -> pa.Schema:  # noqa: N802 - stands beside the constants
    """Return the schema of the `count` nearest rows of each row, nearest first, with their cosine similarity."""
    lists = {"neighbors": _lists(pa.int64(), count), "similarity": _lists(pa.float16(), count)}
    return pa.schema(_required(row=pa.int64(), **lists), metadata={"neighbors": str(count)})


def COUNTERPARTS(dimension: int) -> pa.Schema:  # noqa: N802
    """Return the schema of the rows' counterparts in text, unit rows of width `dimension`."""
    return pa.schema(_required(row=pa.int64(), embedding=_lists(pa.float16(), dimension)))


def NOUNS(dimension: int) -> pa.Schema:  # noqa: N802
    """Return the schema of chosen nouns: the semantic centre that each belongs to, how certainly, and its unit row."""
    columns = {"word": pa.string(), "center": pa.int32(), "confidence": pa.float64()}
    return pa.schema(_required(**columns, embedding=_lists(pa.float32(), dimension)))


ASSIGNMENTS = pa.schema(_required(row=pa.int64(), key=pa.string(), cluster=pa.int32(), confidence=pa.float32()))
"""The cluster of each row, with the probability that the method gives it."""


MAP = pa.schema(_required(row=pa.int64(), x=pa.float32(), y=pa.float32()))
"""The place of each row on the plane, within [−1, 1] on both axes."""


def level_column(clusters: int) -> str:
    """Return the name of the column of `assignments` for a coarser level."""
    return f"cluster_{clusters}"


def assignments(levels: Sequence[int]) -> pa.Schema:
    """Return `ASSIGNMENTS` with an int32 column behind for each coarser level."""
    return pa.schema([*ASSIGNMENTS, *_required(**{level_column(size): pa.int32() for size in levels})])


CLUSTERS = pa.schema(
    [
        pa.field("cluster", pa.int32(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("runners_up", _lists(pa.struct([("name", pa.string()), ("score", pa.float32())])), nullable=False),
        pa.field("name_without_classes", pa.string()),
        pa.field("score_without_classes", pa.float32()),
        pa.field("exemplars", _lists(pa.int64()), nullable=False),
        pa.field("outliers", _lists(pa.int64()), nullable=False),
    ]
)
"""One line per cluster: its size, name, other names, typical rows and odd rows. The name without classes is there where
the data set's own class names were among the candidates beside other lists."""


NAMING = pa.schema([pa.field("margin", pa.float32()), pa.field("changed", pa.bool_(), nullable=False)])
"""Further columns of `CLUSTERS` where names are distinct: how far the next free word stands behind, in nats, and
whether the most voted word is another one."""


def encode_table(table: pa.Table) -> bytes:
    """Return `table` as Parquet: equal rows and schema give equal bytes, however the table lies in memory."""
    sink = pa.BufferOutputStream()
    with _parquet_writer(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), row_group_size=ROW_GROUP)
    return bytes(sink.getvalue())


def _parquet_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    lists = [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    return pq.ParquetWriter(
        sink,
        schema,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=1,
        # Split bytes would make halves of unit rows 8 % smaller, but DuckDB does not read them.
        use_dictionary=[name for name in schema.names if name == "label"],
        write_statistics=[name for name in schema.names if name not in lists],
        write_page_checksum=True,
        store_schema=True,
    )


def write_table(uri: str, table: pa.Table) -> None:
    """Write a table at once; it is stored with its schema's metadata.

    Raises:
        DataError: it cannot be written.
    """
    storage.write_bytes(uri, encode_table(table))


def write_pieces(uri: str, schema: pa.Schema, pieces: Iterable[pa.Table]) -> None:
    """Write a table of which one piece at a time is in memory: as CSV where `uri` ends so, else as Parquet.

    Args:
        uri: replaced at once at the end.
        schema: of every piece.
        pieces: in order.

    Raises:
        DataError: it cannot be written.
    """
    with storage.open_output(uri) as file:
        is_csv = uri.endswith(".csv")
        with pyarrow.csv.CSVWriter(file, schema) if is_csv else _parquet_writer(file, schema) as writer:
            for piece in pieces:
                writer.write_table(piece.combine_chunks())


def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table that rayclust wrote.

    Args:
        uri: the file.
        columns: the columns to read, in this order; None reads all. Only their bytes are fetched.

    Raises:
        ArtefactError: the file is missing or damaged, or lacks a column.
    """
    # In this thread: a thread of pyarrow's that frees bytes of Python's as the interpreter ends aborts the process.
    is_remote = storage.is_remote(uri)
    try:
        with (
            storage.open_input(uri) as source,
            pq.ParquetFile(source, pre_buffer=is_remote, page_checksum_verification=True) as file,
        ):
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                have = ", ".join(file.schema_arrow.names)
                raise ArtefactError(f"{uri}: has no column {', '.join(missing)} (it has {have}); run its stage again")
            return file.read(columns=None if columns is None else list(columns), use_threads=is_remote)
    except storage.MissingError as error:
        raise ArtefactError(f"{uri}: is missing; run the stage that writes it") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{uri}: is damaged ({reason}); remove it and run its stage again") from error


def in_storage(rows: NDArray[np.generic]) -> NDArray[Any]:
    """Return rows as they are stored: float16, or float32 where halves would lose one.

    A half has 11 bits between 6e-5 and 65504. Of a row whose largest value is at least 2^-9, what is lost below is less
    than a thousandth of its length.

    Args:
        rows: [N D], real numbers; those that are not finite do not count.
    """
    peaks = np.abs(rows).max(axis=1, initial=0)
    peaks = peaks[np.isfinite(peaks) & (peaks > 0)]
    is_lossy = bool(len(peaks)) and bool(peaks.max() > HALF_MAX or peaks.min() < HALF_MIN)
    with np.errstate(over="ignore", invalid="ignore"):
        return rows.astype(np.float32 if is_lossy else np.float16)


def fixed_list(array: NDArray[np.generic]) -> pa.FixedSizeListArray:
    """Return a matrix as a column of lists of its width, its elements not copied where they lie in rows.

    Args:
        array: [N D], any type that Arrow holds; D at least 1.

    Raises:
        ShapeError: `array` does not have two axes, or no width.
    """
    require_matrix(array, "array")
    if array.shape[1] == 0:
        raise ShapeError(f"array has shape {array.shape}: at least one column is needed")
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=_lists(values.type, array.shape[1]))


def matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return a column of equally long lists as a matrix, read-only and not copied when it is one chunk.

    Args:
        column: fixed_size_list without nulls.

    Returns:
        [N D] of the lists' element type.

    Raises:
        ShapeError: the column is not of fixed-size lists, or has nulls.
    """
    if not pa.types.is_fixed_size_list(column.type):
        raise ShapeError(f"column has type {column.type}: a fixed_size_list is needed")
    if column.null_count:
        raise ShapeError(f"column has {column.null_count} nulls: none is allowed")
    width, element = column.type.list_size, column.type.value_type
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    blocks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in chunks]
    if len(blocks) == 1:
        return blocks[0]  # type: ignore[no-any-return]
    return np.concatenate(blocks) if blocks else np.empty((0, width), element.to_pandas_dtype())
