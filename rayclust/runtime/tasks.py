"""A stage's work in units that finish one by one: each leaves a marker last, and a marked unit is not done again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rayclust.errors import ArtefactError
from rayclust.runtime import progress
from rayclust.runtime.artefacts import FileListing, Outputs
from rayclust.runtime.cluster import connect, cpus, label_selector, plain_errors, task_labels
from rayclust.runtime.progress import Progress
from rayclust.store import checked, filesystem
from rayclust.store.filesystem import MissingError
from rayclust.store.layout import Run

logger = logging.getLogger(__name__)

STORAGE_THREADS = 16
"""Requests under way at once when many small objects are read or written."""


@dataclass(frozen=True)
class Task:
    """One piece of a stage's work."""

    index: int
    digest: str
    """Of everything that its result depends on."""
    payload: Any = None
    size: int = 1
    """Rows or images in it, for the progress."""


@dataclass
class TaskResult:
    """What a unit wrote and counted."""

    outputs: Outputs = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


OnResult = Callable[[Task, TaskResult], None]
"""Sees a unit's result as soon as the driver has it, in any order, and more than once where markers are read again.
What it takes out of `extra` need not be kept for every unit until the last has ended."""


def read_mark(uri: str) -> tuple[str, TaskResult] | None:
    """The digest and result in a marker; None where there is none or it is damaged."""
    try:
        marker = checked.read(uri)
        return marker["digest"], TaskResult(marker["outputs"], marker["counts"], marker["extra"])
    except (MissingError, ArtefactError, KeyError, TypeError):
        return None


def write_mark(uri: str, unit: Task, result: TaskResult) -> None:
    """Writes a unit's marker, after everything that it vouches for."""
    content = {"digest": unit.digest, "outputs": result.outputs, "counts": result.counts, "extra": result.extra}
    checked.write(uri, content)


def run_and_mark(uri: str, unit: Task, work: Callable[[], TaskResult]) -> TaskResult:
    """Does a unit's work and marks it at `uri`.

    A marker of other work goes first: its part, overwritten by half of this work, would pass for whole if its settings
    came back.
    """
    marker = read_mark(uri)
    if marker is not None and marker[0] != unit.digest:
        filesystem.remove(uri)
    result = work()
    write_mark(uri, unit, result)
    return result


def done_marks(run: Run, stage: str) -> list[tuple[int, str]]:
    """Index and digest of every unit that a stage has marked, whatever it was done for."""
    files = filesystem.walk(run.at("manifests", stage), suffixes=(".json",), missing_ok=True)
    read = [(int(file.key[5:-5]), read_mark(file.uri)) for file in files if file.key.startswith("part-")]
    return [(index, marker[0]) for index, marker in read if marker is not None]


def finished_tasks(run: Run, stage: str, units: Sequence[Task], take: OnResult | None = None) -> dict[int, TaskResult]:
    """Results, by index, of the units whose markers match and whose outputs are all there; `take` sees each."""

    def read(unit: Task) -> TaskResult | None:
        marker = read_mark(run.shard_manifest(unit.index, stage))
        return marker[1] if marker and marker[0] == unit.digest else None

    listing, results = FileListing(run), dict[int, TaskResult]()
    with ThreadPoolExecutor(STORAGE_THREADS) as threads:
        for unit, result in zip(units, threads.map(read, units), strict=True):
            if result is not None and all(listing.has(path, written) for path, written in result.outputs.items()):
                if take is not None:
                    take(unit, result)
                results[unit.index] = result
    return results


def run_tasks(
    run: Run,
    stage: str,
    units: Sequence[Task],
    function: Callable[[Task], TaskResult],
    take: OnResult | None = None,
    section: str = "parts",
) -> list[TaskResult]:
    """Runs the units that are not marked, over the cluster, and marks each as it ends.

    Args:
        run: where markers and outputs lie.
        stage: name, for the markers and the progress.
        units: the whole work, in order of index.
        function: does one unit; runs in a Ray worker with one CPU.
        take: sees each result, once in a call.
        section: of the stage's time, where a stage has several kinds of units; shown beside its progress.

    Returns:
        All results, those of earlier runs among them, in the order of `units`.
    """
    results = finished_tasks(run, stage, units, take)
    todo = [unit for unit in units if unit.index not in results]
    report_resume(stage, len(units), len(results))
    if todo:
        connect()
        done = sum(unit.size for unit in units if unit.index in results)
        with (
            Progress(stage, "rows", sum(unit.size for unit in units), done) as bar,
            progress.timed_section(section) as measured,
        ):
            bar.advance(note=section if section != "parts" else None)
            for unit, result in _submit(run, stage, todo, function, section):
                if take is not None:
                    take(unit, result)
                results[unit.index] = result
                bar.advance(unit.size)
                measured.done += result.counts.get("rows", unit.size)  # a table may not say its rows beforehand
    return [results[unit.index] for unit in units]


def report_resume(stage: str, total: int, done: int) -> None:
    """Says in the log what an earlier run has left to do."""
    if done:
        logger.info("%s: %d of %d parts were finished before, %d left", stage, done, total, total - done)


def _submit(
    run: Run, stage: str, units: Iterable[Task], function: Callable[[Task], TaskResult], section: str
) -> Iterator[tuple[Task, TaskResult]]:
    import ray

    labels = task_labels()

    @ray.remote(num_cpus=1, max_retries=5, **label_selector("tasks", labels))
    def work(unit: Task, marker: str) -> tuple[TaskResult, float, str]:
        started = time.monotonic()
        result = run_and_mark(marker, unit, lambda: function(unit))
        return result, time.monotonic() - started, progress.worker_name()

    waiting = iter(units)
    running: dict[Any, Task] = {}
    with plain_errors():
        while True:
            # A few more than there are CPUs, so that none waits for the driver; never all, so that it stays small.
            for unit in islice(waiting, max(0, 2 * cpus(labels) - len(running))):  # a cluster may shrink
                running[work.remote(unit, run.shard_manifest(unit.index, stage))] = unit
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1, timeout=60)
            for reference in ready:
                result, seconds, worker = ray.get(reference)
                progress.current_timing(section).add("working", seconds, worker)
                yield running.pop(reference), result
