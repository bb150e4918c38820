"""Files on every kind of storage, and what only local folders have; `test_s3` has what only S3 does."""

from __future__ import annotations

import errno
import itertools
import math
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rayclust.errors import ArtefactError, DataError
from rayclust.store import storage
from rayclust.store.sources import plan_shards, read_records
from rayclust.store.storage import MissingError, UnreadableError, is_hidden
from tests.store.inputs import write

ODD_NAMES = ["a b.txt", "ü/ñ.txt", "100%25.txt", "x#y.txt", "p+q&r=s.txt", "[a]*?.txt", "dir/e'f\".txt", "日本/語.txt"]
_NUMBERS = itertools.count()


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of the test's own; memory stands for every other store that fsspec opens."""
    if request.param == "local":
        return str(tmp_path / "place")
    bucket = request.getfixturevalue("shared_bucket") if request.param == "s3" else "memory://bucket"
    return f"{bucket}/anywhere-{next(_NUMBERS)}"


def keys(folder: str | Path) -> list[str]:
    return [found.key for found in storage.walk(str(folder))]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_written_read_listed_and_removed(place: str, name: str) -> None:
    uri = storage.join(place, name)
    storage.write_bytes(uri, name.encode())
    (found,) = storage.walk(place)
    assert (found.key, found.uri, found.size) == (name, uri, len(name.encode()))
    assert storage.read_bytes(found.uri) == name.encode()
    with storage.local_copy(uri) as path:
        assert path.read_bytes() == name.encode()
    storage.remove(uri)
    assert not storage.exists(uri)


def test_a_write_replaces_and_changes_the_stamp(place: str) -> None:
    uri = storage.join(place, "file")
    storage.write_bytes(uri, b"old")
    (before,) = storage.walk(place)
    stamp = storage.write_bytes(uri, b"new")
    (after,) = storage.walk(place)
    assert storage.read_bytes(uri) == b"new"
    assert before.stamp != after.stamp == stamp
    assert storage.stat(uri) == after
    assert storage.stat(place) is None


@pytest.mark.parametrize("data", [b"", b"0123456789"])
def test_ranges_end_where_the_file_does(place: str, data: bytes) -> None:
    uri = storage.join(place, "file")
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri, end=4) == data[:4]
    assert storage.read_bytes(uri, end=99) == data
    assert storage.read_bytes(uri, 8, 20) == data[8:20]
    assert storage.read_bytes(uri, 10, 20) == b""


def test_open_files_seek(place: str) -> None:
    data = np.random.default_rng(0).bytes(3 << 20)
    storage.write_bytes(storage.join(place, "big"), data)
    for whole in (False, True):
        with storage.open_input(storage.join(place, "big"), whole=whole) as file:
            assert file.seek(0, 2) == len(data)
            file.seek(5)
            assert file.read(10) == data[5:15]
            assert file.tell() == 15
            file.seek(-7, 2)
            assert file.read() == data[-7:]
            file.seek(0)
            assert file.read() == data


def test_walk_goes_in_order_of_bytes(place: str) -> None:
    keys_of = ["a-b/x", "a/x", "a/b/c", "a0", "a.txt", "B", "ä", "z/1", "z/10", "z/2", "z.1", "\U0001f600", "\uffee"]
    write(place, dict.fromkeys(keys_of, b"1"))
    assert keys(place) == sorted(keys_of, key=str.encode)


def test_walk_leaves_out_hidden_files(place: str) -> None:
    hidden = [".DS_Store", "a/.x.jpg", ".git/a.jpg", "__MACOSX/a.jpg", "a/Thumbs.db"]
    write(place, dict.fromkeys([*hidden, "a/b.jpg"], b"1"))
    assert keys(place) == ["a/b.jpg"]


@pytest.mark.parametrize("key", [".a", "a/.b/c", "__MACOSX/a.jpg", "x/Thumbs.db", "._a.jpg"])
def test_hidden(key: str) -> None:
    assert is_hidden(key)


@pytest.mark.parametrize("key", ["a", "a.b/c.jpg", "../a.jpg", "./a.jpg", "Thumbs.dbx"])
def test_visible(key: str) -> None:
    assert not is_hidden(key)


