from __future__ import annotations

import json
import pickle

from rayclust.store.sources.shard import Member, Record, Shard

FULL = Shard(
    3, "folder", "s3://b/photos", "a/1", "stamp", 12, 2, 5, (1, 4), (Member("a/1.jpg", "s3://b/photos/a/1.jpg", 7),),
    ("s3://b/labels.npy",), "label", ("cat", "dog"),
)  # fmt: skip


def test_json_both_ways() -> None:
    for shard in (FULL, Shard(0, "parquet", "x", "x", "s")):
        again = Shard.from_json(json.loads(json.dumps(shard.to_json())))
        assert again == shard
        assert pickle.loads(pickle.dumps(shard)) == shard  # noqa: S301 - as Ray carries it


def test_classes_are_labels_or_folders() -> None:
    assert FULL.wants("x/1.jpg", "cat")
    assert FULL.wants("x/dog/1.jpg", None)
    assert not FULL.wants("dog", "bird")
    assert Shard(0, "folder", "", "", "").wants("x", None)


def test_where_labels_are_looked_for() -> None:
    def source(labels: str, classes: tuple[str, ...] | None) -> str | None:
        return Shard(0, "folder", "", "", "", labels=labels, classes=classes).label_source

    assert source("auto", None) == "auto"
    assert source("cls", ("a",)) == "cls"
    assert source("none", None) is None
    assert source("none", ("a",)) == "auto"


def test_a_reject_of_the_whole_file() -> None:
    (reject,) = FULL.rejects("empty", "no bytes")
    assert reject == Record("a/1", "s3://b/photos", None, None, "empty", "no bytes")
    assert FULL.has_embeddings is False
