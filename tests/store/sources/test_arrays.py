from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayclust.errors import DataError
from rayclust.store import filesystem
from rayclust.store.sources import Rows, plan_shards, read_rows
from rayclust.store.sources.arrays import is_array_file
from tests.store.inputs import npy, parquet, vectors, write

VALUES = vectors(70)
HALVES = VALUES.astype(np.float16)


def load_npz(path: Path) -> Mapping[str, np.ndarray]:
    """Stands in for the reader of tensors: these tests need none."""
    with np.load(path) as found:
        return {name if name != "alone" else "": found[name] for name in found.files}


def npz(**arrays: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read(place: str, **settings: Any) -> list[Rows]:
    return [read_rows(shard, load_tensors=load_npz) for shard in plan_shards(place, **settings)]


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
        ({"x.npy": npy(np.arange(5.0))}, r"shape \(5,\)"),
        ({"x.npy": npy(np.zeros((2, 3, 4)))}, r"shape \(2, 3, 4\)"),
        ({"x.npy": npy(np.zeros((5, 0)))}, r"shape \(5, 0\)"),
        ({"x.npy": npy(np.zeros((5, 3), complex))}, "complex128"),
        ({"x.npy": npy(np.full((5, 3), "a"))}, "real numbers"),
        ({"x.npy": npy(np.array([[{}]], dtype=object), True)}, "Python objects"),
        ({"x.npy": npy(VALUES), "labels.npy": npy(np.arange(69))}, "69 labels for the 70 rows"),
        ({"x.npy": npy(VALUES), "labels.npy": npy(np.zeros((70, 2)))}, "one label per row"),
        ({"x.npy": npy(VALUES), "labels.npy": b"x"}, "no readable npy file"),
        ({"x.npy": npy(VALUES), "labels.npy": npy(np.array([{}] * 70), True)}, "Python objects"),
        ({"x.pt": npz(a=np.zeros(3), b=np.zeros(4))}, r"no tensor `embeddings`.*a \(3,\), b \(4,\)"),
        ({"x.pt": npz(a=VALUES, b=VALUES)}, "no tensor `embeddings`"),
        ({"x.pt": npz(alone=np.zeros((3, 2, 2)))}, r"a tensor \(3, 2, 2\)"),
        ({"x.pt": npz(x=VALUES, y=np.arange(3))}, "one label per row"),
        ({"x.pt": npz()}, "no tensors"),
    ],
)
def test_what_is_no_table_of_embeddings(place: str, files: dict[str, bytes], words: str) -> None:
    write(place, files)
    with pytest.raises(DataError, match=words) as caught:
        read(place)
    assert place in str(caught.value)


def test_metadata_that_does_not_fit(place: str) -> None:
    write(place, {"img_emb/img_emb_0.npy": npy(VALUES), "metadata/metadata_0.parquet": parquet({"key": ["a"]})})
    with pytest.raises(DataError, match="1 lines for the 70 rows"):
        read(place)
    write(place, {"metadata/metadata_0.parquet": b"PAR1"})
    with pytest.raises(DataError, match=r"metadata_0\.parquet: cannot be read"):
        read(place)


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
        filesystem.remove(shard.uri)
        assert read_rows(shard, load_tensors=load_npz).rejects[0]["reason"] == "unreadable_file"


def test_tensors_need_a_reader(place: str) -> None:
    write(place, {"x.pt": npz(alone=VALUES)})
    (shard,) = plan_shards(place)
    with pytest.raises(DataError, match="load_tensors"):
        read_rows(shard)


@pytest.mark.parametrize("key", ["a.npy", "img_emb/img_emb_0.npy", "x/FEATS.PT", "mylabels.npy"])
def test_array_files(key: str) -> None:
    assert is_array_file(key)


@pytest.mark.parametrize(
    "key", ["labels.npy", "a_labels.npy", "x/train-labels.pt", "targets.npy", "text_emb/text_emb_0.npy", "a.npz"]
)
def test_other_files(key: str) -> None:
    assert not is_array_file(key)


def test_real_features(shared_data: Path) -> None:
    (rows,) = read(str(shared_data / "imagenette_val3k/features_mnv2b_f16.npy"))
    assert rows.embeddings.shape == (3000, 1280)
    assert rows.labels.count("3") == 300
