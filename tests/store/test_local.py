from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rayclust.errors import DataError
from rayclust.store import filesystem
from rayclust.store.local import LocalStorage, translate
from rayclust.store.storage import UnreadableError


def keys(path: Path) -> list[str]:
    return [found.key for found in filesystem.walk(str(path))]


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
    (found,) = filesystem.walk(str(tmp_path))
    assert found.size == 0
    with pytest.raises(UnreadableError):
        filesystem.read_bytes(found.uri)


def test_pipes_and_sockets_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        (tmp_path / "a.jpg").touch()
        assert keys(tmp_path) == ["a.jpg"]


def test_a_name_that_is_not_text_is_listed_escaped(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg"))).touch()
    (found,) = filesystem.walk(str(tmp_path))
    assert found.key == "\\xff.jpg"
    found.key.encode()
    with pytest.raises(UnreadableError):
        filesystem.read_bytes(found.uri)


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
    listing = filesystem.walk(str(tmp_path))
    assert next(listing).key == "a"
    (tmp_path / "b").unlink()
    assert [found.key for found in listing] == ["c"]


KILLED = """
import os, sys
from rayclust.store import filesystem
class Data(bytes):
    pass
import rayclust.store.local as local
def killed(fd):
    os.kill(os.getpid(), 9)
os.fsync = killed
filesystem.write_bytes(sys.argv[1], b"new" * 1000)
"""


def test_a_killed_write_keeps_the_old_file_and_its_remains_go_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "part.parquet"
    target.write_bytes(b"old")
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    assert keys(tmp_path) == ["part.parquet"]
    filesystem.write_bytes(str(target), b"newer")
    assert [path.name for path in tmp_path.iterdir()] == ["part.parquet"]
    assert target.read_bytes() == b"newer"


def test_remains_of_another_host_go_when_they_are_old(tmp_path: Path) -> None:
    fresh, old = (tmp_path / f".x.otherhost-1-{name}.tmp" for name in ("fresh", "old"))
    fresh.touch()
    old.touch()
    os.utime(old, (0, 0))
    filesystem.write_bytes(str(tmp_path / "x"), b"1")
    assert fresh.exists()
    assert not old.exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="no space left"):
        filesystem.write_bytes(str(tmp_path / "x"), b"1")
    assert list(tmp_path.iterdir()) == []


def test_paths_through_files_and_folders_in_place_of_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for action in (
        lambda: filesystem.write_bytes(str(tmp_path / "file/x"), b""),
        lambda: filesystem.check_writable(str(tmp_path / "file/run")),
        lambda: filesystem.read_bytes(str(tmp_path)),
        lambda: filesystem.write_bytes(str(tmp_path), b""),
        lambda: filesystem.write_bytes(str(tmp_path / ("n" * 300)), b""),
        lambda: LocalStorage().remove_tree("/"),
    ):
        with pytest.raises(DataError) as caught:
            action()
        assert str(tmp_path) in str(caught.value) or "/" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "permission denied to list"),
        (IsADirectoryError(21, "Is a directory"), "is a folder"),
        (NotADirectoryError(20, "Not a directory"), "is a file"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (ValueError("embedded null byte"), "embedded null byte"),
    ],
)
def test_every_error_is_one_line_with_the_path(error: OSError | ValueError, words: str) -> None:
    message = str(translate(error, "/data/x", "list"))
    assert message.startswith("/data/x: ")
    assert words in message
