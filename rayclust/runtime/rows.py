"""The rows of a run as its workers hold them: features and neighbours, mapped from a file on the worker's node."""

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
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import Manifest

# One input shard's embeddings as an artefact: part, rejects, moments, and the marker that vouches for them.


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of rows, in float64: what centring and z-scores need."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, embeddings: np.ndarray) -> Moments:
        """The moments of Float16[N D] rows."""
        rows = embeddings.astype(np.float64)
        return cls(len(rows), rows.sum(0), (rows**2).sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def to_json(self) -> dict[str, Any]:
        """Exact: the sums travel as the bytes of their float64s."""
        return {"count": self.count, "total": _packed(self.total), "squares": _packed(self.squares)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        """The inverse of `to_json`."""
        return cls(content["count"], _unpacked(content["total"]), _unpacked(content["squares"]))


class MomentsInOrder:
    """The moments of all parts, summed in the order of the parts whatever order they end in: same rows, same bytes.

    Results lose theirs as they are seen: some 21 D bytes a part would be most of what the driver holds.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Moments | None] = {}
        self._next = 0
        self._sum: Moments | None = None

    def take(self, unit: Task, result: TaskResult) -> None:
        """Sees one part's result; a part that is read again changes nothing."""
        moments = Moments.from_json(result.extra.pop("moments"))
        if unit.index >= self._next:
            self._waiting[unit.index] = moments if result.counts["rows"] else None
        while self._next in self._waiting:
            found = self._waiting.pop(self._next)
            if found is not None:
                self._sum = found if self._sum is None else self._sum + found
            self._next += 1

    @property
    def sum(self) -> Moments:
        """Of all parts.

        Raises:
            ArtefactError: a part before one that was seen was not, or no part has rows.
        """
        if self._sum is None or self._waiting:
            raise ArtefactError("encode: the moments of a part are missing; run encode again")
        return self._sum


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f8").copy()


def write_shard(
    run: Run,
    unit: Task,
    row_start: int,
    records: Sequence[dict[str, Any]],
    embeddings: np.ndarray,
    rejects: Sequence[dict[str, Any]],
) -> TaskResult:
    """Writes one shard's part and rejects; the caller marks the unit afterwards.

    Args:
        run: where.
        unit: index and digest of the shard.
        row_start: the row of its first record, as far as is known; `renumber` mends it.
        records: key, uri and label of each kept image, in order of key.
        embeddings: Float16[n D], their embeddings. Rows that are not finite become rejects.
        rejects: key, uri, reason and detail of each image left out.
    """
    finite = np.atleast_1d(np.isfinite(embeddings.astype(np.float32)).all(axis=1))
    kept = [record for record, good in zip(records, finite, strict=True) if good]
    lost = [_not_finite(record) for record, good in zip(records, finite, strict=True) if not good]
    rejects = sorted([*rejects, *lost], key=lambda reject: reject["key"])
    embeddings = embeddings[finite]
    outputs = put_table(run, run.embeddings(unit.index), _part(row_start, kept, embeddings))
    if rejects:
        outputs |= put_table(run, run.rejects(unit.index), pa.Table.from_pylist(rejects, schema=tables.REJECTS))
    else:
        filesystem.remove(run.rejects(unit.index))
    return TaskResult(
        outputs,
        {"rows": len(kept), "rejects": len(rejects), "labelled": sum(r["label"] is not None for r in kept)},
        {"row_start": row_start, "reasons": _tally(rejects), "moments": Moments.of(embeddings).to_json()},
    )


def renumber(run: Run, index: int, row_start: int) -> TaskResult:
    """Rewrites a part so that its rows begin at `row_start`; the same bytes whenever it is run again."""
    marker = read_mark(run.shard_manifest(index))
    if marker is None:
        raise ArtefactError(f"{run.shard_manifest(index)}: is missing or damaged; run encode again")
    digest, result = marker
    table = tables.read_table(run.embeddings(index))
    rows = pa.array(np.arange(row_start, row_start + table.num_rows, dtype=np.int64))
    table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
    # Until the part is whole its marker names no row: after a kill half-way it could name one that the part has not.
    result.extra["row_start"] = None
    write_mark(run.shard_manifest(index), Task(index, digest), result)
    result.outputs |= put_table(run, run.embeddings(index), table)
    result.extra["row_start"] = row_start
    write_mark(run.shard_manifest(index), Task(index, digest), result)
    return result


def _part(row_start: int, records: Sequence[dict[str, Any]], embeddings: np.ndarray) -> pa.Table:
    columns = [
        pa.array(np.arange(row_start, row_start + len(records), dtype=np.int64)),
        *(pa.array([record[name] for record in records], pa.string()) for name in ("key", "uri", "label")),
        tables.fixed_list(embeddings.astype(np.float16)),
    ]
    return pa.table(columns, schema=tables.EMBEDDINGS(embeddings.shape[1]))


def _not_finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": record["key"],
        "uri": record["uri"],
        "reason": "not_finite",
        "detail": "the embedding has an infinite or undefined value",
    }


def _tally(rejects: Sequence[dict[str, Any]]) -> dict[str, int]:
    reasons = sorted({reject["reason"] for reject in rejects})
    return {reason: sum(reject["reason"] == reason for reject in rejects) for reason in reasons}


BLOCK = 8192
"""Rows handed to a method at once."""


def transform_of(encode: Manifest, features: FeaturesConfig) -> FeatureTransform:
    """Embeddings to features, by the moments that the encode stage sealed."""
    moments = Moments.from_json(encode.extra["moments"])
    return FeatureTransform.from_moments(
        moments.count,
        moments.total,
        moments.squares,
        center=features.center,
        standardize=features.standardize,
        normalize=features.normalize,
    )


def row_starts(encode: Manifest) -> list[int]:
    """The row at which each part begins, and N at the end."""
    return [0, *np.cumsum(encode.extra["parts"]).tolist()]


def part_features(run: Run, index: int, transform: FeatureTransform) -> np.ndarray:
    """Float32[B D]: the features of the rows of one part."""
    table = tables.read_table(run.embeddings(index), ["embedding"])
    return transform(tables.matrix(table["embedding"]))


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length 1, whatever `features` left them at: neighbours are by cosine."""
    return torch.nn.functional.normalize(x, dim=1)


def blocks(run: Run, starts: list[int], transform: FeatureTransform) -> Iterator[tuple[Tensor, Tensor]]:
    """Unit features and rows of every part, in order."""
    for part in range(len(starts) - 1):
        if starts[part + 1] > starts[part]:
            features = torch.from_numpy(part_features(run, part, transform))
            yield unit_rows(features), torch.arange(starts[part], starts[part + 1])


def features_at(run: Run, starts: list[int], transform: FeatureTransform, rows: np.ndarray) -> np.ndarray:
    """Float32[n D]: the features of some rows, Int64[n] sorted; only the parts that hold them are read."""
    gathered = []
    for part, own in _by_part(starts, rows):
        embeddings = tables.matrix(tables.read_table(run.embeddings(part), ["embedding"])["embedding"])
        gathered.append(transform(embeddings[own]))
    return np.concatenate(gathered)


def labels_at(run: Run, starts: list[int], rows: np.ndarray) -> list[str | None]:
    """The labels of some rows, Int64[n] sorted."""
    found: list[str | None] = []
    for part, own in _by_part(starts, rows):
        found += tables.read_table(run.embeddings(part), ["label"])["label"].take(pa.array(own)).to_pylist()
    return found


def _by_part(starts: list[int], rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each part that holds some of the rows, with their places in it."""
    for part, start in enumerate(starts[:-1]):
        own = rows[(rows >= start) & (rows < starts[part + 1])] - start
        if len(own):
            yield part, own


class StoredRows:
    """A run's rows for the methods (`methods.base.Rows`).

    The first worker on a node copies the rows into a file there, once; all workers of the node map it, so that rows
    beyond memory stream from disk and the page cache is shared.

    Args:
        run: the run.
        encode: manifest of its embeddings.
        features: what to make of them.
        cache: folder for this training's files on this node.
        worker: this worker's number.
        workers: number of workers.
    """

    def __init__(
        self, run: Run, encode: Manifest, features: FeaturesConfig, cache: Path, worker: int = 0, workers: int = 1
    ) -> None:
        self._run, self._cache = run, cache
        self._transform = transform_of(encode, features)
        self._starts = row_starts(encode)
        self._dimension = int(encode.extra["dimension"])
        self._worker, self._workers = worker, workers

    @property
    def count(self) -> int:
        """N."""
        return self._starts[-1]

    @property
    def dimension(self) -> int:
        """D."""
        return self._dimension

    def owned(self) -> None:
        """None: every worker holds all rows."""

    def tensor(self) -> Tensor:
        """Float32[N D], mapped."""
        return torch.from_numpy(self._features())

    def blocks(self) -> Iterator[Tensor]:
        """Float32[B D]s of this worker's contiguous share of the rows."""
        features = self._features()
        first = self.count * self._worker // self._workers
        end = self.count * (self._worker + 1) // self._workers
        for start in range(first, end, BLOCK):
            yield torch.from_numpy(features[start : min(start + BLOCK, end)])

    def neighbors(self) -> Tensor:
        """Int64[N M], mapped."""
        width = tables.read_table(self._run.neighbors(0), ["neighbors"]).schema.field("neighbors").type.list_size

        def fill(array: np.ndarray) -> None:
            for index, start in enumerate(self._starts[:-1]):
                ids = tables.matrix(tables.read_table(self._run.neighbors(index), ["neighbors"])["neighbors"])
                array[start : start + len(ids)] = ids

        return torch.from_numpy(mapped(self._cache / "neighbors.npy", (self.count, width), np.int64, fill))

    def _features(self) -> np.ndarray:
        def fill(array: np.ndarray) -> None:
            for index, start in enumerate(self._starts[:-1]):
                rows = part_features(self._run, index, self._transform)
                array[start : start + len(rows)] = rows

        return mapped(self._cache / "features.npy", (self.count, self.dimension), np.float32, fill)


def mapped(path: Path, shape: tuple[int, ...], dtype: type, fill: Callable[[np.ndarray], None]) -> np.ndarray:
    """An array mapped from a file that is filled by whoever comes first; the others wait.

    Args:
        path: the file; there only once it is whole.
        shape: of the array.
        dtype: of the array.
        fill: writes the array's content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for left in path.parent.glob(f"{path.stem}.*.unfinished"):  # by whoever was killed with the lock
                left.unlink(missing_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
            array = np.lib.format.open_memmap(unfinished, "w+", dtype, shape)
            _reserve(unfinished)
            fill(array)
            array.flush()
            del array
            unfinished.replace(path)
    # Copy-on-write: torch wants writable memory, and nothing written there reaches the file.
    return np.load(path, mmap_mode="c")


def _reserve(path: Path) -> None:
    """Takes all of a file's bytes from the disk: a mapped file that finds it full later kills its process."""
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # this file system cannot
        path.unlink(missing_ok=True)
        raise DataError(
            f"{path}: no space left for the rows of the training; free some, set RAYCLUST_SCRATCH to another disk, or "
            "resources.rows to cells"
        ) from error


def cache_folder(digest: str) -> Path:
    """This user's folder on this node for the files of one training."""
    root = os.environ.get("RAYCLUST_SCRATCH")
    base = Path(root) if root else _own_folder(Path(tempfile.gettempdir()) / f"rayclust-{os.getuid()}")
    return base / "rows" / digest


def _own_folder(path: Path) -> Path:
    """A folder that nobody else can write to, in a place where everybody can make one of that name first."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{path}: belongs to somebody else, or others may write there: set RAYCLUST_SCRATCH")
    return path


def drop_cache(digest: str) -> None:
    """Removes the files of one training from this node."""
    shutil.rmtree(cache_folder(digest), ignore_errors=True)
