"""Parquet files with encoded images: a binary column, or a struct of bytes and path as HuggingFace data sets have."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayclust.errors import DataError
from rayclust.store import filesystem
from rayclust.store.filesystem import FileStat, UnreadableError
from rayclust.store.prefetch import prefetch
from rayclust.store.sources import columns
from rayclust.store.sources.shard import Record, Shard

_BATCH_ROWS = 16
_BUFFER, _AT_ONCE = 8 << 20, 256 << 20
_FOOTERS_AHEAD = 8
_SPOOL_BYTES = 64 << 20
DAMAGE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, OverflowError)
"""What reading a damaged Parquet file may raise; storage errors are DataErrors, and pass."""


@dataclass(frozen=True)
class Footer:
    """What planning needs to know of a file."""

    schema: pa.Schema
    group_rows: tuple[int, ...]
    """Rows of each row group."""


@contextmanager
def opened(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of which only what is asked for is fetched."""
    with filesystem.open_input(uri) as source:
        metadata = pq.read_metadata(source)
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        # A row group may hold more images than memory. Others are read at once: fewer requests, and a damaged page that
        # claims gigabytes is found out before they are taken.
        buffer = _BUFFER if max(sizes, default=0) > _AT_ONCE else 0
        with pq.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=buffer) as file:
            yield file


def footer(file: FileStat) -> Footer | None:
    """The footer of a file; None where it is damaged, which reading its shard will tell."""
    try:
        with opened(file.uri) as parquet:
            groups = range(parquet.metadata.num_row_groups)
            return Footer(parquet.schema_arrow, tuple(parquet.metadata.row_group(group).num_rows for group in groups))
    except (*DAMAGE, UnreadableError):
        return None


