from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.errors import DataError
from rayclust.store import storage
from rayclust.store.sources import Record, Shard, fetch_many, parquet, plan_shards, read_records, read_rows
from rayclust.store.sources.parquet import Columns, RowNames
from tests.store.inputs import image, vectors, write
from tests.store.inputs import parquet as make

IMAGES = [image(i) for i in range(6)]


def read(place: str, **settings: Any) -> list[Record]:
    return [record for shard in plan_shards(place, **settings) for record in read_records(shard)]


def test_rows_come_by_key_with_data_label_and_uri(place: str) -> None:
    columns = {"image": IMAGES, "filename": [f"{c}.jpg" for c in "fbdace"], "label": [0, 1, 0, 1, -1, None]}
    write(place, {"x.parquet": make(columns, metadata={"class_names": ["cat", "dog"]})})
    found = read(place)
    assert [record.key for record in found] == [f"{c}.jpg" for c in "abcdef"]
    assert [record.data for record in found] == [IMAGES[i] for i in (3, 1, 4, 2, 5, 0)]
    assert [record.label for record in found] == ["dog", "dog", None, "cat", None, "cat"]
    assert found[0].uri == f"{place}/x.parquet#3"
    assert dict(fetch_many([found[0].uri])) == {found[0].uri: found[0].data}


def test_huggingface_structs(place: str) -> None:
    structs = [{"bytes": data, "path": f"p{i}.png"} for i, data in enumerate(IMAGES)]
    structs[2] = {"bytes": None, "path": "p2.png"}
    table = pa.table({"image": pa.array([*structs, None])})
    write(place, {"data/train-00000-of-00001.parquet": make({"image": table["image"]})})
    found = read(place)
    assert [(record.key, record.reason) for record in found] == [
        (f"data/train-00000-of-00001/{i:08d}", "null_image" if i in (2, 6) else None) for i in range(7)
    ]
    write(place, {"data/train-00000-of-00001.parquet": make({"image": structs})})
    assert [record.key for record in read(place)] == [f"p{i}.png" for i in range(6)]


def test_row_groups_become_shards(place: str) -> None:
    write(place, {"a.parquet": make({"image": IMAGES}, groups=2), "b.parquet": make({"image": IMAGES[:1]})})
    shards = list(plan_shards(place, shard_size=3))
    assert [(s.index, s.first, s.count, s.start, s.row_groups) for s in shards] == [
        (0, 0, 4, 0, (0, 2)), (1, 4, 2, 4, (2, 3)), (2, 6, 1, 0, (0, 1)),
    ]  # fmt: skip
    assert len({shard.stamp for shard in shards}) == 3
    found = [record for shard in shards for record in read_records(shard)]
    assert [record.data for record in found] == [*IMAGES, IMAGES[0]]
    assert [record.key for record in found] == [f"a/{i:08d}" for i in range(6)] + ["b/00000000"]


def test_large_shards_wait_on_disk(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_SPOOL_BYTES", 100)
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 2)
    write(place, {"x.parquet": make({"image": IMAGES, "key": list("fedcba")})})
    assert [record.data for record in read(place)] == IMAGES[::-1]


def test_row_groups_larger_than_memory_are_buffered(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_UNBUFFERED_BYTES", 10)
    monkeypatch.setattr(parquet, "_BUFFER_BYTES", 128)
    write(place, {"x.parquet": make({"image": IMAGES, "label": range(6)}, groups=4)})
    assert [(record.data, record.label) for record in read(place)] == [(IMAGES[i], str(i)) for i in range(6)]


def test_a_damaged_page_costs_its_rows_and_no_others(place: str) -> None:
    big = [bytes([i]) * 70_000 for i in range(6)]
    table = pa.table({"image": big, "key": list("abcdef")})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="none", use_dictionary=False) as writer:
        for i in range(3):
            writer.write_table(table.slice(2 * i, 2))
    data = bytearray(sink.getvalue())
    start = data.index(b"\x02" * 1000)
    data[start - 30 : start - 4] = b"\xff" * 26
    write(place, {"x.parquet": bytes(data)})
    found = read(place)
    assert [record.key for record in found] == list("abcdef")
    assert [record.reason for record in found] == [None, None, "unreadable_file", "unreadable_file", None, None]


def test_limits_and_classes(place: str) -> None:
    paths = ["n1/a.png", "n2/b.png", "n1/c.png"]
    write(place, {"x.parquet": make({"image": [IMAGES[0], IMAGES[1], bytes(999)], "path": paths, "label": [0, 1, 0]})})
    assert [record.key for record in read(place, classes=["n1"])] == ["n1/a.png", "n1/c.png"]
    assert [record.key for record in read(place, classes=["1"], labels="none")] == ["n2/b.png"]
    (shard,) = plan_shards(place)
    assert [record.reason for record in read_records(shard, max_bytes=998)] == [None, "too_large", None]


