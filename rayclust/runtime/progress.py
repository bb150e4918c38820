"""Progress of a stage: a bar on a terminal, a line every 30 s in a log."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from rayclust.store.manifest import Section

logger = logging.getLogger(__name__)

LOG_INTERVAL = 30.0
"""Seconds between lines where there is no terminal."""


console = Console(stderr=True)
"""Bars and log lines share it, so that neither tears the other."""


class Progress:
    """Counts what a stage has done and shows it. Safe to call from several threads.

    Args:
        stage: name of the stage.
        unit: what is counted, in the plural: images, rows, steps.
        total: how many there will be; None when that is not known.
        done: how many were finished by an earlier run; not counted in the rate.
    """

    def __init__(self, stage: str, unit: str, total: int | None = None, done: int = 0) -> None:
        self.stage, self.unit, self.total = stage, unit, total
        self.done = self._resumed = done
        self.note = ""
        self._started = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._bar = _bar(stage) if sys.stderr.isatty() else None
        self._task = self._bar.add_task(stage, total=total, completed=done, note="") if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 0, note: str | None = None) -> None:
        """Counts `count` more units done; `note` is shown beside them, such as the number of rejects."""
        with self._lock:
            self.done += count
            self._show(note)

    def more(self, count: int, done: int = 0) -> None:
        """Adds units to the total, some of which an earlier run has finished."""
        with self._lock:
            self.total = (self.total or 0) + count
            self.done += done
            self._resumed += done
            self._show(None)

    def at(self, done: int, total: int | None = None, note: str | None = None) -> None:
        """Sets the number done, and the total if it has become known."""
        with self._lock:
            self.done = done
            self.total = total if total is not None else self.total
            self._show(note)

    def rate(self) -> float:
        """Units per second since the stage began, those of earlier runs left out."""
        return (self.done - self._resumed) / max(time.monotonic() - self._started, 1e-9)

    def _show(self, note: str | None) -> None:
        self.note = self.note if note is None else note
        shown = self._speed() + (f", {self.note}" if self.note else "")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, note=shown)
        elif time.monotonic() - self._last_line >= LOG_INTERVAL:
            self._last_line = time.monotonic()
            logger.info("%s: %s %s, %s%s", self.stage, self._fraction(), self.unit, shown, self._left())

    def _speed(self) -> str:
        rate = self.rate()
        return f"{60 * rate:.2g} {self.unit}/min" if 0 < rate < 1 else f"{rate:,.0f} {self.unit}/s"

    def _fraction(self) -> str:
        return f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"

    def _left(self) -> str:
        if self.total is None or self.done <= self._resumed:
            return ""
        return f", {duration((self.total - self.done) / self.rate())} left"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _bar(stage: str) -> RichProgress:
    return RichProgress(
        TextColumn(f"{stage:<10}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


# Where a stage's time goes: groups of workers and the seconds that they were busy, for `status`.
#
# Measured in the workers, around whole chunks and parts; kept in the manifest beside `seconds`, outside every digest.


_open: ContextVar[list[Timing] | None] = ContextVar("open", default=None)


@dataclass
class Timing:
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
def collect_timings() -> Iterator[list[Timing]]:
    """Collects the sections of a stage."""
    found: list[Timing] = []
    token = _open.set(found)
    try:
        yield found
    finally:
        _open.reset(token)


@contextmanager
def timed_section(name: str, workers: int = 0, unit: str = "rows") -> Iterator[Timing]:
    """Measures a group of workers for as long as it is open; one of the same name goes on."""
    measured, started = current_timing(name, workers, unit), time.monotonic()
    try:
        yield measured
    finally:
        measured.seconds += time.monotonic() - started


def current_timing(name: str, workers: int = 0, unit: str = "rows") -> Timing:
    """The section of a name; outside of `measuring` one that nobody reads."""
    found = _open.get()
    for measured in found or []:
        if measured.name == name:
            return measured
    measured = Timing(name, workers, unit)
    if found is not None:
        found.append(measured)
    return measured


def worker_name() -> str:
    """This process among those of the cluster."""
    return f"{socket.gethostname()}:{os.getpid()}"
