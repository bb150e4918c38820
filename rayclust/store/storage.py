"""Files by URI, the same on every kind of storage.

Local paths and `file://` are read and written by the operating system; `s3://`, and with their extras `gs://`, `abfs://`
and `hf://`, by fsspec. A missing bucket or folder, refused access or an unreachable endpoint raises DataError with the
URI and what to do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import stat as modes
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from rayclust.errors import ArtefactError, DataError
from rayclust.store.failures import MissingError, UnreadableError, names, translate, translated

__all__ = ["MissingError", "UnreadableError"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "abfs", "hf", "memory")
"""Schemes of remote storage. The extras of rayclust that bring `gs`, `abfs` and `hf` are named after them."""
IGNORED_NAMES = frozenset(
    {
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found"),
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),  # Synology, QNAP
        *("system volume information", "$recycle.bin", "recycler", "found.000"),  # Windows
        *("network trash folder", "temporary items"),  # macOS on a server
    }
)
"""Lower-case names of files and folders that operating systems and storage boxes leave behind beside a user's own."""
CLOSED_FOLDER = -1
"""`FileStat.size` of a folder that may not be listed."""

_BLOCK, _READ_AHEAD = 32 << 20, 1 << 20
"""Bytes of one request of a download, and of a file that is read in order."""
_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")
_NAME_BYTES = 80
"""Bytes of a file's name that names of temporary files repeat; file systems allow 255 in all."""
_DELETES = 32
"""Requests under way at once when a folder is removed."""
_STALE_SECONDS = 3600.0
"""A temporary file that has not changed for so long has lost its writer, on whichever host that was."""
_REFUSED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409", "FileExistsError", "NoSuchKey"})
"""Answers to a conditional put whose condition does not hold."""


@dataclass(frozen=True)
class FileStat:
    """One file or object as a listing shows it."""

    key: str
    """Path relative to the folder that was listed, with `/` between its parts."""
    uri: str
    """Where to read it."""
    size: int
    """Bytes; `CLOSED_FOLDER` for a folder that may not be listed."""
    stamp: str
    """Changes whenever the content does: size with the ETag, or with the time of change in nanoseconds."""


def is_hidden(key: str) -> bool:
    """Return whether listings leave `key` out: a part starts with a dot or is one of `IGNORED_NAMES`."""
    parts = (part for part in key.split("/") if part not in {".", ".."})
    return any(part.startswith(".") or part.lower() in IGNORED_NAMES for part in parts)


def is_remote(uri: str) -> bool:
    """Return whether `uri` has a scheme other than `file://`."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and "/" not in scheme and scheme != "file"


def absolute(uri: str) -> str:
    """Return `uri` without a trailing `/`, and a local one as an absolute path, which means the same from anywhere."""
    if is_remote(uri):
        _check_scheme(uri)
        return uri.rstrip("/") if not uri.rstrip("/").endswith(":") else uri
    path = os.path.abspath(to_path(uri))  # noqa: PTH100 - resolves `..` without following links
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def join(uri: str, *parts: str) -> str:
    """Return `uri` with `parts` below it."""
    return "/".join([uri.rstrip("/"), *parts])


def to_path(uri: str) -> Path:
    """Return the path of a local URI, taken character by character; `~/` is the home folder.

    An escape of a byte that is no UTF-8, as listings write it, leads to the file unless there is one of that very name.

    Raises:
        DataError: it is empty or holds a zero character.
    """
    if not uri:
        raise DataError("'': an empty path; give a folder or an s3:// URI")
    if "\0" in uri:
        raise DataError(f"{uri!r}: a path cannot hold a zero character")
    text = uri.removeprefix("file://")
    text = text.removeprefix("localhost") if uri.startswith("file://localhost/") else text
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    raw = _ESCAPED_BYTE.sub(lambda match: bytes.fromhex(match[1].decode()), os.fsencode(path))
    if raw != os.fsencode(path) and not os.path.lexists(path) and os.path.lexists(raw):
        return Path(os.fsdecode(raw))
    return path


def stat(uri: str) -> FileStat | None:
    """Return the file at `uri`, or None where there is none; a folder has none."""
    if is_remote(uri):
        info, name = _info_of(uri), uri.rpartition("/")[2]
        return _remote_stat(name, uri, info) if info and info["type"] == "file" and name else None
    path = to_path(uri)
    with translated(uri, "read"):
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return _local_stat(path.name, uri, found) if modes.S_ISREG(found.st_mode) else None


def exists(uri: str) -> bool:
    """Return whether `uri` is a file, or a folder (in object storage: one with something in it)."""
    return _info_of(uri) is not None if is_remote(uri) else to_path(uri).exists()


def read_bytes(uri: str, start: int = 0, end: int | None = None) -> bytes:
    """Return the content of a file, or a range of it.

    Args:
        uri: the file.
        start: first byte.
        end: the byte behind the last, or None; fewer are returned where the file ends before.

    Raises:
        MissingError: there is no such file (a DataError).
        DataError: it cannot be read.
    """
    return _read(uri, start, end)[0]


def read_versioned(uri: str) -> tuple[bytes, str] | None:
    """Return the content of a file and its version, which `put_if_match` compares; None where there is no file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        data, etag = _read(uri)
    except MissingError as error:
        if "NoSuchBucket" in names(error):
            raise
        return None
    return data, etag or hashlib.sha256(data).hexdigest()


