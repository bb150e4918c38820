from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.errors import ArtefactError, ShapeError
from rayclust.store import storage, tables


def embeddings(count: int = 5, width: int = 3, first: int = 0) -> pa.Table:
    values = np.random.default_rng(first).standard_normal((count, width)).astype(np.float16)
    keys = [f"k{first + i}" for i in range(count)]
    labels = [None if i % 2 else "cat" for i in range(count)]
    columns = [pa.array(range(first, first + count)), keys, keys, labels, tables.fixed_list(values)]
    return pa.table([pa.array(c) if isinstance(c, list) else c for c in columns], schema=tables.EMBEDDINGS(width))


@pytest.fixture
def uri(place: str) -> str:
    return storage.join(place, "part-00000.parquet")


def test_what_is_written_is_read(uri: str) -> None:
    table = embeddings()
    tables.write_table(uri, table)
    read = tables.read_table(uri)
    assert read.equals(table, check_metadata=True)
    assert read.schema.metadata == {b"dimension": b"3"}
    assert tables.read_table(uri, ["label", "row"]).column_names == ["label", "row"]


def test_bytes_do_not_depend_on_how_rows_lie_in_memory() -> None:
    table = embeddings(50)
    pieces = pa.concat_tables([table.slice(0, 7), table.slice(7, 30), table.slice(37)])
    assert tables.encode_table(pieces) == tables.encode_table(table)
    assert tables.encode_table(embeddings(60).slice(10, 20)) == tables.encode_table(
        pa.concat_tables([embeddings(60).slice(10, 20)]).take(list(range(20)))
    )


@pytest.mark.parametrize("schema", [tables.EMBEDDINGS(3), tables.CLUSTERS, tables.NEIGHBORS(2)], ids=["e", "c", "n"])
def test_a_table_read_and_written_again_has_the_same_bytes(uri: str, schema: pa.Schema) -> None:
    table = embeddings() if "embedding" in schema.names else schema.empty_table()
    tables.write_table(uri, table)
    assert tables.encode_table(tables.read_table(uri)) == storage.read_bytes(uri)


def test_the_format_is_fixed() -> None:
    rejects = pa.table({"key": ["a"], "uri": ["b"], "reason": ["c"], "detail": ["d"]}, schema=tables.REJECTS)
    first, second = tables.encode_table(rejects), tables.encode_table(rejects)
    assert first == second
    written = pq.ParquetFile(pa.BufferReader(first)).metadata
    assert written.format_version == "2.6"
    assert written.row_group(0).column(0).compression == "ZSTD"


def test_row_groups_are_fixed_and_lists_keep_no_statistics() -> None:
    count = tables.ROW_GROUP + 1
    file = pq.ParquetFile(pa.BufferReader(tables.encode_table(embeddings(count))))
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [tables.ROW_GROUP, 1]
    by_name = {file.metadata.row_group(0).column(i).path_in_schema: i for i in range(5)}
    assert file.metadata.row_group(0).column(by_name["row"]).is_stats_set
    assert not file.metadata.row_group(0).column(by_name["embedding.list.element"]).is_stats_set


def neighbors() -> pa.Table:
    columns = {"row": range(2), "neighbors": tables.fixed_list(np.array([[1, 0], [0, 1]]))}
    similarity = tables.fixed_list(np.array([[1, 0.5], [1, 0.25]], np.float16))
    return pa.table(columns | {"similarity": similarity}, schema=tables.NEIGHBORS(2))


READERS: dict[str, Callable[[ModuleType, str, str], list[float]]] = {
    "pandas": lambda module, path, name: list(module.read_parquet(path)[name].iloc[0]),
    "polars": lambda module, path, name: list(module.read_parquet(path)[name][0]),
    "duckdb": lambda module, path, name: list(module.read_parquet(path).project(name).fetchall()[0][0]),
    "datasets": lambda module, path, name: list(module.Dataset.from_parquet(path)[0][name]),
    "pyarrow.dataset": lambda module, path, name: module.dataset(path).to_table()[name][0].as_py(),
}


@pytest.mark.parametrize("reader", READERS)
def test_other_programs_read_the_tables(tmp_path: Path, reader: str) -> None:
    module = pytest.importorskip(reader)
    wide = np.array([[1e6, 2e-7]], np.float32)
    schema = tables.EMBEDDINGS(2, element=pa.float32())
    columns = {"row": [0], "key": ["a"], "uri": ["u"], "label": [None], "embedding": tables.fixed_list(wide)}
    for table, name in [
        (embeddings(3), "embedding"), (neighbors(), "neighbors"), (neighbors(), "similarity"),
        (pa.table(columns, schema=schema), "embedding"),
    ]:  # fmt: skip
        tables.write_table(str(tmp_path / "x.parquet"), table)
        expected = table[name][0].as_py()
        assert [float(value) for value in READERS[reader](module, str(tmp_path / "x.parquet"), name)] == expected


def test_rows_are_stored_in_halves_unless_these_would_lose_one() -> None:
    rows = np.array([[1, 1e-9], [0.002, 0], [65504, -1], [np.nan, 1], [np.inf, 0], [0, 0]])
    assert tables.in_storage(rows).dtype == np.float16
    for peak in (65536.0, 0.0019, 1e-30, -1e6):
        assert tables.in_storage(np.vstack([rows, [peak, 0]])).dtype == np.float32
    assert tables.in_storage(np.zeros((0, 3))).dtype == np.float16
    assert tables.in_storage(np.array([[100_000, 1]])).tolist() == [[100_000, 1]]


