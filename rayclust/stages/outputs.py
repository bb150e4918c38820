"""Writes an artefact and says what was written, for the manifest."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa

from rayclust.store import filesystem, tables
from rayclust.store.layout import Run, parts

Outputs = dict[str, dict[str, Any]]
"""Path below the run → {digest, size}."""


def put_bytes(run: Run, uri: str, data: bytes) -> Outputs:
    """Writes `data` at `uri`, which lies below the run."""
    filesystem.write_bytes(uri, data)
    path = uri.removeprefix(run.uri.rstrip("/") + "/")
    return {path: {"digest": hashlib.sha256(data).hexdigest(), "size": len(data)}}


def put_table(run: Run, uri: str, table: pa.Table) -> Outputs:
    """Writes a table at `uri`, which lies below the run."""
    return put_bytes(run, uri, tables.encode_table(table))


def put_json(run: Run, uri: str, value: Any) -> Outputs:
    """Writes canonical JSON at `uri`, which lies below the run."""
    return put_bytes(run, uri, filesystem.canonical_json(value).encode())


def drop_stale_parts(folder: str, count: int) -> None:
    """Removes the tables of an earlier, longer input from a folder: readers take every part that is there."""
    for index, uri in parts(folder):
        if index >= count:
            filesystem.remove(uri)


class Listing:
    """Which files of a run are there, and how large; each folder is listed once, when it is first asked for."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._sizes: dict[str, dict[str, int]] = {}

    def has(self, path: str, size: int) -> bool:
        """Whether the file at `path` below the run has `size` bytes."""
        folder, _, name = path.partition("/")
        if not name:
            found = filesystem.stat(self._run.at(path))
            return found is not None and found.size == size
        if folder not in self._sizes:
            files = filesystem.walk(self._run.at(folder), missing_ok=True)
            self._sizes[folder] = {file.key: file.size for file in files}
        return self._sizes[folder].get(name) == size