def write_bytes(uri: str, data: bytes) -> str:
    """Replace a file at once: readers, during the write or after a crash, find the old content or the new.

    Returns:
        The stamp of the new content, as `FileStat.stamp`.

    Raises:
        DataError: it cannot be written.
    """
    if is_remote(uri):
        with translated(uri, "write"):
            fs, where = filesystem(uri)
            answer = fs.pipe_file(where, data)
            info = {**answer, "size": len(data)} if uri.startswith("s3://") else fs.info(where)
        return _remote_stat("", uri, info).stamp
    path = to_path(uri)
    with translated(uri, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{temporary_prefix(path)}{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        try:
            with temporary.open("xb") as file:
                _remove_orphans(path, os.fstat(file.fileno()).st_mtime)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a network drive gives the time of change with the last bytes
                found = os.fstat(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return _local_stat("", "", found).stamp


@contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Write a large file piece by piece; it replaces the one at `uri` once the context ends without an error.

    Where the block fails, all is as it was. A remote file is written to a temporary one here and sent in pieces.

    Raises:
        DataError: it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="rayclust-") if is_remote(uri) else nullcontext() as folder:
        path = to_path(uri) if folder is None else Path(folder) / "object"
        with translated(uri, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.parent / f"{temporary_prefix(path)}{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
            file = temporary.open("xb")
        try:
            with file:
                _remove_orphans(path, os.fstat(file.fileno()).st_mtime)
                yield file
                file.flush()
                os.fsync(file.fileno())
            if folder is None:
                temporary.replace(path)
                return
        except OSError as error:  # a full disk; what is read meanwhile raises errors of its own
            raise translate(error, uri, "write") from error
        finally:
            if folder is None:
                temporary.unlink(missing_ok=True)
        with translated(uri, "write"):
            fs, where = filesystem(uri)
            fs.put_file(str(temporary), where)


def put_if_match(uri: str, data: bytes, version: str | None) -> str | None:
    """Replace a file only if it still has the version that was read (compare-and-swap).

    S3 compares by itself (`If-None-Match`, `If-Match`), see `lock.check_conditional_puts`; locally the folder is locked
    meanwhile. On other stores to create a file is atomic, while to replace one compares first.

    Args:
        uri: a small file.
        data: its new content.
        version: as `read_versioned` gave it; None to create the file where there is none.

    Returns:
        The new version; None where another writer was first, and nothing was written.

    Raises:
        DataError: it cannot be written.
    """
    if not is_remote(uri):
        # Lock the folder against other processes, so that no lock file is left behind.
        with translated(uri, "write"):
            folder = to_path(uri).parent
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network drives lock no folders: there the moment is only short
                fcntl.flock(handle, fcntl.LOCK_EX)
            found = read_versioned(uri)
            if (found[1] if found else None) != version:
                return None
            write_bytes(uri, data)
            return hashlib.sha256(data).hexdigest()
        finally:
            os.close(handle)  # unlocks it too
    if version is not None:
        found = read_versioned(uri)
        if found is None or found[1] != version:
            return None
    condition = {"mode": "create"} if version is None else {"IfMatch": version} if uri.startswith("s3://") else {}
    with translated(uri, "write"):
        fs, path = filesystem(uri)
        try:
            answer = fs.pipe_file(path, data, **condition)
        except Exception as error:
            if not names(error) & _REFUSED:
                raise
            # A request that was sent again, its answer lost, is refused because of itself.
            found = read_versioned(uri)
            return found[1] if found and found[0] == data else None
    return str(answer["ETag"]) if uri.startswith("s3://") else hashlib.sha256(data).hexdigest()


def as_json(value: Any) -> Any:
    """Return a value in JSON's types; NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return as_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys, the same text for equal values; NaN and infinities become null."""
    return json.dumps(as_json(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(uri: str, value: Any) -> None:
    """Write `canonical_json(value)`."""
    write_bytes(uri, canonical_json(value).encode())


def read_json(uri: str, data: bytes | None = None) -> Any:
    """Return the value in a JSON file, whose bytes may have been read before.

    Raises:
        MissingError: there is no such file.
        ArtefactError: it does not hold JSON.
    """
    data = read_bytes(uri) if data is None else data
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{uri}: is not readable JSON ({error}); remove it and run its stage again") from error


def open_input(uri: str, *, whole: bool = False) -> BinaryIO:
    """Open a seekable binary file; the caller closes it.

    Args:
        uri: the file. An object of S3 that is replaced between two reads raises UnreadableError.
        whole: fetch a remote file first, which leaves nothing behind when closed; else ranges of it are read.

    Raises:
        MissingError: there is no such file (a DataError).
        DataError: it cannot be read.
    """
    if whole and is_remote(uri):
        with local_copy(uri) as path:
            return path.open("rb")
    if is_remote(uri):
        from fsspec.spec import AbstractBufferedFile  # slow to import, so only where there is an object store

        found = _require(uri)
        file = AbstractBufferedFile(None, uri, block_size=_READ_AHEAD, size=found.size)
        file.cache.fetcher = lambda start, end: _read(uri, start, end, found.stamp)[0]
        return cast(BinaryIO, file)
    with translated(uri, "read"):
        return to_path(uri).open("rb")


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Provide the file as a local path: itself, or a temporary copy that is removed at the end."""
    found = _require(uri)
    if not is_remote(uri):
        yield to_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="rayclust-") as folder:
        name = uri.rpartition("/")[2].encode()[-_NAME_BYTES:].decode(errors="ignore")
        path = Path(folder) / (name or "object")
        with translated(str(path), "write"), path.open("wb") as file:
            for start in range(0, found.size, _BLOCK):
                file.write(_read(uri, start, min(start + _BLOCK, found.size), found.stamp)[0])
        yield path


def walk(uri: str, *, suffixes: Collection[str] | None = None, missing_ok: bool = False) -> Iterator[FileStat]:
    """Yield the files below a folder in order of their keys' UTF-8 bytes; local folders and S3 are streamed.

    Names that start with a dot, `__MACOSX`, `Thumbs.db` and the objects that stand for folders are left out.
    A `uri` of one file gives that file under its own name.

    Args:
        uri: a folder or a file.
        suffixes: only files whose lower-case name ends with one of these.
        missing_ok: a missing folder gives nothing instead of an error.

    Raises:
        MissingError: there is nothing at `uri`.
        DataError: it cannot be listed.
    """
    wanted = None if suffixes is None else tuple(suffixes)
    try:
        for found in _walk_remote(uri) if is_remote(uri) else _walk_local(uri):
            if wanted is None or found.key.lower().endswith(wanted):
                yield found
    except MissingError:
        if not missing_ok:
            raise


def remove(uri: str) -> None:
    """Remove one file; a missing one is no error."""
    with translated(uri, "remove"):
        if not is_remote(uri):
            to_path(uri).unlink(missing_ok=True)
            return
        fs, path = filesystem(uri)
        try:
            fs.rm_file(path)
        except FileNotFoundError as error:
            if "NoSuchBucket" in names(error):
                raise


def remove_tree(uri: str) -> None:
    """Remove a folder with everything in it, hidden files too; a missing one is no error, a whole bucket is refused."""
    if is_remote(uri):
        if not uri.partition("://")[2].partition("/")[2].strip("/"):
            raise DataError(f"{uri}: a whole bucket is not removed; name a folder in it")
        remove(uri.rstrip("/"))
        below = _list_objects(uri)
        with ThreadPoolExecutor(_DELETES) as threads:
            while batch := [found.uri for found in islice(below, 1000)]:
                list(threads.map(remove, batch))
        return
    path = to_path(uri)
    if path.resolve() == Path(path.resolve().anchor):
        raise DataError(f"{uri}: the root of the file system is not removed; name a folder below it")
    with translated(uri, "remove"), suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_writable(uri: str) -> None:
    """Check that something can be written below `uri`, and leave nothing behind.

    Raises:
        DataError: nothing can be written there.
    """
    probe = f".rayclust-{uuid.uuid4().hex}.tmp"
    if is_remote(uri):
        with translated(uri, "write"):
            filesystem(uri)  # refuses a URI without a bucket
        write_bytes(join(uri, probe), b"")
        remove(join(uri, probe))
        return
    folder = to_path(uri).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise DataError(f"{uri}: {folder} is a file, so nothing can be written below it; choose another folder")
    with translated(uri, "write"):
        (folder / probe).touch()
        (folder / probe).unlink()


def _require(uri: str) -> FileStat:
    found = stat(uri)
    if found is None:
        hint = "no such object; check the bucket and path" if is_remote(uri) else "no such file; check the path"
        raise MissingError(f"{uri}: {hint}")
    return found


def _read(uri: str, start: int = 0, end: int | None = None, stamp: str = "-") -> tuple[bytes, str]:
    """Return bytes `start` up to `end` of a file and, of S3, its ETag; with `stamp` an object must still have it."""
    with translated(uri, "read"):
        if is_remote(uri):
            if end is not None and end <= start:
                return b"", ""
            fs, path = filesystem(uri)
            try:
                if uri.startswith("s3://"):
                    etag = stamp.partition("-")[2]
                    return cast(tuple[bytes, str], fs.get_object(path, start, end, f'"{etag}"' if etag else ""))
                return fs.cat_file(path, start=start, end=end), ""
            except OSError as error:
                if names(error) & {"InvalidRange", "416"}:  # an empty file, or a start beyond the end, has no range
                    return b"", ""
                raise
        with to_path(uri).open("rb") as file:
            file.seek(start)
            size = os.fstat(file.fileno()).st_size  # memory is taken for as much as is asked for
            return file.read(-1 if end is None else max(0, min(end, size) - start)), ""


# Local files.


def _local_stat(key: str, uri: str, found: os.stat_result) -> FileStat:
    return FileStat(key, uri, found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


def temporary_prefix(path: Path) -> str:
    """Return how names of temporary files for `path` begin on this host; hidden, and short enough for a name."""
    return f".{os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES])}.{socket.gethostname()[:40]}-"


def _remove_orphans(path: Path, now: float) -> None:
    """Remove temporary files of killed writers of `path`; `now` is by the clock that stamps the files."""
    mine = temporary_prefix(path)
    any_host = mine.removesuffix(f"{socket.gethostname()[:40]}-")
    with os.scandir(path.parent) as entries:
        found = [entry.name for entry in entries if entry.name.startswith(any_host) and entry.name.endswith(".tmp")]
    for name in found:
        with suppress(OSError):
            is_orphan = now - (path.parent / name).stat().st_mtime > _STALE_SECONDS
            if name.startswith(mine):
                try:
                    os.kill(int(name.removeprefix(mine).split("-")[0]), 0)
                except (ProcessLookupError, ValueError, OverflowError):
                    is_orphan = True
                except PermissionError:
                    pass  # a process of another user
            if is_orphan:
                (path.parent / name).unlink()


def _walk_local(uri: str) -> Iterator[FileStat]:
    """Yield visible files, depth first."""
    single, root = stat(uri), to_path(uri)
    if single is not None:
        yield single
        return
    if not root.is_dir():
        raise MissingError(f"{uri}: no such file or folder; check the path")
    base = os.fsencode(root) + b"/"
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(base, frozenset())]
    linked: set[tuple[int, int]] = set()  # a folder is entered through links once, so that no web of links is endless
    while pending:
        name, above = pending.pop()
        path, key = Path(os.fsdecode(name)), name[len(base) :].decode("utf-8", "backslashreplace")
        place = f"{uri.rstrip('/')}/{key}".rstrip("/")
        if not name.endswith(b"/"):
            try:
                found = path.stat()
            except OSError:
                if path.is_symlink():  # a broken link is listed, so that reading it becomes a reject
                    yield FileStat(key, place, 0, "broken-link")
                continue
            if modes.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                yield _local_stat(key, place, found)
            continue
        # A folder; what it holds comes next, a folder in it among its neighbours as its name with `/`.
        try:
            with translated(place, "list"):
                identity, below = _list_local(name)
        except UnreadableError as error:
            if not key or not isinstance(error.__cause__, PermissionError):
                raise
            logger.warning("%s", error)
            yield FileStat(key.rstrip("/"), place, CLOSED_FOLDER, "closed-folder")
            continue
        if key and path.is_symlink():
            if identity in linked | above:
                continue
            linked.add(identity)
        pending += [(name + each, above | {identity}) for each in below]


def _list_local(path: bytes) -> tuple[tuple[int, int], list[bytes]]:
    """Return what identifies a folder, and the visible names in it, last first; those of folders end with `/`."""
    found, below = os.stat(path), list[bytes]()  # noqa: PTH116 - a name need not be text
    with os.scandir(path) as entries:
        for entry in entries:
            is_folder = False
            with suppress(OSError):  # a link that leads to itself
                is_folder = entry.is_dir()
            below.append(entry.name + b"/" * is_folder)
    below = [name for name in below if not is_hidden(os.fsdecode(name.rstrip(b"/")))]
    return (found.st_dev, found.st_ino), sorted(below, reverse=True)


def _walk_remote(uri: str) -> Iterator[FileStat]:
    """Yield visible files, or the one at `uri`."""
    is_missing = "/" in uri.partition("://")[2].rstrip("/")  # an empty bucket is there
    for found in _list_objects(uri):
        is_missing = False
        if found.key and not found.key.endswith("/") and not is_hidden(found.key):
            yield found
    if is_missing:
        single = stat(uri)
        if single is None:
            raise MissingError(f"{uri}: no such object or folder; check the bucket and path")
        yield single


# Remote storage, by fsspec.


def _check_scheme(uri: str) -> None:
    """Refuse a remote URI of another scheme, or with a login in it.

    Raises:
        DataError: it is one.
    """
    scheme, _, path = uri.partition("://")
    bucket = path.partition("/")[0]
    if scheme not in SCHEMES:
        raise DataError(
            f"{uri}: {scheme}:// is not supported; only local paths, file://, s3://, gs://, abfs:// and hf:// are"
        )
    if scheme == "s3" and ("@" in bucket or ":" in bucket):  # not repeated in the message: it may hold a secret
        raise DataError("s3://…@…: a bucket's name holds no login; credentials come from the AWS variables and files")


def filesystem(uri: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a remote URI and the path in it.

    Raises:
        DataError: it names no bucket, or its scheme's extra is not installed.
    """
    _check_scheme(uri)
    scheme, _, path = uri.partition("://")
    if not path.partition("/")[0]:
        raise DataError(f"{uri}: names no bucket; write {scheme}://bucket/path")
    if scheme == "s3":
        from rayclust.store import s3  # takes every process half a second, so only where there is S3

        variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        return s3.connect(os.getpid(), tuple(sorted(variables.items()))), path
    import fsspec

    try:
        fs = fsspec.filesystem(scheme, use_listings_cache=False)  # another worker may have written since
    except ImportError as error:
        raise DataError(f"{uri}: install rayclust[{scheme}] to use {scheme}://") from error
    return fs, fs._strip_protocol(uri)


def _info_of(uri: str) -> dict[str, Any] | None:
    """Return fsspec's properties of a remote file or folder; None where there is neither."""
    with translated(uri, "read"):
        fs, path = filesystem(uri)
        try:
            return cast(dict[str, Any], fs.info(path))
        except FileNotFoundError as error:
            if "NoSuchBucket" in names(error):
                raise
            return None


def _remote_stat(key: str, uri: str, info: dict[str, Any]) -> FileStat:
    """Return the entry of a listing for fsspec's properties of an object."""
    version = next((info[name] for name in ("ETag", "etag", "blob_id", "created") if info.get(name)), "")
    version = version.timestamp() if isinstance(version, datetime) else str(version).strip('"')
    return FileStat(key, uri, int(info["size"]), f"{info['size']}-{version}")


def _list_objects(uri: str) -> Iterator[FileStat]:
    """Yield every object below a remote folder in order of the keys' UTF-8 bytes, as S3 lists them."""
    base = uri.rstrip("/")
    with translated(uri, "list"):
        fs, folder = filesystem(base)
        if base.startswith("s3://"):
            found = fs.list_objects(folder)
        else:
            found = iter(sorted(fs.find(folder, detail=True).items(), key=lambda item: item[0].encode()))
        for path, info in found:
            if path.startswith(f"{folder}/"):
                key = path[len(folder) + 1 :]
                yield _remote_stat(key, f"{base}/{key}", info)


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int, *, threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Yield `(item, function(item))` in order of `items`, computed ahead in threads to hide the latency of storage.

    Args:
        function: may be called from several threads at once; its errors are raised at the place of their item.
        items: taken lazily.
        ahead: bound on calls under way and results held, together; 1 calls in the caller's thread, one by one.
        threads: that call; as many as `ahead` if absent.
    """
    if ahead <= 1:
        for item in items:
            yield item, function(item)
        return
    pool = ThreadPoolExecutor(threads or ahead, thread_name_prefix="prefetch")
    running: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            running.append((item, pool.submit(function, item)))
            if len(running) == ahead:
                first, result = running.popleft()
                yield first, result.result()
        while running:
            first, result = running.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
