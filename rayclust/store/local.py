"""Files of local folders, replaced atomically and listed in the order that object stores list theirs."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rayclust.errors import DataError
from rayclust.store.storage import FileStat, MissingError, UnreadableError, is_hidden

SCHEME = "file://"
_STALE_SECONDS = 3600.0
"""A temporary file that nobody has touched for so long has lost its writer, on whichever host that was."""


def to_path(uri: str) -> Path:
    """The local path of a plain path or a `file://` URI, taken character by character; `~/` is the home folder."""
    path = Path(uri.removeprefix(SCHEME))
    return path.expanduser() if uri.startswith("~/") else path


class LocalStorage:
    """Files on this machine or on a mounted network drive."""

    def stat(self, uri: str) -> FileStat | None:
        """The regular file at `uri`, or None."""
        path = to_path(uri)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise translate(error, uri, "read") from error
        return _file_stat(path.name, uri, found) if stat.S_ISREG(found.st_mode) else None

    def exists(self, uri: str) -> bool:
        """Whether there is a file or folder."""
        return to_path(uri).exists()

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes from `start` up to `end`."""
        with translated(uri, "read"), to_path(uri).open("rb") as file:
            file.seek(start)
            if end is None:
                return file.read()
            size = os.fstat(file.fileno()).st_size  # memory is taken for as much as is asked for
            return file.read(max(0, min(end, size) - start))

    def write(self, uri: str, data: bytes) -> str:
        """Writes beside the target, then renames over it."""
        with self._replacing(uri) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a network drive gives the time of change with the last bytes
            return _stamp(os.fstat(file.fileno()))

    def open(self, uri: str) -> BinaryIO:
        """A buffered file for reading."""
        with translated(uri, "read"):
            return to_path(uri).open("rb")

    def walk(self, uri: str) -> Iterator[FileStat]:
        """Depth first, a folder sorted as its name with `/`, so that keys come in the order of their bytes."""
        root = to_path(uri)
        single = self.stat(uri)
        if single is not None:
            yield single
            return
        if not root.is_dir():
            raise MissingError(f"{uri}: no such file or folder; check the path")
        base = uri.rstrip("/") or "/"
        yield from _walk_tree(os.fsencode(root), base)

    def remove(self, uri: str) -> None:
        """Unlinks one file."""
        with translated(uri, "remove"):
            to_path(uri).unlink(missing_ok=True)

    def remove_tree(self, uri: str) -> None:
        """Removes a folder, or one file."""
        path = to_path(uri)
        if path.resolve() == Path(path.resolve().anchor):
            raise DataError(f"{uri}: the root of the file system is not removed; name a folder below it")
        with translated(uri, "remove"), suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def check_writable(self, uri: str) -> None:
        """Writes a file of nothing into the nearest folder that exists, and removes it."""
        folder = to_path(uri).absolute()
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise DataError(f"{uri}: {folder} is a file, so nothing can be written below it; choose another folder")
        probe = folder / f".rayclust-{uuid.uuid4().hex}.tmp"
        with translated(uri, "write"):
            probe.touch()
            probe.unlink()

    @contextmanager
    def local_copy(self, uri: str) -> Iterator[Path]:
        """The file itself."""
        if self.stat(uri) is None:
            raise MissingError(f"{uri}: no such file; check the path")
        yield to_path(uri)

    def download(self, uri: str, path: Path) -> None:
        """Copies the file to `path`."""
        with translated(uri, "read"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(to_path(uri), path)

    def upload(self, path: Path, uri: str) -> None:
        """Copies `path` in blocks, then renames."""
        with path.open("rb") as source, self._replacing(uri) as target:
            shutil.copyfileobj(source, target, 1 << 22)

    @contextmanager
    def _replacing(self, uri: str) -> Iterator[BinaryIO]:
        path = to_path(uri)
        with translated(uri, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.parent / f"{_prefix(path)}{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
            try:
                with temporary.open("xb") as file:
                    _remove_orphans(path, os.fstat(file.fileno()).st_mtime)
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _prefix(path: Path) -> str:
    """How names of temporary files for `path` begin on this host; hidden from listings, and short enough for a name."""
    return f".{path.name[:80]}.{socket.gethostname()[:40]}-"


def _remove_orphans(path: Path, now: float) -> None:
    """Removes what writers of `path` left when they were killed; `now` is by the clock that stamps the files."""
    mine, any_host = _prefix(path), f".{path.name[:80]}."
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(any_host) and entry.name.endswith(".tmp")]
    for name in names:
        orphan = path.parent / name
        with suppress(OSError):
            writer_is_gone = name.startswith(mine) and not _is_alive(name.removeprefix(mine).split("-")[0])
            if writer_is_gone or now - orphan.stat().st_mtime > _STALE_SECONDS:
                orphan.unlink()


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@dataclass
class _Level:
    """One folder that a walk is in."""

    path: bytes
    prefix: str
    names: Iterator[bytes]
    """Sorted; those of folders end with `/`."""
    identity: tuple[int, int]


def _walk_tree(root: bytes, base: str) -> Iterator[FileStat]:
    levels = [_enter(root, "")]
    linked: set[tuple[int, int]] = set()  # a folder is entered through links once, so that no web of links is endless
    while levels:
        level = levels[-1]
        name = next(level.names, None)
        if name is None:
            levels.pop()
            continue
        path = level.path + b"/" + name.rstrip(b"/")
        key = level.prefix + name.rstrip(b"/").decode("utf-8", "backslashreplace")
        if is_hidden(key.rpartition("/")[2]):
            continue
        if not name.endswith(b"/"):
            yield from _visit_file(path, key, base)
            continue
        below = _enter(path, key + "/")
        if Path(os.fsdecode(path)).is_symlink():
            if below.identity in linked or any(above.identity == below.identity for above in levels):
                continue
            linked.add(below.identity)
        levels.append(below)


def _enter(path: bytes, prefix: str) -> _Level:
    with translated(os.fsdecode(path), "list"):
        found = Path(os.fsdecode(path)).stat()
        with os.scandir(path) as entries:
            names = sorted(_sort_key(entry) for entry in entries)
    return _Level(path, prefix, iter(names), (found.st_dev, found.st_ino))


def _sort_key(entry: os.DirEntry[bytes]) -> bytes:
    try:
        is_folder = entry.is_dir()
    except OSError:  # a link that leads to itself
        is_folder = False
    return entry.name + b"/" if is_folder else entry.name


def _visit_file(path: bytes, key: str, base: str) -> Iterator[FileStat]:
    uri = f"{base.rstrip('/')}/{key}"
    try:
        found = Path(os.fsdecode(path)).stat()
    except OSError:
        if Path(os.fsdecode(path)).is_symlink():  # a broken link is listed, so that reading it becomes a reject
            yield FileStat(key, uri, 0, "broken-link")
        return
    if stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        yield _file_stat(key, uri, found)


def _file_stat(key: str, uri: str, found: os.stat_result) -> FileStat:
    return FileStat(key, uri, found.st_size, _stamp(found))


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


@contextmanager
def translated(uri: str, action: str) -> Iterator[None]:
    """Makes every error of the operating system inside one of rayclust's; see `translate`."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise translate(error, uri, action) from error


def translate(error: OSError | ValueError, uri: str, action: str) -> DataError:
    """The one line that tells a user why a file could not be used.

    Args:
        error: what the operating system raised.
        uri: the file or folder.
        action: the verb that failed: read, write, list, remove.
    """
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: no such file or folder; check the path")
    if isinstance(error, IsADirectoryError):
        return UnreadableError(f"{uri}: is a folder where a file is needed")
    if isinstance(error, NotADirectoryError | FileExistsError):
        return DataError(f"{uri}: a part of the path is a file where a folder is needed")
    if isinstance(error, PermissionError):
        advice = "check the owner and mode of the file and its folder"
        return UnreadableError(f"{uri}: permission denied to {action}; {advice}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(f"{uri}: no space left on the device; free some, or choose another folder")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UnreadableError(f"{uri}: cannot {action}: {reason}")
