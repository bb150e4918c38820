"""Accidents at the seam between rayclust and its storage, each decided by a seed and the number of an operation.

A run's process is killed by an exception that nothing catches, after which its storage answers nobody: what a real
`SIGKILL` leaves on the disk is left here too, among it half of a temporary file.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayclust.store import failures, lock, storage

CHANGES = ("write_bytes", "remove", "remove_tree")
"""Operations that change the storage, each a moment at which a process can end."""
LOOKS = ("stat", "exists", "read_bytes", "open_input", "local_copy", "walk")


class Killed(BaseException):
    """The process is no more."""


@dataclass(frozen=True)
class Fault:
    """One accident."""

    kind: str
    """before, after, torn: killed before or after an operation, or in the middle of it; full: no space left."""
    at: int
    """Number of the operation, from 0."""


class Recorder:
    """Counts operations that change the storage, and has one accident."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault, self.count, self.is_dead = fault, 0, False
        self._lock = threading.Lock()

    def change(self, name: str, real: Callable[..., Any], target: str, *arguments: Any) -> Any:
        """One operation that changes the storage."""
        if target.endswith("lease.json"):
            return real(target, *arguments)  # its beats come by the clock, not by what a run does
        with self._lock:
            self.look()
            is_now = self.fault is not None and self.count == self.fault.at
            self.count += 1
            if not is_now or self.fault is None:
                return real(target, *arguments)
            if self.fault.kind == "full":
                error = OSError(errno.ENOSPC, "No space left on device")
                raise failures.translate(error, target, "write") from error
            if self.fault.kind == "torn":
                _half(name, target, arguments)
            if self.fault.kind == "after":
                real(target, *arguments)
            self.is_dead = True
            raise Killed

    def look(self) -> None:
        """A dead process asks for nothing."""
        if self.is_dead:
            raise Killed


def _half(name: str, target: str, arguments: tuple[Any, ...]) -> None:
    """What a process killed in the middle of an operation leaves."""
    path = storage.to_path(target)
    if name == "write_bytes":
        path.parent.mkdir(parents=True, exist_ok=True)
        data: bytes = arguments[0]
        (path.parent / f"{storage.temporary_prefix(path)}999999999-0.tmp").write_bytes(data[: len(data) // 2])
    elif name == "remove_tree" and path.is_dir():
        for file in sorted(found for found in path.rglob("*") if found.is_file())[::2]:
            file.unlink()


@contextmanager
def storage_with(fault: Fault | None) -> Iterator[Recorder]:
    """Storage that has an accident; ends as the process does: by `Killed`, by an error, or well."""
    recorder = Recorder(fault)
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(storage, name, partial(recorder.change, name, getattr(storage, name)))
        for name in LOOKS:
            patch.setattr(storage, name, _looking(recorder, getattr(storage, name)))
        yield recorder
        lock._held.clear()


def _looking(recorder: Recorder, real: Callable[..., Any]) -> Callable[..., Any]:
    def look(*arguments: Any, **named: Any) -> Any:
        recorder.look()
        return real(*arguments, **named)

    return look


_WITH_TIMES = ("manifests/", "tensorboard/", "tracking.json", "progress.json")
DAMAGES = ("cut", "flipped", "zeros", "empty", "gone", "folder gone")


def damage(run: Path, draw: random.Random, kind: str | None = None) -> str:
    """Does harm to one file below a run that is at rest; says what was done to which."""
    files = sorted(found for found in run.rglob("*") if found.is_file() and found.name != "lease.json")
    if not files:
        return "nothing there to harm"
    path, kind = draw.choice(files), kind or draw.choice(DAMAGES)
    data = path.read_bytes()
    position = draw.randrange(len(data)) if data else 0
    if kind == "cut":
        path.write_bytes(data[:position])
    elif kind == "flipped":
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << draw.randrange(8)]) + data[position + 1 :])
    elif kind == "zeros":
        end = min(len(data), position + 64)
        path.write_bytes(data[:position] + bytes(end - position) + data[end:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "gone" or path.parent == run:
        path.unlink()
    else:
        shutil.rmtree(path.parent)
    return f"{path.relative_to(run)}: {kind} at {position}"


def rot(path: Path) -> bytes:
    """Turns a bit of a file behind everybody's back: size and times stay. Gives what was there."""
    data, found = path.read_bytes(), path.stat()
    at = _last_value(path) if path.suffix == ".parquet" else len(data) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    return data


def _last_value(path: Path) -> int:
    """A byte that every reader reads: of embeddings, neighbours or clusters, else of the first column."""
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    wanted = ("embedding.", "neighbors.", "cluster")
    column = next((column for column in columns if column.path_in_schema.startswith(wanted)), columns[0])
    return int(column.data_page_offset + column.total_compressed_size - 2)


def unseal(run: Path, stage: str) -> None:
    """A stage counts as never begun."""
    (run / "manifests" / f"{stage}.json").unlink()
    shutil.rmtree(run / "manifests" / stage, ignore_errors=True)


def artefacts(run: str) -> dict[str, bytes]:
    """What a run is for: every file but manifests (which hold times), TensorBoard, its lease and its config."""
    found = {}
    for file in storage.walk(run):
        if file.key not in ("lease.json", "config.json") and not file.key.startswith(_WITH_TIMES):
            found[file.key] = storage.read_bytes(file.uri)
    return found
