"""Where a stage's time goes: groups of workers and the seconds that they were busy, for `status`.

Measured in the workers, around whole chunks and parts; kept in the manifest beside `seconds`, outside every digest.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from rayclust.store.manifest import Section

_open: ContextVar[list[Measured] | None] = ContextVar("open", default=None)


@dataclass
class Measured:
    """A section while it is being measured; see `Section`."""

    name: str
    workers: int = 0
    """0: as many as were seen."""
    unit: str = "rows"
    seconds: float = 0.0
    done: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def add(self, kind: str, seconds: float, worker: str) -> None:
        """Counts what a worker was busy with."""
        self.busy[kind] = self.busy.get(kind, 0.0) + seconds
        self.seen.add(worker)

    def sealed(self) -> Section:
        """As the manifest keeps it."""
        busy = {kind: round(seconds, 3) for kind, seconds in sorted(self.busy.items())}
        return Section(
            name=self.name,
            workers=self.workers or len(self.seen),
            seconds=round(self.seconds, 3),
            busy=busy,
            done=self.done,
            unit=self.unit,
        )


@contextmanager
def measuring() -> Iterator[list[Measured]]:
    """Collects the sections of a stage."""
    found: list[Measured] = []
    token = _open.set(found)
    try:
        yield found
    finally:
        _open.reset(token)


@contextmanager
def section(name: str, workers: int = 0, unit: str = "rows") -> Iterator[Measured]:
    """Measures a group of workers for as long as it is open; one of the same name goes on."""
    measured, started = current(name, workers, unit), time.monotonic()
    try:
        yield measured
    finally:
        measured.seconds += time.monotonic() - started


def current(name: str, workers: int = 0, unit: str = "rows") -> Measured:
    """The section of a name; outside of `measuring` one that nobody reads."""
    found = _open.get()
    for measured in found or []:
        if measured.name == name:
            return measured
    measured = Measured(name, workers, unit)
    if found is not None:
        found.append(measured)
    return measured


def worker_name() -> str:
    """This process among those of the cluster."""
    return f"{socket.gethostname()}:{os.getpid()}"
