"""Progress and timing of a stage: a bar or log lines, `progress.json` and Ray's metrics for others, busy seconds."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from rayclust.errors import DataError
from rayclust.report.formats import duration
from rayclust.store import storage
from rayclust.store.manifest import Section
from rayclust.store.run import Run

logger = logging.getLogger(__name__)

LOG_INTERVAL = 30.0
"""Seconds between lines where there is no terminal."""

FIRST_LINE = 5.0
"""Seconds until the first such line."""

WRITE_INTERVAL = 10.0
"""Seconds between two states of a stage in the run's `progress.json`."""

METRICS = {
    "done": "Units of work that a stage has done",
    "total": "Units of work that a stage has to do",
    "per_second": "Units of work per second since the stage began",
    "rejects": "Images that cannot be used",
    "loss": "Training loss",
}
"""Metrics of Ray, each behind `rayclust_`, with the tags run, stage and unit."""

console = Console(stderr=True)
"""Shared by bars and log lines, so that neither breaks the other."""

Value = TypeVar("Value")

_run: ContextVar[Run | None] = ContextVar("run", default=None)


@contextmanager
def context_value(variable: ContextVar[Value], value: Value) -> Iterator[Value]:
    """Give a context variable a value for the block."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


@contextmanager
def keep_progress(run: Run) -> Iterator[None]:
    """Keep what the stage of the block has done in the run's `progress.json`, which stays where it is interrupted."""
    with context_value(_run, run):
        yield
    storage.remove(run.progress)


@lru_cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(f"rayclust_{name}", METRICS[name], tag_keys=("run", "stage", "unit"))