def plan(files: Iterable[FileStat], template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Shards of Parquet files with images, as the listing comes; footers are read ahead.

    Args:
        files: Parquet files.
        template: carries the settings that all shards share.
        shard_rows: rows from which on a shard ends.

    Raises:
        DataError: a file has no column of images, or not the column of labels that is asked for.
    """
    for file, found in prefetch(footer, files, _FOOTERS_AHEAD):
        if found is not None:
            _check_images(file, found.schema, template.label_source)
        yield from cut(file, found, replace(template, kind="parquet"), shard_rows)


def cut(file: FileStat, found: Footer | None, template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Ranges of row groups of about `shard_rows` rows; an unreadable file is one shard."""
    name = file.key[: -len(".parquet")] if file.key.lower().endswith(".parquet") else file.key
    for start, count, groups in _ranges(found, shard_rows):
        stamp = f"{file.stamp}:{start}+{count}"
        yield replace(template, uri=file.uri, name=name, stamp=stamp, count=count, start=start, row_groups=groups)


def _ranges(found: Footer | None, shard_rows: int) -> Iterator[tuple[int, int | None, tuple[int, int] | None]]:
    if found is None:
        yield 0, None, None
        return
    start, begin, rows = 0, 0, 0
    for group, count in enumerate(found.group_rows):
        rows += count
        is_last = group + 1 == len(found.group_rows)
        if rows and (rows >= shard_rows or is_last):
            yield start, rows, (begin, group + 1)
            start, begin, rows = start + rows, group + 1, 0


def _check_images(file: FileStat, schema: pa.Schema, labels: str | None) -> None:
    if columns.image_column(schema) is None:
        wanted = "a binary column or a struct with bytes, named image"
        raise DataError(f"{file.uri}: no column holds images: {wanted} is needed; it has {columns.described(schema)}")
    columns.label_column(schema, labels, file.uri)


def read(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The images of a range of row groups in order of key; null images and damaged rows or files are rejects.

    Keys come from a column that names the rows where that is without gaps and doubles, else they are file name and row.

    Raises:
        DataError: the storage as a whole cannot be read, or a column is missing.
    """
    try:
        with opened(shard.uri) as file:
            names = _names(shard, file)
            images = _images(shard, file, max_bytes)
            if all(a.key <= b.key for a, b in itertools.pairwise(names)):
                yield from (_record(name, image) for name, image in zip(names, images, strict=False))
            else:
                yield from _in_order(names, images)
    except (*DAMAGE, UnreadableError) as error:
        yield from shard.rejects("unreadable_file", " ".join(str(error).split()))


@dataclass(frozen=True)
class _Name:
    key: str
    uri: str
    label: str | None


@dataclass(frozen=True)
class _Image:
    data: bytes | None
    reason: str | None = None
    detail: str = ""


def row_key(name: str, row: int) -> str:
    """The key of a row that has no name of its own; sorts as the row does."""
    return f"{name}/{row:08d}"


def row_uri(uri: str, row: int) -> str:
    """The URI of a row of a table."""
    return f"{uri}#{row}"


def groups_of(shard: Shard, file: pq.ParquetFile) -> list[int]:
    """The row groups of a shard."""
    begin, end = shard.row_groups or (0, file.metadata.num_row_groups)
    return list(range(begin, end))


def _names(shard: Shard, file: pq.ParquetFile) -> list[_Name]:
    schema = file.schema_arrow
    key = columns.key_column(schema)
    label = columns.label_column(schema, shard.label_source, shard.uri)
    table = file.read_row_groups(groups_of(shard, file), columns=[name for name in (key, label) if name is not None])
    count = sum(file.metadata.row_group(group).num_rows for group in groups_of(shard, file))
    rows = range(shard.start, shard.start + count)
    same_length(table, count)
    keys = columns.unique_keys(table, key, [row_key(shard.name, row) for row in rows])
    labels = columns.labels(table, label, shard.label_source) if label else [None] * count
    return [_Name(k, row_uri(shard.uri, row), text) for k, row, text in zip(keys, rows, labels, strict=True)]


def same_length(table: pa.Table, count: int) -> None:
    """Refuses columns that do not have the rows that the footer states, as a damaged file may."""
    if table.num_columns and table.num_rows != count:
        raise pa.ArrowInvalid(f"columns of {table.num_rows} rows where the footer states {count}")


def _images(shard: Shard, file: pq.ParquetFile, max_bytes: int) -> Iterator[_Image]:
    column = columns.image_column(file.schema_arrow)
    if column is None:
        raise DataError(f"{shard.uri}: no column holds images; it has {columns.described(file.schema_arrow)}")
    for group in groups_of(shard, file):
        done, rows, reason = 0, file.metadata.row_group(group).num_rows, "it ends early"
        try:
            for batch in file.iter_batches(_BATCH_ROWS, [group], [column], use_threads=False):
                for value in batch.column(0).slice(0, rows - done):
                    yield _image(value, max_bytes)
                    done += 1
        except DAMAGE as error:
            reason = " ".join(str(error).split())
        lost = _Image(None, "unreadable_file", f"the file is damaged here: {reason}")
        yield from itertools.repeat(lost, rows - done)


def _image(value: Any, max_bytes: int) -> _Image:
    if isinstance(value, pa.StructScalar):
        value = value["bytes"] if value.is_valid else value
    if not value.is_valid:
        return _Image(None, "null_image", "the row holds no image")
    size = value.as_buffer().size
    if size > max_bytes:
        return _Image(None, "too_large", f"{size} bytes, above the bound of {max_bytes}")
    return _Image(value.as_py())


def _record(name: _Name, image: _Image) -> Record:
    return Record(name.key, name.uri, image.data, name.label, image.reason, image.detail)


def _in_order(names: list[_Name], images: Iterator[_Image]) -> Iterator[Record]:
    """Records in order of key; large shards wait on disk."""
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, prefix="rayclust-") as spool:
        places = []
        for name, image in zip(names, images, strict=False):
            places.append((name, image.reason, image.detail, spool.tell(), len(image.data or b"")))
            spool.write(image.data or b"")
        for name, reason, detail, offset, size in sorted(places, key=lambda place: place[0].key):
            spool.seek(offset)
            data = None if reason else spool.read(size)
            yield Record(name.key, name.uri, data, name.label, reason, detail)