def test_the_storage_failing_is_no_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise DataError("cannot reach the bucket")

    write(str(tmp_path), {"x.parquet": make({"image": IMAGES})})
    (shard,) = plan_shards(str(tmp_path))
    monkeypatch.setattr(storage, "open_input", lambda _: Unreachable((tmp_path / "x.parquet").read_bytes()))
    with pytest.raises(DataError, match="cannot reach"):
        list(read_records(shard))


def test_real_photographs(shared_data: Path) -> None:
    shards = list(plan_shards(str(shared_data / "imagenette_val3k/images.parquet")))
    assert [shard.count for shard in shards] == [1000, 1000, 1000]
    record = next(iter(read_records(shards[1])))
    assert record.label == "chain saw"
    assert record.data is not None
    assert record.data[:2] == b"\xff\xd8"
    assert storage.stat(shards[0].uri) is not None


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
def test_column_of_images(fields: list[tuple[str, pa.DataType]], image: str | None) -> None:
    assert Columns.find(pa.schema(fields)).image == image


@pytest.mark.parametrize(
    ("type_", "is_found"),
    [
        (VECTOR, True), (pa.list_(pa.float16(), 4), True), (pa.large_list(pa.float64()), True),
        (pa.list_(pa.int8()), True), (pa.fixed_shape_tensor(pa.float32(), [4]), True), (pa.list_(pa.string()), False),
        (pa.list_(VECTOR), False), (pa.binary(), False), (pa.float32(), False), (pa.list_(pa.bool_()), False),
    ],
)  # fmt: skip
def test_column_of_embeddings(type_: pa.DataType, is_found: bool) -> None:
    assert (Columns.find(pa.schema([("Embedding", type_)])).embedding is not None) == is_found


def test_columns_of_keys_and_uris() -> None:
    text = pa.string()
    category = pa.dictionary(pa.int8(), text)
    assert Columns.find(pa.schema([("url", text), ("Filename", category)])).keys == ("Filename", "url")
    assert Columns.find(pa.schema([("image", STRUCT)])).keys == ("image.path",)
    assert Columns.find(pa.schema([("image", STRUCT), ("key", pa.int64())])).keys == ("key", "image.path")
    assert Columns.find(pa.schema([("x", text), ("path", pa.float32())])).keys == ()
    assert Columns.find(pa.schema([("uri", text), ("image_path", text)])).uri == "uri"
    assert Columns.find(pa.schema([("uri", pa.int32())])).uri is None


def test_column_of_labels() -> None:
    schema = pa.schema([("image", STRUCT), ("y", pa.int8()), ("label", pa.list_(pa.int64())), ("breed", pa.string())])
    found = {source: Columns.find(schema, source, "t").label for source in ("auto", "breed", "folder", None)}
    assert found == {"auto": "y", "breed": "breed", "folder": None, None: None}
    with pytest.raises(DataError, match=r"images.labels = colour: t has no such column; .*breed \(string\)"):
        Columns.find(schema, "colour", "t")


def test_columns_by_the_names_that_are_given() -> None:
    schema = pa.schema([("a", pa.binary()), ("b", pa.binary()), ("v", pa.list_(pa.int8())), ("n", pa.string())])
    named = {"image": "b", "embedding": "v", "key": "n"}
    found = Columns.find(schema, None, "t", named)
    assert (found.image, found.embedding, found.keys) == ("b", "v", ("n",))
    for role, column in [("image", "n"), ("embedding", "a"), ("key", "a"), ("image", "none")]:
        with pytest.raises(DataError, match=rf"images\.columns\.{role} = {column}: t has no such column .*; it has"):
            Columns.find(schema, None, "t", {role: column})


@pytest.mark.parametrize(
    ("fields", "embedding"),
    [
        ([("clip", VECTOR)], "clip"), ([("clip", VECTOR), ("dino", VECTOR)], None),
        ([("tokens", pa.list_(pa.int32()))], None),
        ([("image", pa.binary()), ("box", VECTOR)], None), ([("image", pa.list_(pa.float32()))], None),
        ([("clip", VECTOR), ("feature", VECTOR)], "feature"), ([("embedding", pa.binary())], None),
    ],
)  # fmt: skip
def test_the_only_column_of_vectors(fields: list[tuple[str, pa.DataType]], embedding: str | None) -> None:
    assert Columns.find(pa.schema(fields)).embedding == embedding


def test_bytes_under_a_name_of_embeddings_are_no_images() -> None:
    assert Columns.find(pa.schema([("embedding", pa.binary())])).image is None


@pytest.mark.parametrize("name", ["image", "label", "path", "uri"])
def test_two_columns_of_one_name_are_one_line(name: str) -> None:
    kind = pa.binary() if name == "image" else pa.string()
    with pytest.raises(DataError, match=f"t: has 2 columns called `{name}`; rename all but one"):
        Columns.find(pa.schema([("image", pa.binary()), (name, kind), (name, kind)][name == "image" :]), "auto", "t")


