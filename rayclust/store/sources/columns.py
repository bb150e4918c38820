"""Finds the columns of a table that hold images, embeddings, keys, URIs and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from rayclust.errors import DataError
from rayclust.store.sources.labels import LABEL_NAMES, class_names, clean, folder_label, label_text

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture", "data", "content")
EMBEDDING_NAMES = ("embedding", "embeddings", "image_embedding", "img_emb", "features", "feature", "vector", "emb")
KEY_NAMES = ("key", "image_path", "path", "filename", "file_name", "file", "id", "image_id", "uri", "url")
URI_NAMES = ("uri", "image_path")


def find(schema: pa.Schema, names: Iterable[str], accepts: Callable[[pa.DataType], bool]) -> str | None:
    """The column whose lower-case name comes first in `names` and whose type is accepted."""
    by_name = {field.name.lower(): field.name for field in reversed(list(schema)) if accepts(field.type)}
    return next((by_name[name] for name in names if name in by_name), None)


def is_bytes(type_: pa.DataType) -> bool:
    """Whether a column of this type holds bytes."""
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))


def is_image(type_: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images: bytes, or a struct with a field `bytes` of bytes."""
    if not pa.types.is_struct(type_):
        return is_bytes(type_)
    at = type_.get_field_index("bytes")
    return at >= 0 and is_bytes(type_.field(at).type)


def is_vector(type_: pa.DataType) -> bool:
    """Whether a column of this type may hold embeddings: lists of numbers."""
    storage = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_
    is_list = pa.types.is_list(storage) or pa.types.is_large_list(storage) or pa.types.is_fixed_size_list(storage)
    return bool(is_list and (pa.types.is_floating(storage.value_type) or pa.types.is_integer(storage.value_type)))


def _is_name(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_integer(type_))


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images: by its name, else the only one of a fitting type."""
    fitting = [field.name for field in schema if is_image(field.type)]
    return find(schema, IMAGE_NAMES, is_image) or (fitting[0] if len(fitting) == 1 else None)


def embedding_column(schema: pa.Schema) -> str | None:
    """The column of embeddings, by its name."""
    return find(schema, EMBEDDING_NAMES, is_vector)


def key_column(schema: pa.Schema) -> str | None:
    """The column that names the rows; of an image struct, its `path`."""
    named = find(schema, KEY_NAMES, _is_name)
    image = image_column(schema)
    if named is None and image is not None and pa.types.is_struct(schema.field(image).type):
        at = schema.field(image).type.get_field_index("path")
        return f"{image}.path" if at >= 0 and _is_text(schema.field(image).type.field(at).type) else None
    return named


def uri_column(schema: pa.Schema) -> str | None:
    """The column that says where the image of a row lies."""
    return find(schema, URI_NAMES, _is_text)


def label_column(schema: pa.Schema, source: str | None, where: str) -> str | None:
    """The column of labels; `folder` takes the keys, whose folders name classes.

    Args:
        schema: of the table.
        source: `Shard.label_source`.
        where: the table, for the message.

    Raises:
        DataError: `source` names a column that does not exist.
    """
    if source is None:
        return None
    if source == "folder":
        return key_column(schema)
    if source == "auto":
        return find(schema, LABEL_NAMES, lambda type_: not is_image(type_) and not is_vector(type_))
    if source not in schema.names:
        raise DataError(f"images.labels = {source}: {where} has no such column; it has {described(schema)}")
    return source


def described(schema: pa.Schema) -> str:
    """Names and types of the columns, for messages."""
    return (
        "the columns " + ", ".join(f"{field.name} ({field.type})" for field in schema) if len(schema) else "no columns"
    )


def leaf(table: pa.Table, column: str) -> pa.ChunkedArray:
    """A column, or with a dot the field of a struct column."""
    if column in table.column_names:
        return table[column]
    outer, _, inner = column.partition(".")
    return pc.struct_field(table[outer], inner)


def texts(column: pa.ChunkedArray) -> list[str | None]:
    """Text of each value, valid UTF-8 or None."""
    values = column.to_pylist() if not _is_text(column.type) else _decoded(column)
    return [None if value is None else clean(str(value)) for value in values]


def _decoded(column: pa.ChunkedArray) -> list[str | None]:
    binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    return [None if v is None else v.decode("utf-8", "backslashreplace") for v in column.cast(binary).to_pylist()]


def labels(table: pa.Table, column: str | None, source: str | None) -> list[str | None]:
    """Label of each row."""
    if column is None:
        return [None] * table.num_rows
    values = leaf(table, column)
    if source == "folder":
        return [None if text is None else folder_label(text) for text in texts(values)]
    if _is_text(values.type):
        return [label_text(text) for text in texts(values)]
    names = class_names(table.schema.metadata, column)
    return [label_text(value, names) for value in values.to_pylist()]


def unique_keys(table: pa.Table, column: str | None, fallback: list[str]) -> list[str]:
    """The column's texts where they are all there and differ, else the fallback."""
    if column is None:
        return fallback
    keys = [text for text in texts(leaf(table, column)) if text]
    return keys if len(keys) == len(set(keys)) == table.num_rows else fallback
