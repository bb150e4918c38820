"""Embeddings of a run as artefacts, as features, and as the tensors that methods train on."""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rayclust.config import FeaturesConfig
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.features import FeatureTransform
from rayclust.runtime.artefacts import put_table
from rayclust.runtime.tasks import Task, TaskResult, read_mark, write_mark
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, Manifest
from rayclust.store.run import Run

BLOCK = 8192
"""Rows that a method is given at once."""


# Moments of the embeddings.


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of rows, in float64, for centring and z-scores."""

    count: int
    total: np.ndarray
    """Float64[D]."""
    squares: np.ndarray
    """Float64[D]."""

    @classmethod
    def of(cls, embeddings: np.ndarray) -> Moments:
        """Compute the moments of Float16[N D] rows."""
        rows = embeddings.astype(np.float64)
        return cls(len(rows), rows.sum(0), (rows**2).sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def to_json(self) -> dict[str, Any]:
        """Return exact JSON: the sums as base64 of their little-endian float64s."""
        total, squares = (
            base64.b64encode(values.astype("<f8").tobytes()).decode() for values in (self.total, self.squares)
        )
        return {"count": self.count, "total": total, "squares": squares}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        """Return the inverse of `to_json`."""
        total, squares = (np.frombuffer(base64.b64decode(content[name]), "<f8").copy() for name in ("total", "squares"))
        return cls(content["count"], total, squares)


class MomentsInOrder:
    """Sum of the moments of all parts in the order of the parts, whatever order they end in: same rows, same bytes.

    Moments are removed from the results that pass: about 21 D bytes a part would be most of the driver's memory.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Moments | None] = {}
        self._next = 0
        self._sum: Moments | None = None

    def take(self, task: Task, result: TaskResult) -> None:
        """Add one part's moments (an `OnResult`); a part that comes again changes nothing."""
        moments = Moments.from_json(result.extra.pop("moments"))
        if task.index >= self._next:
            self._waiting[task.index] = moments if result.counts["rows"] else None
        while self._next in self._waiting:
            found = self._waiting.pop(self._next)
            if found is not None:
                self._sum = found if self._sum is None else self._sum + found
            self._next += 1

    @property
    def sum(self) -> Moments:
        """Moments of all rows.

        Raises:
            ArtefactError: a part is missing among those that were seen, or no part has rows.
        """
        if self._sum is None or self._waiting:
            raise ArtefactError("encode: the moments of a part are missing; run encode again")
        return self._sum


# Writing embeddings.


def write_shard(
    run: Run,
    task: Task,
    row_start: int,
    records: Sequence[dict[str, Any]],
    embeddings: np.ndarray,
    rejects: Sequence[dict[str, Any]],
) -> TaskResult:
    """Write embeddings and rejects of one input shard; the caller marks the task afterwards.

    Args:
        run: the run.
        task: index and digest of the shard.
        row_start: row of its first record; an estimate, which `renumber` corrects.
        records: key, uri and label of each image, in order of key.
        embeddings: Float16[n D], their embeddings. Rows that are not finite become rejects.
        rejects: key, uri, reason and detail of each image left out.
    """
    finite = np.atleast_1d(np.isfinite(embeddings.astype(np.float32)).all(axis=1))
    kept, rejects = [], list(rejects)
    for record, is_finite in zip(records, finite, strict=True):
        if is_finite:
            kept.append(record)
        else:
            detail = "the embedding has an infinite or undefined value"
            rejects.append({"key": record["key"], "uri": record["uri"], "reason": "not_finite", "detail": detail})
    embeddings = embeddings[finite]
    rejects.sort(key=lambda reject: reject["key"])
    columns = [
        pa.array(np.arange(row_start, row_start + len(kept), dtype=np.int64)),
        *(pa.array([record[name] for record in kept], pa.string()) for name in ("key", "uri", "label")),
        tables.fixed_list(embeddings.astype(np.float16)),
    ]
    outputs = put_table(
        run, run.embeddings(task.index), pa.table(columns, schema=tables.EMBEDDINGS(embeddings.shape[1]))
    )
    if rejects:
        outputs |= put_table(run, run.rejects(task.index), pa.Table.from_pylist(rejects, schema=tables.REJECTS))
    else:
        storage.remove(run.rejects(task.index))
    reasons = dict.fromkeys(sorted({reject["reason"] for reject in rejects}), 0)
    for reject in rejects:
        reasons[reject["reason"]] += 1
    return TaskResult(
        outputs,
        {"rows": len(kept), "rejects": len(rejects), "labelled": sum(r["label"] is not None for r in kept)},
        {"row_start": row_start, "reasons": reasons, "moments": Moments.of(embeddings).to_json()},
    )


