from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayclust.errors import DataError
from rayclust.store import storage, tables
from rayclust.store.sources import Rows, Shard, plan_shards, read_rows
from rayclust.store.sources.embeddings import (
    DamagedNpyError,
    EmbeddingBuffer,
    read_npy_header,
    read_npy_rows,
    validate_embeddings,
)
from rayclust.store.sources.parquet import RowNames
from rayclust.store.sources.plan import file_kind
from tests.store.inputs import npy, parquet, vectors, write

VALUES = vectors(70)
HALVES = VALUES.astype(np.float16)


def load_npz(path: Path) -> Mapping[str, np.ndarray]:
    """Stands in for the reader of tensors: these tests need none."""
    with np.load(path) as found:
        return {name if name != "alone" else "": found[name] for name in found.files}


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read(place: str, width: int | None = None, **settings: Any) -> list[Rows]:
    return [read_rows(shard, load_tensors=load_npz, width=width) for shard in plan_shards(place, **settings)]


@pytest.mark.parametrize("labels", ["labels.npy", "x_labels.npy", "x-labels.npy"])
def test_an_array_with_labels_beside(place: str, labels: str) -> None:
    write(place, {"x.npy": npy(VALUES), labels: npy(np.arange(70) % 3)})
    shards = list(plan_shards(place, shard_size=1))  # 32 rows
    assert [(shard.start, shard.count, shard.first) for shard in shards] == [(0, 32, 0), (32, 32, 32), (64, 6, 64)]
    found = [read_rows(shard) for shard in shards]
    assert np.array_equal(np.concatenate([rows.embeddings for rows in found]), HALVES)
    assert [label for rows in found for label in rows.labels] == [str(i % 3) for i in range(70)]
    assert found[1].keys[0] == "x/00000032"
    assert found[1].uris[0] == f"{place}/x.npy#32"


def test_a_single_file_finds_its_labels(place: str) -> None:
    write(place, {"x.npy": npy(VALUES), "labels.npy": npy(np.full(70, "cat")), "other.txt": b""})
    (rows,) = read(f"{place}/x.npy")
    assert set(rows.labels) == {"cat"}
    (rows,) = read(f"{place}/x.npy", labels="none")
    assert set(rows.labels) == {None}


def test_stamps_follow_labels_too(place: str) -> None:
    write(place, {"x.npy": npy(VALUES), "labels.npy": npy(np.zeros(70))})
    (before,) = plan_shards(place)
    write(place, {"labels.npy": npy(np.ones(70))})
    (after,) = plan_shards(place)
    assert before.stamp != after.stamp


def test_clip_retrieval_folders(place: str) -> None:
    metadata = {"image_path": [f"/img/{i:02d}.jpg" for i in range(40)], "caption": ["x"] * 40}
    write(
        place,
        {
            "img_emb/img_emb_0.npy": npy(VALUES[:40]),
            "img_emb/img_emb_1.npy": npy(VALUES[40:]),
            "metadata/metadata_0.parquet": parquet(metadata),
            "text_emb/text_emb_0.npy": npy(VALUES[:40] * 2),
        },
    )
    shards = list(plan_shards(place, shard_size=1))
    assert [(shard.name, shard.start, shard.count) for shard in shards] == [
        ("img_emb/img_emb_0", 0, 32), ("img_emb/img_emb_0", 32, 8), ("img_emb/img_emb_1", 0, 30),
    ]  # fmt: skip
    found = [read_rows(shard) for shard in shards]
    assert np.array_equal(np.concatenate([rows.embeddings for rows in found]), HALVES)
    assert found[1].keys[0] == found[1].uris[0] == "/img/32.jpg"
    assert found[2].keys[0] == "img_emb/img_emb_1/00000000"


@pytest.mark.parametrize(
    "tensors",
    [
        {"embeddings": VALUES, "labels": np.arange(70)}, {"features": VALUES, "ys": np.arange(70)},
        {"embedding": VALUES, "other": np.zeros((3, 3)), "label": np.arange(70)}, {"a": VALUES, "b": np.arange(70)},
    ],
    ids=lambda tensors: "-".join(tensors),
)  # fmt: skip
def test_tensors_with_labels_inside(place: str, tensors: dict[str, np.ndarray]) -> None:
    write(place, {"x.pt": npz(**tensors)})
    (rows,) = read(place)
    assert np.array_equal(rows.embeddings, HALVES)
    assert rows.labels == [str(i) for i in range(70)]


def test_names_of_rows_among_tensors_are_no_labels(place: str) -> None:
    write(place, {"x.pt": npz(embeddings=VALUES, img_paths=np.array([f"{i}.jpg" for i in range(70)]))})
    (rows,) = read(place)
    assert rows.labels == [None] * 70


