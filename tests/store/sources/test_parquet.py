from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayclust.errors import DataError
from rayclust.store import filesystem
from rayclust.store.sources import Record, fetch, parquet, plan_shards, read_records
from tests.store.inputs import image, write
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
    assert fetch(found[0].uri) == found[0].data


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
    monkeypatch.setattr(parquet, "_AT_ONCE", 10)
    monkeypatch.setattr(parquet, "_BUFFER", 128)
    write(place, {"x.parquet": make({"image": IMAGES, "label": range(6)}, groups=4)})
    assert [(record.data, record.label) for record in read(place)] == [(IMAGES[i], str(i)) for i in range(6)]


def test_a_damaged_page_costs_its_rows_and_no_others(place: str) -> None:
    big = [bytes([i]) * 70_000 for i in range(6)]
    table = pa.table({"image": big, "key": list("abcdef")})
    sink = pa.BufferOutputStream()
    with pa.parquet.ParquetWriter(sink, table.schema, compression="none", use_dictionary=False) as writer:
        for i in range(3):
            writer.write_table(table.slice(2 * i, 2))
    data = bytearray(sink.getvalue())
    start = data.index(b"\x02" * 1000)
    data[start - 30 : start - 4] = b"\xff" * 26
    write(place, {"x.parquet": bytes(data)})
    found = read(place)
    assert [record.key for record in found] == list("abcdef")
    assert [record.reason for record in found] == [None, None, "unreadable_file", "unreadable_file", None, None]


def test_a_damaged_file_does_not_cost_the_others(place: str) -> None:
    good = make({"image": IMAGES[:2]})
    write(place, {"a.parquet": good, "b.parquet": good[:-20], "c.parquet": b"", "d.parquet": good})
    found = read(place)
    assert [(record.key, record.reason) for record in found if record.reason] == [
        ("b", "unreadable_file"), ("c", "unreadable_file"),
    ]  # fmt: skip
    assert len(found) == 6


def test_limits_and_classes(place: str) -> None:
    paths = ["n1/a.png", "n2/b.png", "n1/c.png"]
    write(place, {"x.parquet": make({"image": [IMAGES[0], IMAGES[1], bytes(999)], "path": paths, "label": [0, 1, 0]})})
    assert [record.key for record in read(place, classes=["n1"])] == ["n1/a.png", "n1/c.png"]
    assert [record.key for record in read(place, classes=["1"], labels="none")] == ["n2/b.png"]
    (shard,) = plan_shards(place)
    assert [record.reason for record in read_records(shard, max_bytes=998)] == [None, "too_large", None]


@pytest.mark.parametrize("columns", [{"text": ["a"]}, {"image": ["not bytes"]}, {"a": [b"x"], "b": [b"y"]}])
def test_a_table_without_images_names_its_columns(place: str, columns: dict[str, list[object]]) -> None:
    write(place, {"good.parquet": make({"image": IMAGES}), "x.parquet": make(columns)})
    with pytest.raises(DataError, match=rf"x\.parquet: no column holds images.*{next(iter(columns))}"):
        read(place)


def test_a_column_of_labels_that_does_not_exist(place: str) -> None:
    write(place, {"x.parquet": make({"image": IMAGES, "label": range(6)})})
    with pytest.raises(DataError, match=r"images\.labels = breed"):
        read(place, labels="breed")


def test_the_storage_failing_is_no_reject(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(s3_bucket, {"x.parquet": make({"image": IMAGES})})
    (shard,) = plan_shards(s3_bucket)

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr("rayclust.store.storage._filesystem", fail)
    with pytest.raises(DataError, match="cannot reach"):
        list(read_records(shard))


def test_real_photographs(shared_data: Path) -> None:
    shards = list(plan_shards(str(shared_data / "imagenette_val3k/images.parquet")))
    assert [shard.count for shard in shards] == [1000, 1000, 1000]
    record = next(iter(read_records(shards[1])))
    assert record.label == "chain saw"
    assert record.data is not None
    assert record.data[:2] == b"\xff\xd8"
    assert filesystem.stat(shards[0].uri) is not None
