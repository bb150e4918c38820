"""Scratch files of the join over inverted lists: records, read in ranges, and arrays, read whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
from torch import Tensor

from rayclust.errors import ArtefactError
from rayclust.stages.outputs import Outputs, put_bytes
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.manifest import read_unchanged

THREADS = 16
"""Ranges that a worker reads at once."""
_BOUND = np.dtype("<i8")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Layout:
    """Where the rows of a join lie: in parts, in groups of parts, and in shards of equally many rows."""

    run: Run
    digest: str
    """The stage's."""
    starts: Sequence[int]
    """First row of each part, and N."""
    groups: Sequence[tuple[int, ...]]
    """Consecutive parts of each group."""
    shard_rows: int
    """Rows of each shard but the last."""
    width: int
    """D."""
    k: int

    @property
    def count(self) -> int:
        """N."""
        return self.starts[-1]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_rows)

    def span(self, group: int) -> tuple[int, int]:
        """The first row of a group, and the one behind its last."""
        parts = self.groups[group]
        return self.starts[parts[0]], self.starts[parts[-1] + 1]

    def places(self, shard: int) -> tuple[int, int]:
        """The first place of a shard in the order of the lists, and the one behind its last."""
        return shard * self.shard_rows, min(self.count, (shard + 1) * self.shard_rows)

    def at(self, kind: str, index: int = 0) -> str:
        """A scratch file: of a group (sorted, nearest), of a shard (shard, found), or of all (centers, lists)."""
        return self.run.at("neighbors", "scratch", self.digest, f"{kind}-{index:05d}")


def row_records(width: int) -> np.dtype[Any]:
    """A row's number and its unit features."""
    return np.dtype([("row", "<i8"), ("unit", "<f2", (width,))])


def found_records(k: int) -> np.dtype[Any]:
    """A row's number and the keys of its neighbours, as `packed.pack` makes them."""
    return np.dtype([("row", "<i8"), ("keys", "<i8", (k,))])


def put_records(run: Run, uri: str, records: np.ndarray, bounds: np.ndarray | None = None) -> Outputs:
    """Writes records behind the bounds of their groups.

    Args:
        run: the run.
        uri: the file, below the run.
        records: of `row_records` or `found_records`, sorted by group.
        bounds: Int64[G + 1], the first record of each group, and their number; None where there are no groups.
    """
    head = b"" if bounds is None else bounds.astype(_BOUND).tobytes()
    return put_bytes(run, uri, b"".join([head, records.tobytes()]))


def read_bounds(uri: str, first: int, last: int) -> np.ndarray:
    """Int64[last − first + 1]: where the groups `first` … `last` − 1 begin, and where the last of them ends.

    Raises:
        ArtefactError: the file is shorter than that.
    """
    return _range(uri, _BOUND, 0, first, last + 1)


def read_records(uri: str, kind: np.dtype[Any], start: int, end: int, groups: int | None = None) -> np.ndarray:
    """Records `start` … `end` − 1 of a file.

    Args:
        uri: the file.
        kind: of its records.
        start: the first.
        end: behind the last.
        groups: G of the bounds before the records; None where there are none.

    Raises:
        ArtefactError: the file is shorter than that.
    """
    head = 0 if groups is None else (groups + 1) * _BOUND.itemsize
    return _range(uri, kind, head, start, end) if end > start else np.empty(0, kind)


def _range(uri: str, kind: np.dtype[Any], head: int, start: int, end: int) -> np.ndarray:
    data = filesystem.read_range(uri, head + start * kind.itemsize, head + end * kind.itemsize)
    if len(data) != (end - start) * kind.itemsize:
        raise ArtefactError(f"{uri}: is shorter than was written; remove it and run `rayclust neighbors RUN.yaml`")
    return np.frombuffer(data, kind)


def put_tensors(run: Run, uri: str, tensors: Mapping[str, Tensor]) -> Outputs:
    """Writes arrays by name."""
    return put_bytes(run, uri, safetensors.torch.save({name: own.contiguous() for name, own in tensors.items()}))


def read_tensors(uri: str, digest: str) -> dict[str, Tensor]:
    """Arrays by name.

    Raises:
        ArtefactError: the file's SHA-256 is not `digest`.
    """
    return safetensors.torch.load(read_unchanged(uri, digest, "neighbors"))


kept_tensors = lru_cache(1)(read_tensors)
"""The same for a file that a worker reads for each of its units."""


def at_once(function: Callable[[int], _T], items: Iterable[int]) -> list[_T]:
    """The function's results for some items, in their order, several at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(function, items))