class Halves:
    """A tensor of a type that numpy does not have."""

    shape = VALUES.shape

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Got unsupported ScalarType BFloat16")

    def float(self) -> np.ndarray:
        return VALUES


@pytest.mark.parametrize(
    "content",
    [
        (VALUES, np.arange(70)), [VALUES, list(range(70))], {"train": {"x": VALUES, "y": np.arange(70)}, "epoch": 3},
        {"features": Halves(), "labels": [str(i) for i in range(70)], "note": "text", "nothing": None, "empty": []},
    ],
    ids=["tuple", "list", "nested", "mixed"],
)  # fmt: skip
def test_whatever_the_reader_of_tensors_finds(place: str, content: object) -> None:
    write(place, {"x.pt": b""})
    (shard,) = plan_shards(place)
    rows = read_rows(shard, load_tensors=lambda _: content)
    assert np.array_equal(rows.embeddings, HALVES)
    assert rows.labels == [str(i) for i in range(70)]


def test_what_the_reader_of_tensors_refuses_is_told_by_uri(place: str) -> None:
    def refuse(path: Path) -> None:
        raise DataError(f"{path}: holds objects that only code can build")

    write(place, {"x.pt": b""})
    (shard,) = plan_shards(place)
    with pytest.raises(DataError, match=r"x\.pt: holds objects") as caught:
        read_rows(shard, load_tensors=refuse)
    assert str(caught.value).startswith(f"{place}/x.pt: ")


@pytest.mark.parametrize("error", [zipfile.BadZipFile("bad\nmagic"), ValueError("x"), RuntimeError("x"), EOFError()])
def test_whatever_damage_does_to_the_reader_of_tensors_is_one_line(place: str, error: Exception) -> None:
    def fail(_: Path) -> None:
        raise error

    write(place, {"x.pt": b""})
    (shard,) = plan_shards(place)
    with pytest.raises(DataError, match=r"x\.pt: is no readable file of tensors") as caught:
        read_rows(shard, load_tensors=fail)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"), [("x_labels.npy", npy(np.arange(70))), ("labels.pt", npz(alone=np.arange(70)))]
)
def test_a_tensor_alone_with_labels_beside(place: str, name: str, data: bytes) -> None:
    write(place, {"x.pt": npz(alone=VALUES), name: data})
    (rows,) = read(place)
    assert np.array_equal(rows.embeddings, HALVES)
    assert rows.labels[69] == "69"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"x.pt": npz(a=np.zeros(3), b=np.zeros(4))}, r"no tensor `embeddings`.*a \(3,\), b \(4,\)"),
        ({"x.pt": npz(a=VALUES, b=VALUES)}, "no tensor `embeddings`"),
        ({"x.pt": npz(alone=np.zeros((3, 2, 2)))}, r"a tensor \(3, 2, 2\)"),
        ({"x.pt": npz(x=VALUES, y=np.arange(3))}, "one label per row"),
        ({"x.pt": npz()}, "no tensors"),
    ],
)
def test_tensors_that_are_no_table_of_embeddings(place: str, files: dict[str, bytes], words: str) -> None:
    write(place, files)
    with pytest.raises(DataError, match=words) as caught:
        read(place)
    assert place in str(caught.value)


def test_cut_and_damaged_files_keep_what_is_whole(place: str) -> None:
    data = npy(VALUES)
    write(place, {"a.npy": data[:-50], "b.npy": b"garbage", "c.npy": data, "labels.npy": npy(np.arange(70))})
    first, second, third = read(place)
    assert np.array_equal(first.embeddings, HALVES[:66])
    assert first.labels[65] == "65"
    assert [(reject["key"], reject["reason"]) for reject in first.rejects] == [("a", "truncated")]
    assert (second.keys, second.rejects[0]["reason"]) == ([], "unreadable_file")
    assert len(third.keys) == 70


def test_a_file_that_is_gone(place: str) -> None:
    write(place, {"x.npy": npy(VALUES), "y.pt": npz(alone=VALUES)})
    shards = list(plan_shards(place))
    for shard in shards:
        storage.remove(shard.uri)
        rows = read_rows(shard, load_tensors=load_npz, width=5)
        assert rows.embeddings.shape == (0, 5)
        assert (rows.rejects[0]["key"], rows.rejects[0]["reason"]) == (shard.name, "unreadable_file")
        assert len(rows.rejects) == (shard.count or 1)


def test_tensors_need_a_reader(place: str) -> None:
    write(place, {"x.pt": npz(alone=VALUES)})
    (shard,) = plan_shards(place)
    with pytest.raises(DataError, match="load_tensors"):
        read_rows(shard)