def test_walk_of_one_file_and_of_nothing(place: str) -> None:
    write(place, {"one/file.JPG": b"1"})
    (found,) = storage.walk(storage.join(place, "one/file.JPG"))
    assert (found.key, found.uri) == ("file.JPG", storage.join(place, "one/file.JPG"))
    assert [file.key for file in storage.walk(place, suffixes=(".jpg",))] == ["one/file.JPG"]
    with pytest.raises(MissingError, match="none"):
        list(storage.walk(storage.join(place, "none")))
    assert list(storage.walk(storage.join(place, "none"), missing_ok=True)) == []


def test_a_folder_is_told_from_one_whose_name_begins_alike(place: str) -> None:
    write(place, {"photos/a": b"1", "photos2/b": b"2"})
    assert keys(storage.join(place, "photos")) == ["a"]
    assert not storage.exists(storage.join(place, "photo"))
    storage.remove_tree(storage.join(place, "photos"))
    assert keys(place) == ["photos2/b"]


def test_removing_twice_is_no_error(place: str) -> None:
    write(place, {"a/.hidden": b"1", "a/b/c": b"2", "a/[b]*": b"3"})
    for _ in range(2):
        storage.remove_tree(storage.join(place, "a"))
        storage.remove(storage.join(place, "a/b/c"))
    assert list(storage.walk(place, missing_ok=True)) == []


def test_check_writable_leaves_nothing_behind(place: str) -> None:
    storage.check_writable(storage.join(place, "deep/run"))
    assert not storage.exists(place)


@pytest.mark.parametrize("operation", [storage.read_bytes, storage.open_input, partial(storage.open_input, whole=True)])
def test_a_missing_file_is_one_clear_line(place: str, operation: object) -> None:
    uri = storage.join(place, "none.bin")
    with pytest.raises(MissingError) as caught:
        operation(uri)  # type: ignore[operator]
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_is_canonical(place: str) -> None:
    uri = storage.join(place, "x.json")
    storage.write_json(uri, {"b": np.float32(0.5), "a": [math.nan, (1, np.int64(2))], "ü": np.arange(2)})
    assert storage.read_json(uri) == {"a": [None, [1, 2]], "b": 0.5, "ü": [0, 1]}
    first = storage.read_bytes(uri)
    storage.write_json(uri, {"ü": [0, 1], "a": [math.inf, [1, 2]], "b": 0.5})
    assert storage.read_bytes(uri) == first


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_json_is_an_artefact_error(tmp_path: Path, data: bytes) -> None:
    uri = f"{tmp_path}/x.json"
    storage.write_bytes(uri, data)
    with pytest.raises(ArtefactError, match=r"x\.json"):
        storage.read_json(uri)


@pytest.mark.parametrize("uri", ["https://host/x", "", "hdfs://x", "a\0b", "memory://"])
def test_other_schemes_are_refused(uri: str) -> None:
    for action in (storage.read_bytes, lambda uri: list(storage.walk(uri)), storage.exists, storage.check_writable):
        with pytest.raises(DataError):
            action(uri)


@pytest.mark.parametrize("scheme", ["gs", "abfs", "hf"])
def test_a_missing_extra_is_one_line(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=rf"{scheme}://b/x: install rayclust\[{scheme}\] to use {scheme}://"):
        storage.read_bytes(f"{scheme}://b/x")


def test_absolute_and_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("photos/") == f"{tmp_path}/photos"
    assert storage.absolute("file:///a b/c") == "/a b/c"
    assert storage.absolute("~/x") == "/home/someone/x"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.absolute("gs://bucket/a/") == "gs://bucket/a"
    with pytest.raises(DataError, match="ftp:// is not supported"):
        storage.absolute("ftp://host/a")
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.join("/", "a") == "/a"
    assert [storage.is_remote(uri) for uri in ("s3://b", "gs://b", "/a", "a://b/c", "file:///a", "./x://y")] == [
        True, True, False, True, False, False,
    ]  # fmt: skip


# Compare and swap.

WRITER = """
import sys
from rayclust.store import storage
uri, rounds = sys.argv[1:]
won = 0
while won < int(rounds):
    data, version = storage.read_versioned(uri)
    won += storage.put_if_match(uri, str(int(data) + 1).encode(), version) is not None
"""