def renumber(run: Run, index: int, row_start: int) -> TaskResult:
    """Rewrite a part so that its rows begin at `row_start`; idempotent.

    Raises:
        ArtefactError: the part has no mark.
    """
    uri = run.shard_manifest(index)
    mark = read_mark(uri)
    if mark is None:
        raise ArtefactError(f"{uri}: is missing or damaged; run encode again")
    digest, result = mark
    table = tables.read_table(run.embeddings(index))
    rows = pa.array(np.arange(row_start, row_start + table.num_rows, dtype=np.int64))
    table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
    # Until the part is whole its mark names no row: after a kill half-way it could name one that the part has not.
    result.extra["row_start"] = None
    write_mark(uri, Task(index, digest), result)
    result.outputs |= put_table(run, run.embeddings(index), table)
    result.extra["row_start"] = row_start
    write_mark(uri, Task(index, digest), result)
    return result


# Reading features.


def transform_of(encode: Manifest, features: FeaturesConfig) -> FeatureTransform:
    """Return the transform from embeddings to features, by the moments in encode's manifest."""
    moments = Moments.from_json(encode.outputs_of(EncodeOutputs).moments.model_dump())
    return FeatureTransform.from_moments(
        moments.count,
        moments.total,
        moments.squares,
        center=features.center,
        standardize=features.standardize,
        normalize=features.normalize,
    )


def row_starts(encode: Manifest) -> list[int]:
    """Return the row at which each part begins, and N at the end."""
    return [0, *np.cumsum(encode.outputs_of(EncodeOutputs).parts, dtype=np.int64).tolist()]


def part_features(run: Run, index: int, transform: FeatureTransform) -> np.ndarray:
    """Return Float32[B D], the features of the rows of one part."""
    table = tables.read_table(run.embeddings(index), ["embedding"])
    return transform(tables.matrix(table["embedding"]))


def unit_rows(x: Tensor) -> Tensor:
    """Scale rows to length 1 whatever `features` left them at: neighbours are by cosine."""
    return torch.nn.functional.normalize(x, dim=1)


def blocks(run: Run, starts: list[int], transform: FeatureTransform) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield Float32[B D] unit features and Int64[B] rows of every part that has rows, in order."""
    for part in range(len(starts) - 1):
        if starts[part + 1] > starts[part]:
            features = torch.from_numpy(part_features(run, part, transform))
            yield unit_rows(features), torch.arange(starts[part], starts[part + 1])


def rows_by_part(starts: list[int], rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each part that holds some of the rows, with their positions in it.

    Args:
        starts: as `row_starts` gives them.
        rows: Int64[n], sorted.
    """
    for part, start in enumerate(starts[:-1]):
        local = rows[(rows >= start) & (rows < starts[part + 1])] - start
        if len(local):
            yield part, local


def features_at(run: Run, starts: list[int], transform: FeatureTransform, rows: np.ndarray) -> np.ndarray:
    """Return Float32[n D], the features of some rows; only the parts that hold them are read.

    Args:
        run: the run.
        starts: as `row_starts` gives them.
        transform: from embeddings to features.
        rows: Int64[n], sorted.
    """
    gathered = []
    for part, local in rows_by_part(starts, rows):
        embeddings = tables.matrix(tables.read_table(run.embeddings(part), ["embedding"])["embedding"])
        gathered.append(transform(embeddings[local]))
    return np.concatenate(gathered)


def labels_at(run: Run, starts: list[int], rows: np.ndarray) -> list[str | None]:
    """Return the labels of some rows, Int64[n] sorted; None for a row without one."""
    found: list[str | None] = []
    for part, local in rows_by_part(starts, rows):
        found += tables.read_table(run.embeddings(part), ["label"])["label"].take(pa.array(local)).to_pylist()
    return found


# Rows for training.


