"""Write artefacts with their checksums, and find those that are missing or damaged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from io import BufferedReader
from typing import Any, cast

import numpy as np
import pyarrow as pa

from rayclust.store import storage, tables
from rayclust.store.manifest import read_manifest
from rayclust.store.run import Run, parts
from rayclust.store.storage import FileStat

logger = logging.getLogger(__name__)

Outputs = dict[str, dict[str, Any]]
"""Path below the run → {digest, size, stamp}."""


def put_bytes(run: Run, uri: str, data: bytes) -> Outputs:
    """Write `data` at `uri`, which lies below the run."""
    stamp = storage.write_bytes(uri, data)
    return {run.path(uri): {"digest": hashlib.sha256(data).hexdigest(), "size": len(data), "stamp": stamp}}


def put_table(run: Run, uri: str, table: pa.Table) -> Outputs:
    """Write a table as Parquet at `uri`, which lies below the run."""
    return put_bytes(run, uri, tables.encode_table(table))


def put_json(run: Run, uri: str, value: Any) -> Outputs:
    """Write canonical JSON at `uri`, which lies below the run."""
    return put_bytes(run, uri, storage.canonical_json(value).encode())


def put_neighbors(
    run: Run, uris: Mapping[int, str], starts: Sequence[int], neighbors: np.ndarray, similarity: np.ndarray
) -> Outputs:
    """Write the neighbours of consecutive parts, a table for each.

    Args:
        run: the run.
        uris: of the tables, by part, such as `run.neighbors(part)`.
        starts: first row of each part of the run, and N.
        neighbors: Int[B M], neighbours of all rows of these parts.
        similarity: Float[B M], cosines; stored as float16.
    """
    outputs, first = Outputs(), starts[min(uris)]
    for part, uri in uris.items():
        start, stop = starts[part : part + 2]
        columns = [
            pa.array(np.arange(start, stop)),
            tables.fixed_list(neighbors[start - first : stop - first].astype(np.int64)),
            tables.fixed_list(similarity[start - first : stop - first].astype(np.float16)),
        ]
        outputs |= put_table(run, uri, pa.table(columns, schema=tables.NEIGHBORS(neighbors.shape[1])))
    return outputs


def drop_stale_parts(folder: str, count: int) -> None:
    """Remove the parts from `count` on from a folder of tables: readers take every part that is there."""
    for index, uri in parts(folder):
        if index >= count:
            storage.remove(uri)


def remove_damaged(run: Run, stages: Iterable[str], message: str) -> tuple[str, str]:
    """Remove the file that an error's message names if its checksum is not the manifest's, so that it is made again.

    Returns:
        URI of the file and name of the stage that writes it; "" and "" if no file of a complete stage is both named and
        damaged.
    """
    for stage in stages:
        manifest = read_manifest(run, stage)
        for path, written in manifest.outputs.items() if manifest else ():
            uri = run.at(path)
            if uri in message and _digest(uri) != written.digest:
                logger.warning("%s: is damaged, its checksum is another than was written: made again", uri)
                storage.remove(uri)
                return uri, stage
    return "", ""


class FileListing:
    """Files of a run as they are now; each folder is listed once, on first use.

    A file with the stamp of its manifest is taken as unchanged. One with another stamp, because it was copied or
    edited, is read and its digest decides.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._found: dict[str, dict[str, FileStat]] = {}

    def has(self, path: str, written: Mapping[str, Any]) -> bool:
        """Return whether the file at `path` below the run is the one that was written; log a warning if not."""
        found = self.find(path)
        if found is None or found.size != written["size"]:
            fault = "is missing" if found is None else f"has {found.size:,} bytes instead of {written['size']:,}"
            logger.warning("%s: %s: made again", self._run.at(path), fault)
            return False
        if found.stamp == written.get("stamp") or _digest(found.uri) == written["digest"]:
            return True
        logger.warning("%s: is damaged, its checksum is another than was written: made again", self._run.at(path))
        return False

    def has_all(self, outputs: Outputs) -> bool:
        """Return whether every file of a mark or manifest is there as it was written."""
        return all(self.has(path, written) for path, written in outputs.items())

    def find(self, path: str) -> FileStat | None:
        """Return size and stamp of the file at `path` below the run; None if there is none."""
        folder, _, name = path.partition("/")
        if not name:
            return storage.stat(self._run.at(path))
        if folder not in self._found:
            files = storage.walk(self._run.at(folder), missing_ok=True)
            self._found[folder] = {file.key: file for file in files}
        return self._found[folder].get(name)


def _digest(uri: str) -> str:
    """Return the SHA-256 of a file, "" if it is missing."""
    try:
        with storage.open_input(uri) as file:
            return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
    except storage.MissingError:
        return ""
