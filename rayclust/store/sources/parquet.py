"""Parquet tables: columns by what they hold, shards of row groups, and encoded images.

Images are a binary column, or a struct of bytes and path as HuggingFace data sets have.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayclust.errors import DataError
from rayclust.store import storage
from rayclust.store.sources.base import (
    LABEL_NAMES,
    TOO_LARGE,
    Record,
    Shard,
    enumerated,
    escape_invalid,
    folder_label,
    label_text,
)
from rayclust.store.storage import FileStat, UnreadableError, prefetch

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture", "data", "content")
EMBEDDING_NAMES = ("embedding", "embeddings", "image_embedding", "img_emb", "features", "feature", "vector", "emb")
TABLE_SUFFIXES = (".parquet", ".pq", ".parq")
KEY_NAMES = ("key", "image_path", "path", "filename", "file_name", "file", "id", "image_id", "uri", "url")
URI_NAMES = ("uri", "image_path")

DAMAGE = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, OverflowError)
"""Raised when a damaged Parquet file is read; storage errors are DataErrors, and pass."""

_BATCH_ROWS = 16
_COMPARED, _COMPARED_ROWS = 8, 1 << 16
"""Tables whose keys are compared while planning, and first rows of each."""
_BUFFER_BYTES, _UNBUFFERED_BYTES = 8 << 20, 256 << 20
"""Size of the read buffer, and of a row group above which it is used."""
_FOOTERS_AHEAD = 8
_SPOOL_BYTES = 64 << 20
"""Bytes of images kept in memory while a shard is sorted by key; more go to disk."""


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns by content; None where none fits."""

    image: str | None
    """Encoded images: the first of `IMAGE_NAMES`, else the only column of a fitting type."""
    embedding: str | None
    """The first of `EMBEDDING_NAMES` with lists of numbers, else, beside no image, the only column of such lists."""
    keys: tuple[str, ...]
    """May name the rows: those of `KEY_NAMES`, and `path` within an image struct, with a dot between them."""
    uri: str | None
    """Where the image of a row lies: the first of `URI_NAMES`."""
    label: str | None
    """The first of `LABEL_NAMES`, or the column that is asked for."""

    @classmethod
    def find(
        cls, schema: pa.Schema, label_source: str | None = None, where: str = "", named: Mapping[str, str] | None = None
    ) -> Columns:
        """Find the columns of a schema by their names, in any case, and types.

        Args:
            schema: of the table.
            label_source: `Shard.label_source`.
            where: the table, for messages.
            named: `Shard.columns`.

        Raises:
            DataError: a column that is named does not exist or is of another type, or there are two of its name.
        """
        named = named or {}
        for role, name in named.items():
            fits = {"image": _is_image, "embedding": _is_vector}.get(role, _is_name)
            if not any(fits(field.type) for field in schema if field.name == name):
                kind = {"image": "of bytes", "embedding": "of lists of numbers"}.get(role, "of text or whole numbers")
                have = describe_columns(schema)
                raise DataError(f"images.columns.{role} = {name}: {where} has no such column {kind}; it has {have}")
        if label_source not in (None, "auto", "folder", *schema.names):
            have = describe_columns(schema)
            raise DataError(f"images.labels = {label_source}: {where} has no such column; it has {have}")
        # Bytes under a name of embeddings are packed numbers, under one of labels text; not images.
        no_images = (*EMBEDDING_NAMES, *LABEL_NAMES)
        images = [field for field in schema if _is_image(field.type) and field.name.lower() not in no_images]
        vectors = [field for field in schema if _is_vector(field.type)]
        image = _first(images, IMAGE_NAMES) or (images[0].name if len(images) == 1 else None)
        embedding = _first(vectors, EMBEDDING_NAMES)
        if embedding is None and image is None:
            others = [field for field in vectors if _is_vector(field.type, pa.types.is_floating)]
            embedding = others[0].name if len(others) == 1 and others[0].name.lower() not in IMAGE_NAMES else None
        image, embedding = named.get("image", image), named.get("embedding", embedding)
        naming = [field for field in schema if _is_name(field.type)]
        keys = [key for name in KEY_NAMES if (key := _first(naming, [name])) is not None]
        for field in images:
            at = field.type.get_field_index("path") if pa.types.is_struct(field.type) else -1
            if field.name == image and at >= 0 and _is_text(field.type.field(at).type):
                keys.append(f"{image}.path")
        keys = [named["key"]] if "key" in named else keys
        label = None if label_source == "folder" else label_source
        if label_source == "auto":
            label = _first([field for field in schema if field not in (*images, *vectors)], LABEL_NAMES)
        found = cls(
            image, embedding, tuple(keys), _first([field for field in naming if _is_text(field.type)], URI_NAMES), label
        )
        for used in (image, embedding, label, found.uri, *(key for key in keys if key in schema.names)):
            if schema.names.count(used) > 1:
                raise DataError(f"{where}: has {schema.names.count(used)} columns called `{used}`; rename all but one")
        return found

    def naming(self, key: str | None) -> list[str]:
        """Return the columns that `RowNames.replaced` reads."""
        return sorted({name for name in (key, self.uri, self.label) if name is not None})


