from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayclust.errors import DataError
from rayclust.store.sources.labels import class_names, clean, folder_label, json_label, label_text, read_classes


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("cat", "cat"), (" cat\n", "cat"), (b"cat", "cat"), (b"\xff", "\\xff"), ("\ud800", "\\ud800"), (3, "3"),
        (np.int64(3), "3"), (np.float32(3), "3"), (3.0, "3"), (True, "true"), (np.bool_(False), "false"), (0, "0"),
        (-1, None), (-1.0, None), ("", None), ("  ", None), (None, None), (3.5, None), (float("nan"), None),
        (float("inf"), None), ([1], None), ({"a": 1}, None), ((), None),
    ],
)  # fmt: skip
def test_label_text(value: object, label: str | None) -> None:
    assert label_text(value) == label


def test_whole_numbers_point_into_names() -> None:
    names = ["cat", "dog"]
    assert [label_text(value, names) for value in (0, 1.0, 2, -1, -2, "0")] == ["cat", "dog", "2", None, "-2", "0"]


def test_clean_is_valid_utf8() -> None:
    assert clean("a\udcff") == "a\\udcff"
    assert clean("ü日") == "ü日"


@pytest.mark.parametrize(("key", "label"), [("a/b/c.jpg", "b"), ("b/c.jpg", "b"), ("c.jpg", None), ("", None)])
def test_folder_label(key: str, label: str | None) -> None:
    assert folder_label(key) == label


@pytest.mark.parametrize(
    ("text", "field", "label"),
    [
        (b'{"label": "cat"}', None, "cat"), (b'{"x": 1, "cls": 2}', None, "2"), (b'{"Label": "cat"}', None, "cat"),
        (b'{"class": "b", "label": "a"}', None, "a"), (b'{"label": [1, 2]}', None, None), (b'{"a": 1}', None, None),
        (b'{"meta": {"breed": "pug"}}', "meta.breed", "pug"), (b'{"meta": 3}', "meta.breed", None),
        (b"7", None, "7"), (b"[]", None, None), (b"{", None, None), (b"", None, None), (b"\xff\xfe", None, None),
        (b"[" * 100_000, None, None), (b'{"label": "\\ud800"}', None, "\\ud800"), (b'{"label": null}', None, None),
    ],
)  # fmt: skip
def test_json_label(text: bytes, field: str | None, label: str | None) -> None:
    assert json_label(text, field) == label


def test_class_names_of_both_kinds_of_metadata() -> None:
    assert class_names({b"class_names": b'["a", "b"]'}, "label") == ["a", "b"]
    hugging = b'{"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}}'
    assert class_names({b"huggingface": hugging}, "label") == ["x", "y"]
    assert class_names({b"huggingface": hugging}, "other") is None


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {b"class_names": b"{"}, {b"class_names": b"[1]"}, {b"class_names": b'{"0": "a"}'},
     {b"huggingface": b"[]"}, {b"huggingface": b'{"info": null}'}, {b"class_names": b"\xff"}],
)  # fmt: skip
def test_damaged_metadata_names_no_classes(metadata: dict[bytes, bytes] | None) -> None:
    assert class_names(metadata, "label") is None


def test_read_classes(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# a comment\nn01440764 tench, Tinca tinca\n\nn02102040\ngarbage truck\n")
    assert read_classes(str(tmp_path / "list.txt")) == {"n01440764", "n02102040", "garbage truck"}
    assert read_classes(["a", "b", "a"]) == {"a", "b"}
    assert read_classes(None) is None


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\n \n"])
def test_a_list_without_classes_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match="names no class"):
        read_classes(str(tmp_path / "list.txt"))
    with pytest.raises(DataError):
        read_classes([])