def names(table: pa.Table, source: str | None = None, **settings: Any) -> RowNames:
    labels = {} if source is None else {"labels": source}
    settings = {"name": "f", "labels": "none"} | labels | settings
    shard = Shard(0, "parquet", "u", stamp="s", **settings)
    file = pq.ParquetFile(pa.BufferReader(to_parquet(table)))
    columns = Columns.find(table.schema, source, "t", shard.columns)
    return parquet.read_names(file, columns, shard, list(range(file.metadata.num_row_groups)), table.num_rows)


def to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers())


@pytest.mark.parametrize(
    ("column", "source", "labels"),
    [
        ([0, 1, -1, None], "auto", ["cat", "dog", None, None]), ([1.0, np.nan, 2.5], "label", ["dog", None, None]),
        (pa.array(["a", None, "b"]).dictionary_encode(), "auto", ["a", None, "b"]),
        ([{"a": 1}, {"a": 2}], "label", [None, None]), ([1, 2], None, [None, None]), (NOT_UTF8, "auto", ["a\\xff"]),
        ([b"a", None, b"\xff"], "auto", ["a", None, "\\xff"]),
    ],
)  # fmt: skip
def test_labels_of_every_type(column: object, source: str | None, labels: list[str | None]) -> None:
    table = pa.table({"label": column}).replace_schema_metadata({"class_names": '["cat", "dog"]'})
    assert names(table, source).labels == labels


def test_folders_of_keys_as_labels() -> None:
    assert names(pa.table({"path": ["a/b.jpg", "d.jpg", "c/images/e.jpg"]}), "folder").labels == ["a", None, "c"]
    table = pa.table({"x": [1, 2]})
    assert names(table, "folder", name="cat/part-0").labels == ["cat", "cat"]
    assert names(table, "folder", name="label=dog/part-0").labels == ["dog", "dog"]
    assert names(table, "auto", name="cat/part-0").labels == [None, None]


@pytest.mark.parametrize(
    ("values", "is_kept"),
    [(["b", "a"], True), (["a", "a"], False), (["a", None], False), (["a", ""], False), ([2, 1], True)],
)
def test_keys_must_be_whole_and_differ(values: list[object], is_kept: bool) -> None:
    found = names(pa.table({"key": values})).keys
    assert found == ([str(value) for value in values] if is_kept else ["f/00000000", "f/00000001"])


def test_the_next_column_names_the_rows_where_the_first_repeats() -> None:
    table = pa.table({"filename": ["scan.tif"] * 2, "id": [7, 8]})
    assert names(table).keys == ["7", "8"]
    assert names(pa.table({"path": pa.array(["a/1", "a/2"]).dictionary_encode()})).keys == ["a/1", "a/2"]
    with pytest.raises(DataError, match=r"images\.columns\.key = filename: .* repeat or are missing"):
        names(table, columns={"key": "filename"})


def test_keys_of_a_file_of_several_shards_differ_in_the_whole_file(place: str) -> None:
    data = {"embedding": vectors(6).tolist(), "key": list("abcabc"), "id": list(range(6))}
    write(place, {"x.parquet": make(data, groups=3)})
    rows = [read_rows(shard) for shard in plan_shards(place, shard_size=1)]
    assert [key for part in rows for key in part.keys] == [str(i) for i in range(6)]


@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [
        ([0, 1], [0, 1], ["a/0", "a/1", "b/0", "b/1"]), (["x.jpg"], ["y.jpg"], ["a/x.jpg", "b/y.jpg"]),
        (["x/1"], ["y/1"], ["x/1", "y/1"]), (["x/1"], ["x/1"], ["a/x/1", "b/x/1"]),
    ],
)  # fmt: skip
def test_keys_tell_the_rows_of_several_tables_apart(
    place: str, first: list[object], second: list[object], keys: list[str]
) -> None:
    tables = {"a": first, "b": second}
    write(place, {f"{n}.parquet": make({"embedding": vectors(len(k)).tolist(), "path": k}) for n, k in tables.items()})
    assert [key for shard in plan_shards(place) for key in read_rows(shard).keys] == keys


def test_class_names_of_both_kinds_of_metadata() -> None:
    table = pa.table({"label": [1, 0], "other": [0, 1]})
    assert names(table.replace_schema_metadata({"class_names": '["a", "b"]'}), "label").labels == ["b", "a"]
    hugging = b'{"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}'
    table = table.replace_schema_metadata({b"huggingface": hugging})
    assert names(table, "label").labels == ["y", "x"]
    assert names(table, "other").labels == ["0", "1"]


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {b"class_names": b"{"}, {b"class_names": b"[1]"}, {b"class_names": b'{"0": "a"}'},
     {b"huggingface": b"[]"}, {b"huggingface": b'{"info": null}'}, {b"class_names": b"\xff"}],
)  # fmt: skip
def test_damaged_metadata_names_no_classes(metadata: dict[bytes, bytes] | None) -> None:
    assert names(pa.table({"label": [1, 0]}).replace_schema_metadata(metadata), "label").labels == ["1", "0"]