def _first(fields: Iterable[pa.Field], names: Iterable[str]) -> str | None:
    """Return the column whose lower-case name comes first in `names`."""
    by_name = {field.name.lower(): str(field.name) for field in reversed(list(fields))}
    return next((by_name[name] for name in names if name in by_name), None)


def describe_columns(schema: pa.Schema) -> str:
    """Return names and types of the columns, for messages."""
    if not len(schema):
        return "no columns"
    return "the columns " + enumerated(f"{field.name} ({field.type})" for field in schema)


def _is_image(kind: pa.DataType) -> bool:
    """Accept bytes, or a struct with a field `bytes` of bytes."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        kind = kind.field(at).type if at >= 0 else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_vector(kind: pa.DataType, holds: Callable[[pa.DataType], bool] | None = None) -> bool:
    """Accept lists of numbers, or of those that `holds` accepts."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    element = kind.value_type
    return bool(holds(element) if holds else pa.types.is_floating(element) or pa.types.is_integer(element))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind))


@dataclass(frozen=True)
class RowNames:
    """Keys, URIs and labels of the rows of a shard, in the order of the file."""

    keys: Sequence[str]
    uris: Sequence[str]
    labels: Sequence[str | None]

    @classmethod
    def numbered(cls, shard: Shard, count: int) -> RowNames:
        """Name rows by their numbers in the file; such keys sort as the rows do."""
        rows = range(shard.start, shard.start + count)
        labels = [shard.folder if shard.label_source == "folder" else None] * count
        return cls([f"{shard.name}/{row:08d}" for row in rows], [f"{shard.uri}#{row}" for row in rows], labels)

    def replaced(self, table: pa.Table, columns: Columns, key: str | None, shard: Shard) -> RowNames:
        """Take the names that a table has for the same rows.

        Args:
            table: the rows.
            columns: its `uri` is taken where it is not empty, its `label` where there is one.
            key: the column of the keys, from `key_column`.
            shard: that the rows belong to.

        Raises:
            ArrowInvalid: the columns of a damaged file are of another length.
        """
        if table.num_columns and table.num_rows != len(self.keys):
            raise pa.ArrowInvalid(f"columns of {table.num_rows} rows where the footer states {len(self.keys)}")
        keys, uris, labels = self.keys, self.uris, self.labels
        if key is not None:
            texts = [escape_invalid(str(value)) for value in _values(table, key)]
            are_own = shard.prefixed == "never" or (shard.prefixed == "names" and all("/" in text for text in texts))
            keys = texts if are_own else [f"{shard.name}/{text}" for text in texts]
            if shard.label_source == "folder":
                labels = [folder_label(text) or own for text, own in zip(texts, labels, strict=True)]
        if columns.uri is not None:
            uris = [text or own for text, own in zip(_values(table, columns.uri), uris, strict=True)]
        if columns.label is not None:
            # Classes that whole numbers point into, in one of two forms: `class_names`, a JSON list, and the
            # `huggingface` description with a ClassLabel feature.
            metadata, names = table.schema.metadata or {}, None
            with suppress(ValueError, KeyError, TypeError):
                names = json.loads(metadata.get(b"class_names", b"null"))
                if names is None:
                    features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
                    names = features[columns.label]["names"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                names = None
            labels = [label_text(value, names) for value in _values(table, columns.label)]
        return RowNames(keys, uris, labels)


def key_column(file: pq.ParquetFile, columns: Columns) -> str | None:
    """Return the first of `Columns.keys` whose values are all there and differ in the whole file."""
    for name in columns.keys:
        try:
            column = _column(file.read(columns=[name]), name)
        except DAMAGE:  # a column that is damaged in one place names no rows
            continue
        if _is_key(column):
            return name
    return None


def _is_key(column: pa.ChunkedArray) -> bool:
    """Return whether all values of a column are there and differ, and no text is empty."""
    if column.null_count or pc.count_distinct(column).as_py() != len(column):
        return False
    return not (_is_text(column.type) and len(column) and pc.min(pc.binary_length(column)).as_py() == 0)


@lru_cache(maxsize=64)
def _key_of_file(uri: str, stamp: str, columns: Columns) -> str | None:
    """Return `key_column` of a file of several shards, read once a process; `stamp` differs between its versions."""
    with opened(uri) as file:
        return key_column(file, columns)


def prefixed(shards: Iterator[Shard]) -> Iterator[Shard]:
    """Set `Shard.prefixed` of the shards of tables and arrays, by the keys of the first few."""
    # 1. The first shard of each of the first files.
    first, files = list[Shard](), dict[str, Shard]()
    for shard in shards:
        first.append(shard)
        files.setdefault(shard.uri, shard)
        if len(files) == _COMPARED:
            break
    # 2. The values that name the first rows of each file, as text; none where it has none or is damaged.
    chunks = list[pa.Array]()
    for shard in files.values() if len(files) > 1 else ():
        place = next((beside for beside in shard.beside if beside.endswith(".parquet")), shard.uri)
        with suppress(*DAMAGE, UnreadableError), opened(place) as file:
            columns = Columns.find(file.schema_arrow, None, place, shard.columns if place == shard.uri else {})
            for name in columns.keys:
                batch = next(file.iter_batches(_COMPARED_ROWS, columns=[name], use_threads=False), None)
                column = None if batch is None else _column(pa.Table.from_batches([batch]), name)
                if column is not None and _is_key(column):
                    chunks += column.cast(pa.large_string()).chunks
                    break
    # 3. Whether these tell the rows of all files apart.
    how, together = "never", pa.chunked_array(chunks, pa.large_string())
    if len(files) > 1:
        how = "names" if pc.count_distinct(together).as_py() == len(together) else "always"
    yield from (replace(shard, prefixed=how) for shard in itertools.chain(first, shards))


def read_names(file: pq.ParquetFile, columns: Columns, shard: Shard, groups: list[int], count: int) -> RowNames:
    """Return the names of the `count` rows of a shard's row groups, by the table's columns where they have some.

    Raises:
        DataError: `images.columns.key` names a column whose values repeat or are missing.
    """
    is_whole = len(groups) == file.metadata.num_row_groups
    stamp = shard.stamp.rpartition(":")[0]
    key = key_column(file, columns) if is_whole else _key_of_file(shard.uri, stamp, columns)
    if key is None and "key" in shard.columns:
        asked = f"images.columns.key = {shard.columns['key']}"
        raise DataError(f"{asked}: values of this column in {shard.uri} repeat or are missing; name another")
    table = file.read_row_groups(groups, columns=columns.naming(key))
    return RowNames.numbered(shard, count).replaced(table, columns, key, shard)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column, or with a dot in its name the field of a struct; categories are spelled out."""
    outer, _, inner = name.partition(".")
    column = table[name] if name in table.column_names else pc.struct_field(table[outer], inner)
    column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    return column.cast(pa.large_string()) if column.type == pa.string_view() else column


def _values(table: pa.Table, name: str) -> list[Any]:
    """Return the values of a column, see `_column`; text is valid UTF-8."""
    column = _column(table, name)
    if not _is_text(column.type):
        return column.to_pylist()  # type: ignore[no-any-return]
    # Files may hold text that is not UTF-8, which pyarrow refuses to decode.
    binary = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    return [None if value is None else value.decode("utf-8", "backslashreplace") for value in binary.to_pylist()]


@dataclass(frozen=True)
class Footer:
    """The part of a file that planning needs."""

    schema: pa.Schema
    group_rows: tuple[int, ...]
    """Rows of each row group."""


@contextmanager
def opened(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of which only the requested row groups and columns are fetched."""
    with storage.open_input(uri) as source:
        metadata = pq.read_metadata(source)
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        # A row group may hold more images than memory. Others are read at once: fewer requests, and a damaged page that
        # claims gigabytes is found out before they are allocated.
        buffer = _BUFFER_BYTES if max(sizes, default=0) > _UNBUFFERED_BYTES else 0
        with pq.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=buffer) as file:
            yield file