@pytest.mark.parametrize("key", ["a.npy", "img_emb/img_emb_0.npy", "x/FEATS.PT", "mylabels.npy"])
def test_array_files(key: str) -> None:
    assert file_kind(key) == "embeddings"


@pytest.mark.parametrize(
    "key", ["labels.npy", "a_labels.npy", "x/train-labels.pt", "targets.npy", "text_emb/text_emb_0.npy", "a.npz"]
)
def test_other_files(key: str) -> None:
    assert file_kind(key) is None


def test_real_arrays(shared_data: Path) -> None:
    (rows,) = read(str(shared_data / "imagenette_val3k/features_mnv2b_f16.npy"))
    assert rows.embeddings.shape == (3000, 1280)
    assert rows.labels.count("3") == 300


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
    write(place, {"a.npy": npy(vectors(3)), "b.parquet": parquet({"text": ["x"], "vec": [[1]]})})
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


def test_real_tables(shared_data: Path) -> None:
    (rows,) = read(str(shared_data / "vocab/synsets_a.parquet"))
    assert rows.embeddings.shape == (1860, 1280)
    assert rows.rejects == []


def rows_of(uri: str, start: int = 0, count: int | None = None) -> np.ndarray:
    return read_npy_rows(uri, read_npy_header(uri), start, count)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "i1", "<u8", "U5"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_every_type_and_order(place: str, dtype: str, order: str) -> None:
    array = np.asarray(np.arange(60).reshape(20, 3).astype(dtype), order=order)  # type: ignore[call-overload]
    uri = f"{write(place, {'x.npy': npy(array)})}/x.npy"
    assert read_npy_header(uri).shape == (20, 3)
    for start, count in ((0, None), (0, 20), (5, 7), (18, 9), (20, 3)):
        stop = None if count is None else start + count
        assert np.array_equal(rows_of(uri, start, count), array[start:stop])


def test_vectors_and_nothing(place: str) -> None:
    write(place, {"v.npy": npy(np.arange(9)), "n.npy": npy(np.zeros((0, 4))), "s.npy": npy(np.array(3))})
    assert rows_of(f"{place}/v.npy", 2, 3).tolist() == [2, 3, 4]
    assert rows_of(f"{place}/n.npy").shape == (0, 4)
    with pytest.raises(DataError, match="single number"):
        rows_of(f"{place}/s.npy")


def test_a_cut_file_keeps_its_whole_rows(place: str) -> None:
    array = np.arange(30, dtype=np.float32).reshape(10, 3)
    data = npy(array)
    write(place, {"x.npy": data[:-30], "f.npy": npy(np.asfortranarray(array))[:-1]})
    assert np.array_equal(rows_of(f"{place}/x.npy"), array[:7])
    assert np.array_equal(rows_of(f"{place}/x.npy", 5, 5), array[5:7])
    with pytest.raises(DamagedNpyError):
        rows_of(f"{place}/f.npy")


@pytest.mark.parametrize(
    "data", [b"", b"\x93NUMPY", b"x" * 200, npy(np.zeros(3))[:20], b"\x93NUMPY\x09\x00" + bytes(90)]
)
def test_what_is_no_npy_file(place: str, data: bytes) -> None:
    write(place, {"x.npy": data})
    with pytest.raises(DamagedNpyError):
        read_npy_header(f"{place}/x.npy")


def test_objects_are_never_unpickled(place: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("unpickled",))

    write(place, {"x.npy": npy(np.array([Trap(), 1], dtype=object), allow_pickle=True)})
    with pytest.raises(DataError, match="Python objects"):
        rows_of(f"{place}/x.npy")
    write(place, {"x.npy": npy(np.zeros(3, [("a", "f4"), ("b", "i4")]))})
    with pytest.raises(DataError, match="records of 2 fields"):
        rows_of(f"{place}/x.npy")


SHARD = Shard(0, "embeddings_npy", "u", "n", "s")


def validated(
    blocks: list[list[list[float] | None]],
    width: int | None = None,
    labels: list[str | None] | None = None,
    shard: Shard = SHARD,
) -> Rows:
    """Rows of a few blocks, keys counting down so that order matters."""
    buffer, count = EmbeddingBuffer(), sum(map(len, blocks))
    for block in blocks:
        widths = np.array([-1 if row is None else len(row) for row in block], dtype=np.int64)
        by_width = {
            int(width): np.array([row for row in block if row is not None and len(row) == width])
            for width in np.unique(widths[widths > 0])
        }
        buffer.add(widths, by_width)
    keys, uris = [f"k{count - i}" for i in range(count)], [f"u#{i}" for i in range(count)]
    return validate_embeddings(shard, RowNames(keys, uris, labels or [None] * count), buffer, width)


