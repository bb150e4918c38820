"""Writes an artefact and says what was written, for the manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.store import filesystem, tables
from rayclust.store.filesystem import FileStat
from rayclust.store.layout import STAGES, Run, parts
from rayclust.store.manifest import read_manifest

logger = logging.getLogger(__name__)

_BLOCK = 8 << 20

Outputs = dict[str, dict[str, Any]]
"""Path below the run → {digest, size, stamp}."""


def put_bytes(run: Run, uri: str, data: bytes) -> Outputs:
    """Writes `data` at `uri`, which lies below the run."""
    stamp = filesystem.write_bytes(uri, data)
    return {run.path(uri): {"digest": hashlib.sha256(data).hexdigest(), "size": len(data), "stamp": stamp}}


def put_table(run: Run, uri: str, table: pa.Table) -> Outputs:
    """Writes a table at `uri`, which lies below the run."""
    return put_bytes(run, uri, tables.encode_table(table))


def put_neighbors(run: Run, part: int, rows: np.ndarray, neighbors: np.ndarray, similarity: np.ndarray) -> Outputs:
    """Writes the table of neighbours of one part: Int64[B] rows, Int64[B k] neighbours, Float[B k] similarities."""
    columns = [
        pa.array(rows),
        tables.fixed_list(neighbors.astype(np.int64)),
        tables.fixed_list(similarity.astype(np.float16)),
    ]
    return put_table(run, run.neighbors(part), pa.table(columns, schema=tables.NEIGHBORS(neighbors.shape[1])))


def put_json(run: Run, uri: str, value: Any) -> Outputs:
    """Writes canonical JSON at `uri`, which lies below the run."""
    return put_bytes(run, uri, filesystem.canonical_json(value).encode())


def drop_stale_parts(folder: str, count: int) -> None:
    """Removes the tables of an earlier, longer input from a folder: readers take every part that is there."""
    for index, uri in parts(folder):
        if index >= count:
            filesystem.remove(uri)


def drop_damaged(run: Run, said: str) -> tuple[str, str] | None:
    """Removes a file that an error speaks of, if its checksum is another than was written, so that it is made again.

    Args:
        run: the run.
        said: the error's line, which names the file by its URI.

    Returns:
        The file's URI and the stage that makes it; None where no file of a sealed stage is both named and damaged.
    """
    for stage in STAGES:
        sealed = read_manifest(run, stage)
        for path, written in sealed.outputs.items() if sealed else ():
            uri = run.at(path)
            if uri in said and _digest(uri) != written.digest:
                logger.warning("%s: is damaged, its checksum is another than was written: made again", uri)
                filesystem.remove(uri)
                return uri, stage
    return None


class FileListing:
    """Which files of a run are there as they were written; each folder is listed once, when it is first asked for.

    A file that still has the stamp of its writing is taken for what was written. One with another stamp, because it was
    copied or because somebody changed it, is read, and its digest decides.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._found: dict[str, dict[str, FileStat]] = {}

    def has(self, path: str, written: Mapping[str, Any]) -> bool:
        """Whether the file at `path` below the run is the one that was written."""
        found = self.find(path)
        if found is None or found.size != written["size"]:
            fault = "is missing" if found is None else f"has {found.size:,} bytes instead of {written['size']:,}"
            logger.warning("%s: %s: made again", self._run.at(path), fault)
            return False
        if found.stamp == written.get("stamp") or _digest(found.uri) == written["digest"]:
            return True
        logger.warning("%s: is damaged, its checksum is another than was written: made again", self._run.at(path))
        return False

    def find(self, path: str) -> FileStat | None:
        """The file at `path` below the run as it is now."""
        folder, _, name = path.partition("/")
        if not name:
            return filesystem.stat(self._run.at(path))
        if folder not in self._found:
            files = filesystem.walk(self._run.at(folder), missing_ok=True)
            self._found[folder] = {file.key: file for file in files}
        return self._found[folder].get(name)


def _digest(uri: str) -> str:
    """SHA-256 of a file, read block by block."""
    digest = hashlib.sha256()
    try:
        with filesystem.open_input(uri) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except filesystem.MissingError:
        return ""
    return digest.hexdigest()
