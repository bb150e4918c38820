from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rayclust.errors import DataError
from rayclust.store.sources import columns

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VECTOR = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        ([("image", pa.binary())], "image"), ([("Image", pa.large_binary())], "Image"), ([("img", STRUCT)], "img"),
        ([("thing", pa.binary())], "thing"), ([("a", pa.binary()), ("b", pa.binary())], None),
        ([("a", pa.binary()), ("jpg", pa.binary())], "jpg"), ([("image", pa.string())], None),
        ([("image", pa.string()), ("raw", pa.binary())], "raw"), ([("image", pa.list_(pa.uint8()))], None),
        ([("image", pa.struct([("path", pa.string())]))], None), ([], None),
    ],
)  # fmt: skip
def test_image_column(fields: list[tuple[str, pa.DataType]], image: str | None) -> None:
    assert columns.image_column(pa.schema(fields)) == image


@pytest.mark.parametrize(
    ("type_", "is_found"),
    [
        (VECTOR, True), (pa.list_(pa.float16(), 4), True), (pa.large_list(pa.float64()), True),
        (pa.list_(pa.int8()), True), (pa.fixed_shape_tensor(pa.float32(), [4]), True), (pa.list_(pa.string()), False),
        (pa.list_(VECTOR), False), (pa.binary(), False), (pa.float32(), False), (pa.list_(pa.bool_()), False),
    ],
)  # fmt: skip
def test_embedding_column(type_: pa.DataType, is_found: bool) -> None:
    assert (columns.embedding_column(pa.schema([("Embedding", type_)])) is not None) == is_found


def test_key_and_uri_columns() -> None:
    text = pa.string()
    assert columns.key_column(pa.schema([("url", text), ("filename", text)])) == "filename"
    assert columns.key_column(pa.schema([("image", STRUCT)])) == "image.path"
    assert columns.key_column(pa.schema([("image", STRUCT), ("key", pa.int64())])) == "key"
    assert columns.key_column(pa.schema([("x", text)])) is None
    assert columns.uri_column(pa.schema([("uri", text), ("image_path", text)])) == "uri"
    assert columns.uri_column(pa.schema([("uri", pa.int32())])) is None


def test_label_column() -> None:
    schema = pa.schema([("image", STRUCT), ("y", pa.int8()), ("label", pa.list_(pa.int64())), ("breed", pa.string())])
    assert columns.label_column(schema, "auto", "t") == "y"
    assert columns.label_column(schema, "breed", "t") == "breed"
    assert columns.label_column(schema, "folder", "t") == "image.path"
    assert columns.label_column(schema, None, "t") is None
    with pytest.raises(DataError, match=r"images.labels = colour: t has no such column; .*breed \(string\)"):
        columns.label_column(schema, "colour", "t")


def test_labels_of_every_type() -> None:
    names = {"class_names": '["cat", "dog"]'}
    table = pa.table({"label": [0, 1, -1, None]}).replace_schema_metadata(names)
    assert columns.labels(table, "label", "auto") == ["cat", "dog", None, None]
    dictionary = pa.table({"label": pa.array(["a", None, "b"]).dictionary_encode()})
    assert columns.labels(dictionary, "label", "auto") == ["a", None, "b"]
    nested = pa.table({"label": [{"a": 1}, {"a": 2}]})
    assert columns.labels(nested, "label", "label") == [None, None]
    floats = pa.table({"label": [1.0, np.nan, 2.5]})
    assert columns.labels(floats, "label", "auto") == ["1", None, None]
    paths = pa.table({"path": ["a/b.jpg", None, "c.jpg"]})
    assert columns.labels(paths, "path", "folder") == ["a", None, None]
    assert columns.labels(paths, None, "auto") == [None] * 3


def test_text_that_is_not_utf8() -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers())
    assert columns.texts(pa.chunked_array([broken])) == ["a\\xff"]
    table = pa.table({"label": broken})
    assert columns.labels(table, "label", "auto") == ["a\\xff"]


@pytest.mark.parametrize(
    ("values", "is_kept"),
    [(["b", "a"], True), (["a", "a"], False), (["a", None], False), (["a", ""], False), ([2, 1], True)],
)
def test_keys_must_be_whole_and_differ(values: list[object], is_kept: bool) -> None:
    found = columns.unique_keys(pa.table({"key": values}), "key", ["f/0", "f/1"])
    assert found == ([str(value) for value in values] if is_kept else ["f/0", "f/1"])