def test_a_file_is_created_once_and_replaced_by_a_writer_that_has_seen_it(place: str) -> None:
    uri = f"{place}/lease.json"
    assert storage.read_versioned(uri) is None
    first = storage.put_if_match(uri, b"one", None)
    assert first is not None
    assert storage.read_versioned(uri) == (b"one", first)
    assert storage.put_if_match(uri, b"two", None) is None
    second = storage.put_if_match(uri, b"two", first)
    assert second not in (None, first)
    assert storage.put_if_match(uri, b"three", first) is None
    assert storage.read_versioned(uri) == (b"two", second)
    storage.remove(uri)
    assert storage.put_if_match(uri, b"four", second) is None
    assert storage.read_versioned(uri) is None


def test_of_many_writers_at_once_one_creates_and_one_replaces(tmp_path: Path, shared_bucket: str) -> None:
    for uri in (f"{tmp_path}/lease.json", f"{shared_bucket}/lease-{next(_NUMBERS)}.json"):
        before = None
        for turn in range(2):
            with ThreadPoolExecutor(8) as threads:
                versions = list(
                    threads.map(
                        lambda name, uri=uri, turn=turn, before=before: storage.put_if_match(
                            uri, f"{turn}-{name}".encode(), before
                        ),
                        range(8),
                    )
                )
            won = [name for name, version in enumerate(versions) if version is not None]
            assert len(won) == 1
            before = versions[won[0]]
            assert storage.read_versioned(uri) == (f"{turn}-{won[0]}".encode(), before)


def test_no_count_is_lost_between_processes(tmp_path: Path) -> None:
    uri = str(tmp_path / "count")
    storage.write_bytes(uri, b"0")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, uri, "25"]) for _ in range(2)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert storage.read_bytes(uri) == b"50"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_compare_and_swap_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a part of the path is a file"):
        storage.put_if_match(str(tmp_path / "file" / "lease.json"), b"", None)


# Local folders.


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/a/1.jpg").touch()
    (tmp_path / "elsewhere/2.jpg").touch()
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/self").symlink_to(tmp_path / "in/self")
    assert keys(tmp_path / "in") == ["a/1.jpg", "b/2.jpg", "self"]


def test_a_web_of_links_ends(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}/x.jpg").touch()
    for i in range(8):
        for j in range(8):
            (tmp_path / f"d{i}/l{j}").symlink_to(tmp_path / f"d{j}")
    assert 8 <= len(keys(tmp_path)) <= 8 + 8 * 8


def test_a_broken_link_is_listed_and_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone")
    (found,) = storage.walk(str(tmp_path))
    assert found.size == 0
    with pytest.raises(UnreadableError):
        storage.read_bytes(found.uri)


def test_pipes_and_sockets_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        (tmp_path / "a.jpg").touch()
        assert keys(tmp_path) == ["a.jpg"]


def test_a_name_that_is_not_text_is_listed_escaped_and_read(tmp_path: Path) -> None:
    for folder in (b"", b"/sm\xf8r"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + folder))
        path.mkdir(exist_ok=True)
        (path / os.fsdecode(b"\xff.jpg")).write_bytes(folder)
    found = list(storage.walk(str(tmp_path)))
    assert [file.key for file in found] == ["sm\\xf8r/\\xff.jpg", "\\xff.jpg"]
    assert [storage.read_bytes(file.uri) for file in found] == [b"/sm\xf8r", b""]
    assert all(storage.stat(file.uri) for file in found)
    found[0].uri.encode()
    (tmp_path / "\\xff.jpg").write_bytes(b"of this very name")
    assert storage.read_bytes(str(tmp_path / "\\xff.jpg")) == b"of this very name"


@pytest.mark.parametrize("folder", ["@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information"])
def test_folders_of_storage_boxes_and_systems_are_left_out(place: str, folder: str) -> None:
    write(place, {f"a/{folder}/x.jpg": b"", f"{folder}/x.jpg": b"", "a/x.jpg": b""})
    assert [file.key for file in storage.walk(place)] == ["a/x.jpg"]