class StoredRows:
    """Rows of a run for the methods (`methods.base.Rows`), mapped from a file on the worker's node.

    The first worker on a node copies the rows into the file; all workers of the node map it, so that rows beyond memory
    stream from disk and the page cache is shared.

    Args:
        run: the run.
        encode: manifest of its embeddings.
        features: settings of the features.
        cache: folder for this training's files on this node.
        worker: rank of this worker.
        workers: number of workers.
    """

    def __init__(
        self, run: Run, encode: Manifest, features: FeaturesConfig, cache: Path, worker: int = 0, workers: int = 1
    ) -> None:
        self._run, self._cache = run, cache
        self._transform = transform_of(encode, features)
        self._starts = row_starts(encode)
        self._worker, self._workers = worker, workers
        self.count = self._starts[-1]
        """Number of rows, N."""
        self.dimension = encode.outputs_of(EncodeOutputs).dimension
        """Width of a row, D."""

    def tensor(self) -> Tensor:
        """Return Float32[N D], mapped."""
        return self._mapped(
            "features.npy", self.dimension, np.float32, lambda part: part_features(self._run, part, self._transform)
        )

    def blocks(self) -> Iterator[Tensor]:
        """Yield Float32[B D] blocks of this worker's contiguous share of the rows."""
        features = self.tensor()
        first = self.count * self._worker // self._workers
        end = self.count * (self._worker + 1) // self._workers
        for start in range(first, end, BLOCK):
            yield features[start : min(start + BLOCK, end)]

    def neighbors(self) -> Tensor:
        """Return Int64[N M], mapped."""
        width = tables.read_table(self._run.neighbors(0), ["neighbors"]).schema.field("neighbors").type.list_size
        return self._mapped(
            "neighbors.npy",
            width,
            np.int64,
            lambda part: tables.matrix(tables.read_table(self._run.neighbors(part), ["neighbors"])["neighbors"]),
        )

    def _mapped(self, name: str, width: int, dtype: type, read: Callable[[int], np.ndarray]) -> Tensor:
        """Map the file `name` of this node, filled with what `read` returns for each part."""

        def fill(array: np.ndarray) -> None:
            for part, start in enumerate(self._starts[:-1]):
                rows = read(part)
                array[start : start + len(rows)] = rows

        return torch.from_numpy(mapped(self._cache / name, (self.count, width), dtype, fill))


def mapped(path: Path, shape: tuple[int, ...], dtype: type, fill: Callable[[np.ndarray], None]) -> np.ndarray:
    """Map an array from a file, which the first process to call fills while the others wait.

    Args:
        path: the file; it exists only once it is complete.
        shape: of the array.
        dtype: of the array.
        fill: writes the array's content.

    Raises:
        DataError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for left in path.parent.glob(f"{path.stem}.*.unfinished"):  # by a process that was killed with the lock
                left.unlink(missing_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
            array = np.lib.format.open_memmap(unfinished, "w+", dtype, shape)
            try:
                # A mapped file that finds the disk full later kills its process: take all bytes now.
                with unfinished.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, unfinished.stat().st_size)
            except OSError as error:
                # Other errors: this file system cannot reserve.
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    unfinished.unlink(missing_ok=True)
                    raise DataError(
                        f"{unfinished}: no space left for the rows of the training; free some, or set RAYCLUST_SCRATCH "
                        "to another disk"
                    ) from error
            fill(array)
            array.flush()
            del array
            unfinished.replace(path)
    # Copy-on-write: torch wants writable memory, and nothing written there reaches the file.
    return np.load(path, mmap_mode="c")


def cache_folder(digest: str) -> Path:
    """Return this user's folder on this node for the files of one training.

    Raises:
        ConfigError: the folder lies below the shared temporary one, and other users own it or can write to it.
    """
    root = os.environ.get("RAYCLUST_SCRATCH")
    if root:
        return Path(root) / "rows" / digest
    path = Path(tempfile.gettempdir()) / f"rayclust-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{path}: belongs to somebody else, or others may write there: set RAYCLUST_SCRATCH")
    return path / "rows" / digest


def drop_cache(digest: str) -> None:
    """Remove the files of one training from this node."""
    shutil.rmtree(cache_folder(digest), ignore_errors=True)