class Progress:
    """Counter of a stage's work, shown as a bar or as log lines. Thread-safe.

    Args:
        stage: its name.
        unit: of the counts, in the plural: images, rows, steps.
        total: how many there will be; None if unknown.
        done: how many were finished by an earlier run; not counted in the rate.
    """

    def __init__(self, stage: str, unit: str, total: int | None = None, done: int = 0) -> None:
        self.stage, self.unit, self.total = stage, unit, total
        self.done = self._resumed = done
        self.note = ""
        self.measured = dict[str, float]()
        self._run = _run.get()
        self._started = time.monotonic()
        self._last_line = self._started - LOG_INTERVAL + FIRST_LINE
        self._last_write = self._started - WRITE_INTERVAL + FIRST_LINE
        self._lock = threading.Lock()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn(f"{stage:<10}"),
                BarColumn(bar_width=32),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(stage, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar:
            self._bar.stop()
        if any(failure):
            self._write()

    def advance(self, count: int = 0, note: str | None = None, **measured: float) -> None:
        """Count `count` more as done; `note` is shown beside them. What is measured goes to Ray's metrics."""
        with self._lock:
            self.done += count
            self.measured |= measured
            self._show(note)

    def more(self, count: int, done: int = 0) -> None:
        """Add to the total; `done` of the new ones were finished by an earlier run."""
        with self._lock:
            self.total = (self.total or 0) + count
            self.done += done
            self._resumed += done
            self._show(None)

    def show_metrics(self, row: dict[str, Any]) -> None:
        """Show a row of a training's metrics: its step, the number of steps where it is known, and its loss."""
        with self._lock:
            self.done, self.total, note = int(row.get("step", 0)), row.get("steps", self.total), ""
            if row.get("loss") is not None:
                self.measured["loss"] = float(row["loss"])
                note = f"loss {self.measured['loss']:.4f}"
            self._show(note)

    def rate(self) -> float:
        """Return units per second since the stage began, without those of earlier runs."""
        return (self.done - self._resumed) / max(time.monotonic() - self._started, 1e-9)

    def _show(self, note: str | None) -> None:
        self.note = self.note if note is None else note
        now, rate = time.monotonic(), self.rate()
        speed = f"{60 * rate:.2g} {self.unit}/min" if 0 < rate < 1 else f"{rate:,.0f} {self.unit}/s"
        shown = speed + (f", {self.note}" if self.note else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total, note=shown)
        elif now - self._last_line >= LOG_INTERVAL:
            self._last_line = now
            done, left = f"{self.done:,}", ""
            if self.total is not None:
                done += f" of {self.total:,}"
                left = f", {duration((self.total - self.done) / rate)} left" if self.done > self._resumed else ""
            logger.info("%s: %s %s, %s%s", self.stage, done, self.unit, shown, left)
        if now - self._last_write >= WRITE_INTERVAL:
            self._last_write = now
            self._write()

    def _write(self) -> None:
        """Write what is done to the run and to Ray's metrics, where a stage of a run is under way."""
        if self._run is None:
            return
        facts = {"done": self.done, "total": self.total, "per_second": round(self.rate(), 3), **self.measured}
        try:
            content = {"stage": self.stage, "unit": self.unit, "note": self.note, **facts}
            storage.write_json(self._run.progress, content)
        except DataError as error:  # the work goes on, and the next one may be written
            logger.debug("progress: not written: %s", error)
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            tags = {"run": self._run.uri, "stage": self.stage, "unit": self.unit}
            for name in METRICS.keys() & facts.keys():
                value = facts[name]
                if value is not None:
                    _gauge(name).set(float(value), tags=tags)


@dataclass
class Timing:
    """Busy seconds of a group of workers while it runs; the manifest keeps them as a `Section`, outside every digest.

    They are measured in the workers, around whole chunks and tasks.
    """

    name: str
    workers: int = 0
    """0: as many as were seen."""
    unit: str = "rows"
    seconds: float = 0.0
    done: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def add(self, kind: str, seconds: float, worker: str) -> None:
        """Count seconds that a worker was busy with one kind of work."""
        self.busy[kind] = self.busy.get(kind, 0.0) + seconds
        self.seen.add(worker)

    def section(self) -> Section:
        """Return it as the manifest keeps it."""
        return Section(
            name=self.name,
            workers=self.workers or len(self.seen),
            seconds=round(self.seconds, 3),
            busy={kind: round(seconds, 3) for kind, seconds in sorted(self.busy.items())},
            done=self.done,
            unit=self.unit,
        )


stage_timings: ContextVar[list[Timing] | None] = ContextVar("stage_timings", default=None)
"""Gets the timings of the stage under way; None outside of a stage, where nobody reads them."""


@contextmanager
def timed_section(name: str, workers: int = 0, unit: str = "rows") -> Iterator[Timing]:
    """Measure a group of workers while the block runs; a timing of the same name is continued.

    0 workers count those that were seen; `unit` is that of the counts.
    """
    timings = stage_timings.get()
    timing = next((timing for timing in timings or [] if timing.name == name), None) or Timing(name, workers, unit)
    if timings is not None and timing not in timings:
        timings.append(timing)
    started = time.monotonic()
    try:
        yield timing
    finally:
        timing.seconds += time.monotonic() - started


def worker_name() -> str:
    """Return host and process id, which name this process within the cluster."""
    return f"{socket.gethostname()}:{os.getpid()}"


class MetricsActor:
    """Ray actor to which worker 0 of a training reports its newest row of metrics; here, because it needs no torch."""

    _row: dict[str, Any] | None = None

    def report(self, row: dict[str, Any]) -> None:
        """Replace the row."""
        self._row = row

    def latest(self) -> dict[str, Any] | None:
        """Return the newest row."""
        return self._row


@lru_cache(1)
def _metrics_actor(name: str) -> Any:
    import ray

    return ray.get_actor(name)


def _send(name: str, row: dict[str, Any]) -> None:
    with suppress(ValueError):  # nobody looks yet
        _metrics_actor(name).report.remote(row)


@contextmanager
def watch_metrics(progress: Progress) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what sends a worker's rows of metrics here, where a thread shows the newest until the block ends.

    A block that is over within a second starts no actor, which would take the process that Ray has ready for a task.
    """
    import ray

    name, over = f"rayclust-metrics-{uuid4().hex}", threading.Event()

    def follow() -> None:
        metrics = None
        while not over.wait(1.0):
            try:
                if metrics is None:
                    metrics = ray.remote(num_cpus=0, max_restarts=-1)(MetricsActor).options(name=name).remote()
                row = ray.get(metrics.latest.remote(), timeout=5)
            except ray.exceptions.RayError:
                continue
            if row:
                progress.show_metrics(row)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield partial(_send, name)
    finally:
        over.set()
        thread.join(timeout=5)