def test_rows_come_by_key() -> None:
    rows = validated([[[1, 2], [3, 4]], [[5, 6]]], labels=["a", "b", "c"])
    assert rows.keys == ["k1", "k2", "k3"]
    assert rows.embeddings.tolist() == [[5, 6], [3, 4], [1, 2]]
    assert (rows.uris, rows.labels) == (["u#2", "u#1", "u#0"], ["c", "b", "a"])
    assert rows.embeddings.dtype == np.float16


def test_every_bad_row_is_a_reject_and_no_good_one_is_lost() -> None:
    nan, inf = np.nan, np.inf
    rows = validated([[[1, 2], None, [1, 2, 3], [nan, 1]], [[inf, 1], [1e39, 1], [0, 0], [1e-60, 0], [], [7, 8]]])
    assert rows.embeddings.tolist() == [[7, 8], [1, 2]]
    assert {reject["key"]: reject["reason"] for reject in rows.rejects} == {
        "k9": "null_embedding", "k8": "wrong_width", "k7": "not_finite", "k6": "not_finite", "k5": "overflow",
        "k4": "zero_vector", "k3": "zero_vector", "k2": "wrong_width",
    }  # fmt: skip
    assert all(reject["uri"] and reject["detail"] for reject in rows.rejects)


def test_the_usual_width_is_that_of_most_rows_unless_one_is_asked_for() -> None:
    blocks: list[list[list[float] | None]] = [[[1, 2, 3], [1, 2], [3, 4]]]
    assert validated(blocks).embeddings.shape == (2, 2)
    assert validated(blocks, 3).keys == ["k3"]
    none = validated(blocks, 9)
    assert (none.embeddings.shape, len(none.rejects)) == ((0, 9), 3)
    assert validated([[]]).embeddings.shape == (0, 0)


@pytest.mark.parametrize("row", [[100_000, 1], [1e-5, -2e-7], [3e30, 1e29], [1e-30, 0]])
def test_rows_that_halves_would_lose_are_float32(row: list[float]) -> None:
    rows = validated([[[1, 2], row]])
    assert rows.embeddings.dtype == np.float32
    np.testing.assert_array_equal(rows.embeddings, np.array([row, [1, 2]], np.float32))
    assert rows.rejects == []


def test_classes_and_labels_kept() -> None:
    shard = Shard(0, "embeddings_npy", "u", "n", "s", labels="none", classes=("a",))
    rows = validated([[[1, 2], [3, 4], [0, 0]]], labels=["a", "b", "b"], shard=shard)
    assert (rows.keys, rows.labels, rows.rejects) == (["k3"], [None], [])


@pytest.mark.parametrize("name", ["ids.npy", "filenames.npy", "y_train.npy", "notes.npy"])
def test_names_of_rows_beside_embeddings_are_left_out(place: str, name: str) -> None:
    beside = np.array(["a"] * 6) if name == "filenames.npy" else np.arange(6)
    write(place, {"embeddings.npy": npy(vectors(6)), name: npy(beside)})
    assert sum(len(rows.keys) for rows in read(place)) == 6
    with pytest.raises(DataError, match="embeddings are"):
        read(f"{place}/{name}", format="embeddings")


@pytest.mark.parametrize(
    ("table", "other", "width"),
    [
        ("embeddings", "boxes", 4), ("x/feats_0", "x/boxes_0", 4), ("img_vectors", "wider", 64), ("z", "a", 1),
        ("latents.2", "scores.2", 12),
    ],
)  # fmt: skip
def test_arrays_of_other_facts_of_the_same_rows_are_left_out(
    place: str, table: str, other: str, width: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(place, {f"{table}.npy": npy(vectors(6, 16)), f"{other}.npy": npy(vectors(6, width))})
    rows = read(place)
    assert [each.embeddings.shape for each in rows] == [(6, 16)]
    assert f"{other}.npy: holds {width} values of the same 6 rows as embeddings of 16 values" in caplog.text


def test_shards_and_arrays_of_other_rows_are_not_taken_for_other_facts(place: str) -> None:
    write(place, {"a_0.npy": npy(vectors(6, 16)), "a_1.npy": npy(vectors(6, 4)), "b.npy": npy(vectors(5, 4))})
    assert sum(len(each.keys) + len(each.rejects) for each in read(place)) == 17


def test_two_tables_of_the_same_rows_are_refused(place: str) -> None:
    write(place, {"clip.npy": npy(vectors(6, 16)), "dino.npy": npy(vectors(6, 24))})
    with pytest.raises(DataError, match=r"arrays of \[16, 24\] values for the same 6 rows; name one in images.uri"):
        read(place)