def test_a_folder_that_may_not_be_listed_is_named_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), {"a/x.jpg": b"", "closed/x.jpg": b"", "z.jpg": b""})
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if path.rstrip(b"/").endswith(b"closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = {file.key: file.size for file in storage.walk(str(tmp_path))}
    assert found == {"a/x.jpg": 0, "closed": storage.CLOSED_FOLDER, "z.jpg": 0}
    assert "closed: permission denied to list" in caplog.text
    records = [(r.key, r.reason) for shard in plan_shards(str(tmp_path)) for r in read_records(shard)]
    assert records == [("a/x.jpg", None), ("closed", "unreadable_folder"), ("z.jpg", None)]
    with pytest.raises(UnreadableError, match="closed: permission denied to list"):
        list(storage.walk(str(tmp_path / "closed")))


def test_a_host_in_a_file_uri_is_this_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    assert storage.read_bytes(f"file://localhost{tmp_path}/x") == storage.read_bytes(f"file://{tmp_path}/x") == b"1"


def test_long_names_are_bounded_in_bytes(place: str, shared_bucket: str) -> None:
    name = "图" * (80 if "://" not in place else 90) + ".tar"
    storage.write_bytes(storage.join(place, name), b"1")
    with storage.open_input(storage.join(place, name), whole=True) as file:
        assert file.read() == b"1"


def test_very_deep_folders_are_walked(tmp_path: Path) -> None:
    path = tmp_path
    for _ in range(400):
        path = path / "d"
    path.mkdir(parents=True)
    (path / "a.jpg").touch()
    assert keys(tmp_path) == ["d/" * 400 + "a.jpg"]


def test_a_file_that_vanishes_while_listing_is_left_out(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    listing = storage.walk(str(tmp_path))
    assert next(listing).key == "a"
    (tmp_path / "b").unlink()
    assert [found.key for found in listing] == ["c"]


def test_all_bytes_are_on_the_disk_before_the_file_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that loses its power may come back with a file that has its name and not its bytes."""
    happened: list[tuple[str, int, int]] = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(handle: int) -> None:
        fsync(handle)
        happened.append(("fsync", os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def recorded_replace(path: Path, target: Path) -> Path:
        happened.append(("replace", path.stat().st_ino, path.stat().st_size))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    storage.write_bytes(f"{tmp_path}/x", b"all of it")
    inode = (tmp_path / "x").stat().st_ino
    assert happened == [("fsync", inode, 9), ("replace", inode, 9)]


KILLED = """
import os, sys
from rayclust.store import storage
os.fsync = lambda handle: os.kill(os.getpid(), 9)
storage.write_bytes(sys.argv[1], b"new" * 1000)
"""


def test_a_killed_write_keeps_the_old_file_and_its_remains_go_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "part.parquet"
    target.write_bytes(b"old")
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    assert keys(tmp_path) == ["part.parquet"]
    storage.write_bytes(str(target), b"newer")
    assert [path.name for path in tmp_path.iterdir()] == ["part.parquet"]
    assert target.read_bytes() == b"newer"


def test_remains_of_another_host_go_when_they_are_old_and_those_of_a_writer_at_work_stay(tmp_path: Path) -> None:
    mine = tmp_path / f"{storage.temporary_prefix(tmp_path / 'x')}{os.getpid()}-0.tmp"
    fresh, old = (tmp_path / f".x.otherhost-1-{name}.tmp" for name in ("fresh", "old"))
    for path in (mine, fresh, old):
        path.touch()
    os.utime(old, (0, 0))
    storage.write_bytes(str(tmp_path / "x"), b"1")
    assert mine.exists()
    assert fresh.exists()
    assert not old.exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="no space left"):
        storage.write_bytes(str(tmp_path / "x"), b"1")
    assert list(tmp_path.iterdir()) == []


def test_paths_through_files_and_folders_in_place_of_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for action in (
        lambda: storage.write_bytes(str(tmp_path / "file/x"), b""),
        lambda: storage.check_writable(str(tmp_path / "file/run")),
        lambda: storage.read_bytes(str(tmp_path)),
        lambda: storage.write_bytes(str(tmp_path), b""),
        lambda: storage.write_bytes(str(tmp_path / ("n" * 300)), b""),
        lambda: storage.remove_tree("/"),
    ):
        with pytest.raises(DataError) as caught:
            action()
        assert str(tmp_path) in str(caught.value) or "/" in str(caught.value)


def test_object_stores_are_imported_when_there_is_one(tmp_path: Path) -> None:
    line = f"import sys; from rayclust.store import storage; storage.write_bytes({str(tmp_path / 'x')!r}, b''); "
    line += "print(sorted({'s3fs', 'fsspec', 'botocore', 'aiohttp'} & {*sys.modules}))"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
