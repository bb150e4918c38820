from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from decimal import Decimal

import numpy as np
import pytest

from rayclust.store.sources import Member, Shard
from rayclust.store.sources.base import escape_invalid, folder_label, label_text

FULL = Shard(
    3, "folder", "s3://b/photos", "a/1", "stamp", 12, 2, 5, (1, 4), (Member("a/1.jpg", "s3://b/photos/a/1.jpg", 7),),
    ("s3://b/labels.npy",), "label", ("cat", "dog"), {"key": "id"}, "names",
)  # fmt: skip


def test_json_both_ways() -> None:
    for shard in (FULL, Shard(0, "parquet", "x", "x", "s")):
        again = Shard.from_json(json.loads(json.dumps(asdict(shard))))
        assert again == shard
        assert pickle.loads(pickle.dumps(shard)) == shard  # noqa: S301 - as Ray carries it


def test_classes_are_labels_or_folders() -> None:
    assert FULL.selects("x/1.jpg", "cat")
    assert FULL.selects("x/dog/1.jpg", None)
    assert not FULL.selects("dog", "bird")
    assert Shard(0, "folder", "", "", "").selects("x", None)


def test_where_labels_are_looked_for() -> None:
    def source(labels: str, classes: tuple[str, ...] | None) -> str | None:
        return Shard(0, "folder", "", "", "", labels=labels, classes=classes).label_source

    assert source("auto", None) == "auto"
    assert source("cls", ("a",)) == "cls"
    assert source("none", None) is None
    assert source("none", ("a",)) == "auto"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("cat", "cat"), (" cat\n", "cat"), (b"cat", "cat"), (b"\xff", "\\xff"), (b"\xef\xbb\xbf3\n", "3"),
        ("\ud800", "\\ud800"), (3, "3"),
        (np.int64(3), "3"), (np.float32(3), "3"), (3.0, "3"), (True, "true"), (np.bool_(False), "false"), (0, "0"),
        (-1, None), (-1.0, None), ("", None), ("  ", None), (None, None), (3.5, None), (float("nan"), None),
        (Decimal(3), "3"), (Decimal("3.5"), None), (Decimal("nan"), None),
        (float("inf"), None), ([1], None), ({"a": 1}, None), ((), None),
    ],
)  # fmt: skip
def test_label_text(value: object, label: str | None) -> None:
    assert label_text(value) == label


def test_whole_numbers_point_into_names() -> None:
    names = ["cat", "dog"]
    assert [label_text(value, names) for value in (0, 1.0, 2, -1, -2, "0")] == ["cat", "dog", "2", None, "-2", "0"]


def test_escaped_text_is_valid_utf8() -> None:
    assert escape_invalid("a\udcff") == "a\\udcff"
    assert escape_invalid("ü日") == "ü日"


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("a/b/c.jpg", "b"),
        ("b/c.jpg", "b"),
        ("c.jpg", None),
        ("", None),
        ("n01/images/c.JPEG", "n01"),
        ("images/c.jpg", "images"),
    ],
)
def test_folder_label(key: str, label: str | None) -> None:
    assert folder_label(key) == label