@pytest.mark.parametrize(
    "schema",
    [tables.EMBEDDINGS(4), tables.NEIGHBORS(3), tables.REJECTS, tables.ASSIGNMENTS, tables.CLUSTERS, tables.MAP],
    ids=["embeddings", "neighbors", "rejects", "assignments", "clusters", "map"],
)
def test_every_kind_of_table_may_be_empty(uri: str, schema: pa.Schema) -> None:
    tables.write_table(uri, schema.empty_table())
    assert tables.read_table(uri).schema.equals(schema, check_metadata=True)


def test_clusters_and_neighbors_come_back(uri: str) -> None:
    cluster = {
        "cluster": 0, "size": 2, "name": None, "score": None, "exemplars": [1], "outliers": [],
        "runners_up": [{"name": "cat", "score": 0.5}], "name_without_classes": "dog", "score_without_classes": 0.25,
    }  # fmt: skip
    tables.write_table(uri, pa.Table.from_pylist([cluster], schema=tables.CLUSTERS))
    assert tables.read_table(uri).to_pylist() == [cluster]
    neighbors = np.array([[1, 2], [0, 2], [1, 0]])
    columns = [pa.array(range(3)), tables.fixed_list(neighbors), tables.fixed_list(np.ones((3, 2), np.float16))]
    tables.write_table(uri, pa.table(columns, schema=tables.NEIGHBORS(2)))
    assert np.array_equal(tables.matrix(tables.read_table(uri, ["neighbors"])["neighbors"]), neighbors)


def test_a_damaged_table_names_the_file_and_what_to_do(uri: str) -> None:
    data = tables.encode_table(embeddings(200, 8))
    flipped = bytearray(data)
    flipped[100:400] = bytes(300)
    one_bit = bytearray(data)
    one_bit[len(data) // 2] ^= 4
    damaged = [
        b"",
        b"PAR1",
        bytes(one_bit),
        data[:-1],
        data[: len(data) // 2],
        b"x" * 500,
        bytes(flipped),
        data[:4] + data[8:],
    ]
    for content in damaged:
        storage.write_bytes(uri, content)
        with pytest.raises(ArtefactError, match="run its stage again") as caught:
            tables.read_table(uri)
        assert uri in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_tables_and_columns(uri: str) -> None:
    with pytest.raises(ArtefactError, match="is missing"):
        tables.read_table(uri)
    tables.write_table(uri, embeddings())
    with pytest.raises(ArtefactError, match="no column cluster"):
        tables.read_table(uri, ["row", "cluster"])


def test_matrix_is_a_view_and_joins_chunks() -> None:
    values = np.arange(12, dtype=np.float16).reshape(4, 3)
    column = tables.fixed_list(values)
    assert np.shares_memory(tables.matrix(column), column.flatten().to_numpy())
    assert np.array_equal(tables.matrix(column.slice(1, 2)), values[1:3])
    assert np.array_equal(tables.matrix(pa.chunked_array([column.slice(0, 1), column.slice(1)])), values)
    empty = tables.matrix(pa.chunked_array([], pa.list_(pa.float16(), 3)))
    assert (empty.shape, empty.dtype) == ((0, 3), np.float16)


def test_matrix_and_fixed_list_refuse_what_is_none() -> None:
    for column in (pa.array([[1.0], [2.0]]), pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)), pa.array([1])):
        with pytest.raises(ShapeError):
            tables.matrix(column)
    for array in (np.zeros(3), np.zeros((2, 0)), np.zeros((1, 2, 3))):
        with pytest.raises(ShapeError):
            tables.fixed_list(array)
    assert tables.fixed_list(np.asfortranarray(np.eye(2))).to_pylist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_table_in_pieces_is_whole_or_as_it_was(place: str, ending: str) -> None:
    uri, schema = storage.join(place, f"t.{ending}"), pa.schema([("x", pa.int64()), ("word", pa.string())])
    pieces = [
        pa.table([[1, 2], ["a", None]], schema=schema),
        schema.empty_table(),
        pa.table([[3], ["b"]], schema=schema),
    ]
    tables.write_pieces(uri, schema, pieces)
    before = storage.read_bytes(uri)
    if ending == "csv":
        assert before.decode().splitlines() == ['"x","word"', '1,"a"', "2,", '3,"b"']
    else:
        assert tables.read_table(uri).equals(pa.concat_tables(pieces))

    def broken() -> Iterator[pa.Table]:
        yield pieces[0]
        raise ArtefactError("part 1 is gone")

    with pytest.raises(ArtefactError, match="part 1 is gone"):
        tables.write_pieces(uri, schema, broken())
    assert storage.read_bytes(uri) == before
    tables.write_pieces(uri, schema, [])
    assert storage.read_bytes(uri) != before
    assert [file.key for file in storage.walk(place)] == [f"t.{ending}"]


def test_local_tables_are_read_without_threads_of_pyarrows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told, read = list[object](), pq.ParquetFile.read

    def recorded(self: pq.ParquetFile, **options: object) -> pa.Table:
        told.append(options["use_threads"])
        return read(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", recorded)
    uri = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"row": [0, 1]}), uri)
    assert tables.read_table(uri).num_rows == 2
    assert told == [False]
