from __future__ import annotations

import pytest

from rayclust.store import storage
from rayclust.store.sources import Shard, plan_shards, read_records
from rayclust.store.sources.plan import file_kind
from tests.store.inputs import image, write


def plan(place: str, **settings: object) -> list[Shard]:
    return list(plan_shards(place, **settings))  # type: ignore[arg-type]


def test_class_folders_give_labels(place: str) -> None:
    keys = ["train/cat/1.jpg", "train/dog/1.JPEG", "train/dog/2.webp", "top.png", "train/dog/notes.txt"]
    write(place, {key: key.encode() for key in keys})
    (shard,) = plan(place)
    found = list(read_records(shard))
    assert [(record.key, record.label) for record in found] == [
        ("top.png", None), ("train/cat/1.jpg", "cat"), ("train/dog/1.JPEG", "dog"), ("train/dog/2.webp", "dog"),
    ]  # fmt: skip
    assert all(record.data == record.key.encode() and record.uri == f"{place}/{record.key}" for record in found)
    assert {record.label for record in read_records(plan(place, labels="none")[0])} == {None}


def test_shards_are_consecutive_and_their_stamps_follow_the_files(place: str) -> None:
    write(place, {f"{i:02d}.png": image(i) for i in range(7)})
    shards = plan(place, shard_size=3)
    assert [(shard.index, shard.first, shard.count) for shard in shards] == [(0, 0, 3), (1, 3, 3), (2, 6, 1)]
    assert [member.key for shard in shards for member in shard.members] == [f"{i:02d}.png" for i in range(7)]
    assert plan(place, shard_size=3) == shards
    write(place, {"04.png": image(99)})
    again = plan(place, shard_size=3)
    assert [a.stamp == b.stamp for a, b in zip(again, shards, strict=True)] == [True, False, True]


def test_only_the_classes_asked_for(place: str) -> None:
    write(place, {f"{split}/{name}/{i}.png": b"x" for split in "ab" for name in ("n1", "n2", "n3") for i in range(2)})
    (shard,) = plan(place, classes=["n3", "n1"])
    assert [member.key for member in shard.members] == [
        f"{s}/{n}/{i}.png" for s in "ab" for n in ("n1", "n3") for i in (0, 1)
    ]
    assert len(list(read_records(shard))) == 8


def test_what_is_gone_or_too_large_is_a_reject(place: str) -> None:
    write(place, {"a.png": b"x" * 10, "b.png": b"x" * 11, "c.png": b"x", "d.png": b""})
    (shard,) = plan(place)
    storage.remove(f"{place}/c.png")
    found = list(read_records(shard, max_bytes=10))
    assert [(record.key, record.reason) for record in found] == [
        ("a.png", None), ("b.png", "too_large"), ("c.png", "missing"), ("d.png", None),
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["a.jpg", "x/y.PNG", "a.b.Tiff", "x.jpg/y.gif", "a.avif", "a.JFIF", "a.svg", "a.heic"])
def test_image_names(key: str) -> None:
    assert file_kind(key) == "folder"


@pytest.mark.parametrize("key", ["a.jpg.txt", "jpg", "x/png", "a.jpg/b", "a.mp4", ""])
def test_other_names(key: str) -> None:
    assert file_kind(key) is None


def test_a_raw_file_beside_its_picture_is_left_out_and_said_once(place: str, caplog: pytest.LogCaptureFixture) -> None:
    pairs = ["a.CR2", "a.jpg", "b.JPG", "b.NEF", "d/a.dng", "d/a.edit.png", "d/a.jpeg", "e.x.arw", "e.x.png"]
    alone = ["a-1.CR2", "c.NEF", "c.edit.jpg", "d.dng", "f.arw", "f.heic", "f.x.png"]
    write(place, dict.fromkeys([*pairs, *alone], b"x"))
    with caplog.at_level("INFO"):
        shards = plan(place, shard_size=2)
    left = ["a.CR2", "b.NEF", "d/a.dng", "e.x.arw"]
    keys = [member.key for shard in shards for member in shard.members]
    assert keys == sorted({*pairs, *alone} - set(left))
    assert caplog.text.count("4 cameras' raw files, such as a.CR2, lie beside pictures of the same name") == 1
