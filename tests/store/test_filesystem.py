from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from rayclust.errors import ArtefactError, DataError
from rayclust.store import filesystem
from rayclust.store.filesystem import MissingError
from tests.store.inputs import write

ODD_NAMES = ["a b.txt", "ü/ñ.txt", "100%25.txt", "x#y.txt", "p+q&r=s.txt", "[a]*?.txt", "dir/e'f\".txt", "日本/語.txt"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_written_read_listed_and_removed(place: str, name: str) -> None:
    uri = filesystem.join(place, name)
    filesystem.write_bytes(uri, name.encode())
    (found,) = filesystem.walk(place)
    assert (found.key, found.uri, found.size) == (name, uri, len(name.encode()))
    assert filesystem.read_bytes(found.uri) == name.encode()
    with filesystem.local_copy(uri) as path:
        assert path.read_bytes() == name.encode()
    filesystem.remove(uri)
    assert not filesystem.exists(uri)


def test_a_write_replaces_and_changes_the_stamp(place: str) -> None:
    uri = filesystem.join(place, "file")
    filesystem.write_bytes(uri, b"old")
    (before,) = filesystem.walk(place)
    filesystem.write_bytes(uri, b"new")
    (after,) = filesystem.walk(place)
    assert filesystem.read_bytes(uri) == b"new"
    assert before.stamp != after.stamp
    assert filesystem.stat(uri) == after


@pytest.mark.parametrize("data", [b"", b"0123456789"])
def test_ranges_end_where_the_file_does(place: str, data: bytes) -> None:
    uri = filesystem.join(place, "file")
    filesystem.write_bytes(uri, data)
    assert filesystem.read_bytes(uri, limit=4) == data[:4]
    assert filesystem.read_bytes(uri, limit=99) == data
    assert filesystem.read_range(uri, 8, 20) == data[8:20]
    assert filesystem.read_range(uri, 10, 20) == b""


def test_open_input_seeks(place: str) -> None:
    data = np.random.default_rng(0).bytes(3 << 20)
    filesystem.write_bytes(filesystem.join(place, "big"), data)
    for opener in (filesystem.open_input, filesystem.open_whole):
        with opener(filesystem.join(place, "big")) as file:
            assert file.seek(0, 2) == len(data)
            file.seek(5)
            assert file.read(10) == data[5:15]
            file.seek(-7, 2)
            assert file.read() == data[-7:]
            file.seek(0)
            assert file.read() == data


def test_walk_goes_in_order_of_bytes_whatever_the_storage(place: str) -> None:
    keys = ["a-b/x", "a/x", "a/b/c", "a0", "a.txt", "B", "a", "ä", "z/1", "z/10", "z/2", "z.1", "\U0001f600", "\uffee"]
    keys = [key for key in keys if key != "a"]  # a file and a folder of one name exist on S3 only
    write(place, dict.fromkeys(keys, b"1"))
    assert [found.key for found in filesystem.walk(place)] == sorted(keys, key=str.encode)


def test_walk_leaves_out_what_systems_leave_behind(place: str) -> None:
    hidden = [".DS_Store", "a/.x.jpg", ".git/a.jpg", "__MACOSX/a.jpg", "a/Thumbs.db"]
    write(place, dict.fromkeys([*hidden, "a/b.jpg"], b"1"))
    assert [found.key for found in filesystem.walk(place)] == ["a/b.jpg"]


def test_walk_of_one_file_and_of_nothing(place: str) -> None:
    write(place, {"one/file.JPG": b"1"})
    (found,) = filesystem.walk(filesystem.join(place, "one/file.JPG"))
    assert (found.key, found.uri) == ("file.JPG", filesystem.join(place, "one/file.JPG"))
    assert [file.key for file in filesystem.walk(place, suffixes=(".jpg",))] == ["one/file.JPG"]
    with pytest.raises(MissingError, match="none"):
        list(filesystem.walk(filesystem.join(place, "none")))
    assert list(filesystem.walk(filesystem.join(place, "none"), missing_ok=True)) == []


def test_a_folder_is_told_from_one_whose_name_begins_alike(place: str) -> None:
    write(place, {"photos/a": b"1", "photos2/b": b"2"})
    assert [found.key for found in filesystem.walk(filesystem.join(place, "photos"))] == ["a"]
    assert not filesystem.exists(filesystem.join(place, "photo"))
    filesystem.remove_tree(filesystem.join(place, "photos"))
    assert [found.key for found in filesystem.walk(place)] == ["photos2/b"]


def test_removing_twice_is_no_error(place: str) -> None:
    write(place, {"a/.hidden": b"1", "a/b/c": b"2"})
    for _ in range(2):
        filesystem.remove_tree(filesystem.join(place, "a"))
        filesystem.remove(filesystem.join(place, "a/b/c"))
    assert list(filesystem.walk(place, missing_ok=True)) == []


def test_trees_are_copied_there_and_back(place: str, tmp_path: Path) -> None:
    write(str(tmp_path / "from"), {"a": b"1", "b/c": b"2", ".skipped": b"3"})
    filesystem.upload_tree(place, tmp_path / "from")
    filesystem.download_tree(place, tmp_path / "to")
    assert (tmp_path / "to/a").read_bytes() == b"1"
    assert (tmp_path / "to/b/c").read_bytes() == b"2"
    assert not (tmp_path / "to/.skipped").exists()


def test_check_writable_leaves_nothing_behind(place: str) -> None:
    filesystem.check_writable(filesystem.join(place, "deep/run"))
    assert not filesystem.exists(place)


@pytest.mark.parametrize("operation", [filesystem.read_bytes, filesystem.open_input, filesystem.open_whole])
def test_a_missing_file_is_one_clear_line(place: str, operation: object) -> None:
    uri = filesystem.join(place, "none.bin")
    with pytest.raises(MissingError) as caught:
        operation(uri)  # type: ignore[operator]
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_is_canonical(place: str) -> None:
    uri = filesystem.join(place, "x.json")
    filesystem.write_json(uri, {"b": np.float32(0.5), "a": [math.nan, (1, np.int64(2))], "ü": np.arange(2)})
    assert filesystem.read_json(uri) == {"a": [None, [1, 2]], "b": 0.5, "ü": [0, 1]}
    first = filesystem.read_bytes(uri)
    filesystem.write_json(uri, {"ü": [0, 1], "a": [math.inf, [1, 2]], "b": 0.5})
    assert filesystem.read_bytes(uri) == first


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_json_is_an_artefact_error(place: str, data: bytes) -> None:
    uri = filesystem.join(place, "x.json")
    filesystem.write_bytes(uri, data)
    with pytest.raises(ArtefactError, match=r"x\.json"):
        filesystem.read_json(uri)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "https://host/x", "", "hdfs://x", "a\0b"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(DataError):
        filesystem.read_bytes(uri)
    with pytest.raises(DataError):
        list(filesystem.walk(uri))


def test_absolute_and_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert filesystem.absolute("photos/") == f"{tmp_path}/photos"
    assert filesystem.absolute("file:///a b/c") == "/a b/c"
    assert filesystem.absolute("~/x") == "/home/someone/x"
    assert filesystem.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert filesystem.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert filesystem.join("/", "a") == "/a"
