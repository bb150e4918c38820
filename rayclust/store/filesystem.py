"""Files by URI: local paths, `file://` and `s3://` behave the same.

A missing bucket or folder, refused access or an unreachable endpoint raises DataError with the URI and what to do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from rayclust.errors import ArtefactError, DataError
from rayclust.store import local, s3
from rayclust.store.storage import FileStat, MissingError, Storage, UnreadableError

__all__ = ["FileStat", "MissingError", "UnreadableError"]


def is_remote(uri: str) -> bool:
    """Whether `uri` lies in object storage."""
    return uri.startswith(s3.SCHEME)


def absolute(uri: str) -> str:
    """`uri` without a trailing `/`, and a local one as an absolute path, so that it means the same from anywhere."""
    if is_remote(uri):
        return uri.rstrip("/") if uri.rstrip("/") != s3.SCHEME.rstrip("/") else uri
    _storage(uri)
    return os.path.abspath(local.to_path(uri))  # noqa: PTH100 - resolves `..` without following links


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it."""
    return "/".join([uri.rstrip("/"), *parts])


def stat(uri: str) -> FileStat | None:
    """The file at `uri`, or None where there is none; a folder has none."""
    return _storage(uri).stat(uri)


def exists(uri: str) -> bool:
    """Whether `uri` is a file, or a folder (in object storage: one with something in it)."""
    return _storage(uri).exists(uri)


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """The content of a file.

    Args:
        uri: the file.
        limit: at most so many bytes from the start; None for all.

    Raises:
        MissingError: there is no such file (a DataError).
        DataError: it cannot be read.
    """
    return _storage(uri).read(uri, 0, limit)


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes `start` up to `end` of a file, fewer where it ends before.

    Raises:
        MissingError: there is no such file.
        DataError: it cannot be read.
    """
    return _storage(uri).read(uri, start, end)


def write_bytes(uri: str, data: bytes) -> str:
    """Replaces a file at once: a reader, and whoever comes after a crash, finds the old content or the new.

    Returns:
        The stamp of what was written, as `FileStat.stamp`.

    Raises:
        DataError: it cannot be written.
    """
    return _storage(uri).write(uri, data)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys, the same text for equal values; NaN and infinities become null."""
    return json.dumps(_plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(uri: str, value: Any) -> None:
    """Writes `canonical_json(value)`."""
    write_bytes(uri, canonical_json(value).encode())


def read_json(uri: str) -> Any:
    """The value in a JSON file.

    Raises:
        MissingError: there is no such file.
        ArtefactError: it does not hold JSON.
    """
    return parse_json(read_bytes(uri), uri)


def parse_json(data: bytes, uri: str) -> Any:
    """The value in the bytes of a JSON file.

    Raises:
        ArtefactError: they do not hold JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{uri}: is not readable JSON ({error}); remove it and run its stage again") from error


def open_input(uri: str) -> BinaryIO:
    """A seekable binary file; the caller closes it. Remote ones read ranges."""
    return _storage(uri).open(uri)


def open_whole(uri: str) -> BinaryIO:
    """A seekable file on this machine: a remote one is fetched first, and leaves nothing behind when closed."""
    if not is_remote(uri):
        return open_input(uri)
    with local_copy(uri) as path:
        return path.open("rb")


def walk(uri: str, *, suffixes: Collection[str] | None = None, missing_ok: bool = False) -> Iterator[FileStat]:
    """Files below a folder, streamed in order of their keys' UTF-8 bytes, the same on every kind of storage.

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
        for found in _storage(uri).walk(uri):
            if wanted is None or found.key.lower().endswith(wanted):
                yield found
    except MissingError:
        if not missing_ok:
            raise


def remove(uri: str) -> None:
    """Removes one file; a missing one is no error."""
    _storage(uri).remove(uri)


def remove_tree(uri: str) -> None:
    """Removes a folder with everything in it; a missing one is no error, a whole bucket is refused."""
    _storage(uri).remove_tree(uri)


def check_writable(uri: str) -> None:
    """Tries to write below `uri` and leaves nothing behind.

    Raises:
        DataError: nothing can be written there.
    """
    _storage(uri).check_writable(uri)


def local_copy(uri: str) -> AbstractContextManager[Path]:
    """A context with the file as a local path: itself, or a temporary copy that is removed at the end."""
    return _storage(uri).local_copy(uri)


def upload_tree(uri: str, folder: Path) -> None:
    """Copies the visible files below a local folder to `uri`; each appears whole."""
    for found in walk(str(folder)):
        _storage(uri).upload(folder / found.key, join(uri, found.key))


def download_tree(uri: str, folder: Path) -> None:
    """Copies the visible files below `uri` into a local folder, and nothing to anywhere else.

    Raises:
        DataError: an object's key leads out of the folder.
    """
    for found in walk(uri):
        if ".." in found.key.split("/") or found.key.startswith("/"):
            raise DataError(f"{found.uri}: its key leads out of the folder that it is copied to; remove the object")
        _storage(uri).download(found.uri, folder / found.key)


def _storage(uri: str) -> Storage:
    if is_remote(uri):
        return s3.S3Storage()
    scheme, separator, _ = uri.partition("://")
    if separator and "/" not in scheme and not uri.startswith(local.SCHEME):
        raise DataError(f"{uri}: {scheme}:// is not supported; only local paths, file:// and s3:// are")
    if not uri:
        raise DataError("'': an empty path; give a folder or an s3:// URI")
    if "\0" in uri:
        raise DataError(f"{uri!r}: a path cannot hold a zero character")
    return local.LocalStorage()