def read_footer(file: FileStat) -> Footer | None:
    """Read the footer of a file; None if it is damaged, which becomes a reject when its shard is read."""
    try:
        with opened(file.uri) as parquet:
            groups = range(parquet.metadata.num_row_groups)
            return Footer(parquet.schema_arrow, tuple(parquet.metadata.row_group(group).num_rows for group in groups))
    except (*DAMAGE, UnreadableError):
        return None


def plan(files: Iterable[FileStat], template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Make shards of Parquet files with images, as the listing comes; footers are read ahead. See `cut`.

    Raises:
        DataError: a file has no column of images, or not the column of labels that is asked for.
    """
    for file, footer in prefetch(read_footer, files, _FOOTERS_AHEAD):
        schema = pa.schema([]) if footer is None else footer.schema
        if footer is not None and not Columns.find(schema, template.label_source, file.uri, template.columns).image:
            wanted = "a binary column or a struct with bytes, named image or by images.columns"
            raise DataError(
                f"{file.uri}: no column holds images: {wanted} is needed; it has {describe_columns(schema)}"
            )
        yield from cut(file, footer, replace(template, kind="parquet"), shard_rows)


def cut(file: FileStat, footer: Footer | None, template: Shard, shard_rows: int) -> Iterator[Shard]:
    """Cut a file into ranges of row groups; an unreadable file is one shard.

    Args:
        file: the Parquet file.
        footer: of the file; None if it cannot be read.
        template: carries the settings that all shards share.
        shard_rows: rows from which on a shard ends.
    """
    suffix = next((suffix for suffix in TABLE_SUFFIXES if file.key.lower().endswith(suffix)), "")
    name = file.key[: len(file.key) - len(suffix)]
    template = replace(template, uri=file.uri, name=name)
    if footer is None:
        yield replace(template, stamp=f"{file.stamp}:0+None")
        return
    start, begin, rows = 0, 0, 0
    for end, count in enumerate(footer.group_rows, 1):
        rows += count
        if rows and (rows >= shard_rows or end == len(footer.group_rows)):
            stamp = f"{file.stamp}:{start}+{rows}"
            yield replace(template, stamp=stamp, count=rows, start=start, row_groups=(begin, end))
            start, begin, rows = start + rows, end, 0


def read(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """Read a range of row groups as `sources.read_records`; null images and damaged rows or files are rejects.

    Keys come from a column that names the rows if that is without gaps and doubles, else they are file name and row.
    """
    try:
        with opened(shard.uri) as file:
            groups = range(*(shard.row_groups or (0, file.metadata.num_row_groups)))
            columns = Columns.find(file.schema_arrow, shard.label_source, shard.uri, shard.columns)
            columns = replace(columns, uri=None)  # records point into this table
            count = sum(file.metadata.row_group(group).num_rows for group in groups)
            names = read_names(file, columns, shard, list(groups), count)
            if columns.image is None:
                raise DataError(f"{shard.uri}: no column holds images; it has {describe_columns(file.schema_arrow)}")
            records = _records(file, columns.image, groups, names, max_bytes)
            if all(a <= b for a, b in itertools.pairwise(names.keys)):
                yield from records
                return
            # Sort by key; the images of large shards wait on disk.
            with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, prefix="rayclust-") as spool:
                places = []
                for record in records:
                    places.append((replace(record, data=None), spool.tell(), len(record.data or b"")))
                    spool.write(record.data or b"")
                for record, offset, size in sorted(places, key=lambda place: place[0].key):
                    spool.seek(offset)
                    yield replace(record, data=None if record.reason else spool.read(size))
    except (*DAMAGE, UnreadableError) as error:
        yield Record(shard.name, shard.uri, reason="unreadable_file", detail=" ".join(str(error).split()))


def _records(
    file: pq.ParquetFile, column: str, groups: Iterable[int], names: RowNames, max_bytes: int
) -> Iterator[Record]:
    """Read the images of row groups in the order of the file; the rest of a damaged row group is rejects."""
    row = 0
    for group in groups:
        end, damage = row + file.metadata.row_group(group).num_rows, "it ends early"
        try:
            for batch in file.iter_batches(_BATCH_ROWS, [group], [column], use_threads=False):
                for value in batch.column(0).slice(0, end - row):
                    image = value["bytes"] if isinstance(value, pa.StructScalar) and value.is_valid else value
                    record = Record(names.keys[row], names.uris[row], None, names.labels[row])
                    size = image.as_buffer().size if image.is_valid else 0
                    if not image.is_valid:
                        yield replace(record, reason="null_image", detail="the row holds no image")
                    elif size > max_bytes:
                        yield replace(record, reason="too_large", detail=TOO_LARGE.format(size, max_bytes))
                    else:
                        yield replace(record, data=image.as_py())
                    row += 1
        except DAMAGE as error:
            damage = " ".join(str(error).split())
        detail = f"the file is damaged here: {damage}"
        for lost in range(row, end):
            yield Record(names.keys[lost], names.uris[lost], None, names.labels[lost], "unreadable_file", detail)
        row = end


def fetch(uri: str, rows: Collection[str], columns: Mapping[str, str]) -> dict[str, bytes]:
    """Return encoded images of a table by row number, without those that are not there.

    Args:
        uri: of the table.
        rows: row numbers as they stand behind the `#` of the records' URIs.
        columns: `Shard.columns`.

    Raises:
        UnreadableError: the table cannot be read; damage raises one of `DAMAGE`.
    """
    wanted = sorted(int(row) for row in rows if row.isdecimal())
    found: dict[str, bytes] = {}
    with opened(uri) as table:
        column = columns.get("image") or Columns.find(table.schema_arrow, where=uri).image
        if column is None:
            return found
        begin = 0
        for group in range(table.metadata.num_row_groups):
            end = begin + table.metadata.row_group(group).num_rows
            here = [row for row in wanted if begin <= row < end]
            if here:
                values = table.read_row_group(group, columns=[column]).column(0).take([row - begin for row in here])
                images = [item.get("bytes") if isinstance(item, dict) else item for item in values.to_pylist()]
                found |= {str(row): image for row, image in zip(here, images, strict=True) if image is not None}
            begin = end
    return found
