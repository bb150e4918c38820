from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayclust.errors import DataError
from rayclust.store import tables
from rayclust.store.sources import Rows, plan_shards, read_rows
from tests.store.inputs import npy, parquet, vectors, write


def read(place: str, width: int | None = None, **settings: Any) -> list[Rows]:
    return [read_rows(shard, width=width) for shard in plan_shards(place, **settings)]


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.float32()), pa.list_(pa.float16(), 4), pa.large_list(pa.float64()), pa.list_(pa.float64(), 4),
        pa.list_(pa.int16()), pa.fixed_shape_tensor(pa.float32(), [4]),
    ],
    ids=str,
)  # fmt: skip
def test_every_type_of_list(place: str, type_: pa.DataType) -> None:
    values = np.round(vectors(5) * 100)
    storage = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_
    array = pa.array(values.astype(storage.value_type.to_pandas_dtype()).tolist(), storage)
    if isinstance(type_, pa.BaseExtensionType):
        array = pa.ExtensionArray.from_storage(type_, array)
    write(place, {"x.parquet": parquet({"embedding": array})})
    (rows,) = read(place)
    assert np.array_equal(rows.embeddings, values.astype(np.float16))
    assert rows.keys == [f"x/{i:08d}" for i in range(5)]
    assert rows.uris == [f"{place}/x.parquet#{i}" for i in range(5)]


def test_keys_uris_and_labels_of_a_table_that_rayclust_wrote(place: str) -> None:
    values = vectors(4).astype(np.float16)
    columns = [pa.array(range(4)), list("dcba"), [f"s3://b/{i}.jpg" for i in range(4)], ["x", None, "y", "x"]]
    columns = [*map(pa.array, columns), tables.fixed_list(values)]
    tables.write_table(f"{place}/part-00000.parquet", pa.table(columns, schema=tables.EMBEDDINGS(4)))
    (rows,) = read(place)
    assert rows.keys == list("abcd")
    assert rows.uris == [f"s3://b/{i}.jpg" for i in (3, 2, 1, 0)]
    assert rows.labels == ["x", "y", None, "x"]
    assert np.array_equal(rows.embeddings, values[::-1])


def test_bad_rows_of_lists(place: str) -> None:
    column = pa.array([[1, 2], None, [1], [None, 1], [3, 4], []], pa.list_(pa.float32()))
    fixed = pa.array([[1, 2], None, [1, None]], pa.list_(pa.float32(), 2))
    write(place, {"a.parquet": parquet({"embedding": column}), "b.parquet": parquet({"embedding": fixed})})
    first, second = read(place)
    assert first.embeddings.tolist() == [[1, 2], [3, 4]]
    assert [reject["reason"] for reject in first.rejects] == [
        "null_embedding",
        "wrong_width",
        "not_finite",
        "wrong_width",
    ]
    assert second.embeddings.tolist() == [[1, 2]]
    assert [reject["reason"] for reject in second.rejects] == ["null_embedding", "not_finite"]


def test_shards_are_ranges_of_row_groups(place: str) -> None:
    values = vectors(100)
    table = {"embedding": tables.fixed_list(values), "label": [str(i) for i in range(100)]}
    write(place, {"x.parquet": parquet(table, groups=20)})
    shards = list(plan_shards(place, shard_size=1))  # 32 rows
    assert [(shard.start, shard.count) for shard in shards] == [(0, 40), (40, 40), (80, 20)]
    found = [read_rows(shard) for shard in shards]
    assert np.array_equal(np.concatenate([rows.embeddings for rows in found]), values.astype(np.float16))
    assert [label for rows in found for label in rows.labels] == [str(i) for i in range(100)]


def test_tables_and_arrays_side_by_side_in_the_order_of_the_listing(place: str) -> None:
    files = {f"{name}.npy": npy(vectors(3)) for name in "bd"}
    files |= {f"{name}.parquet": parquet({"embedding": vectors(2).tolist()}) for name in "ac"}
    write(place, files)
    shards = list(plan_shards(place))
    assert [(s.index, s.name, s.first) for s in shards] == [(0, "a", 0), (1, "b", 2), (2, "c", 5), (3, "d", 7)]
    assert {shard.kind for shard in shards} == {"embeddings_parquet", "embeddings_npy"}


def test_a_table_of_something_else_is_refused_by_its_columns(place: str) -> None:
    write(place, {"a.npy": npy(vectors(3)), "b.parquet": parquet({"text": ["x"], "vec": [[1.0]]})})
    with pytest.raises(DataError, match=r"b\.parquet: no column `embedding`.*text \(string\)"):
        read(place, format="embeddings")
    write(place, {"b.parquet": parquet({"embedding": [[1.0]]})})
    with pytest.raises(DataError, match=r"images\.labels = x"):
        read(place, format="embeddings", labels="x")


def test_a_damaged_table_is_one_reject(place: str) -> None:
    good = parquet({"embedding": vectors(3).tolist()})
    write(place, {"a.parquet": good, "b.parquet": good[:-10]})
    first, second = read(place, width=4)
    assert len(first.keys) == 3
    assert (second.keys, second.embeddings.shape) == ([], (0, 4))
    assert second.rejects[0]["reason"] == "unreadable_file"


def test_real_vectors(shared_data: Path) -> None:
    (rows,) = read(str(shared_data / "vocab/synsets_a.parquet"))
    assert rows.embeddings.shape == (1860, 1280)
    assert rows.rejects == []
