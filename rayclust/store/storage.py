"""What every place of storage offers: the statistics of a file, the rule of what is hidden, one protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from rayclust.errors import DataError

IGNORED_NAMES = frozenset({"__MACOSX", "Thumbs.db"})
"""What operating systems leave behind in folders and archives."""


class UnreadableError(DataError):
    """One file cannot be read, while others beside it may be: listings of images go on without it."""


class MissingError(UnreadableError):
    """A file, object, folder or bucket is not there."""


@dataclass(frozen=True)
class FileStat:
    """One file or object as a listing shows it."""

    key: str
    """Path relative to the folder that was listed, with `/` between its parts."""
    uri: str
    """Where to read it."""
    size: int
    """Bytes."""
    stamp: str
    """Changes whenever the content does: size with the ETag, or with the time of change in nanoseconds."""


class Storage(Protocol):
    """Files below local folders, or objects in buckets; every error is one of rayclust's with the URI in it."""

    def stat(self, uri: str) -> FileStat | None:
        """The file at `uri` itself, or None; folders have none."""

    def exists(self, uri: str) -> bool:
        """Whether `uri` is a file or a folder with something in it."""

    def read(self, uri: str, start: int, end: int | None) -> bytes:
        """Bytes from `start` up to `end`, or to the end of the file."""

    def write(self, uri: str, data: bytes) -> str:
        """Replaces the whole file at once: a reader sees the old content or the new, never a part. Gives its stamp."""

    def open(self, uri: str) -> BinaryIO:
        """A seekable file for reading."""

    def walk(self, uri: str) -> Iterator[FileStat]:
        """Visible files below `uri`, streamed in order of their keys' UTF-8 bytes."""

    def remove(self, uri: str) -> None:
        """Removes one file; a missing one is no error."""

    def remove_tree(self, uri: str) -> None:
        """Removes everything below `uri`, hidden files too; a missing folder is no error."""

    def check_writable(self, uri: str) -> None:
        """Raises unless files can be written below `uri`; leaves nothing behind."""

    def local_copy(self, uri: str) -> AbstractContextManager[Path]:
        """The file as a local path for as long as the context lasts."""

    def download(self, uri: str, path: Path) -> None:
        """Copies one file to a local path."""

    def upload(self, path: Path, uri: str) -> None:
        """Copies a local file; as whole as `write`."""


def is_hidden(key: str) -> bool:
    """Whether listings leave `key` out: some part starts with a dot or is what operating systems leave behind."""
    parts = (part for part in key.split("/") if part not in {".", ".."})
    return any(part.startswith(".") or part in IGNORED_NAMES for part in parts)
