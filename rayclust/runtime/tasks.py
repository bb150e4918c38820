"""Run the work of a stage as resumable tasks: each writes its mark last, and a marked task is not done again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from rayclust.errors import ArtefactError
from rayclust.runtime.cluster import (
    connect,
    cpus,
    free_cached_memory,
    in_driver,
    live_nodes,
    plain_errors,
    task_options,
    threads,
)
from rayclust.runtime.progress import Progress, timed_section, worker_name
from rayclust.store import manifest, storage
from rayclust.store.manifest import FileListing, Outputs, digest_of
from rayclust.store.run import Run
from rayclust.store.storage import MissingError

logger = logging.getLogger(__name__)

STORAGE_THREADS = 16
"""Concurrent requests when many small objects are read or written."""
TASK_ROWS = 2048
"""Rows of the smallest task of a search; larger sets take N / 64, so that each task's pass over all rows is worth its
reading."""
TASK_BYTES = 2**28
"""Most bytes of such a task's rows in float16 and their neighbours: beyond, there are more tasks."""
TASKS, LARGEST_TASK_BYTES = 4096, 2**30
"""Beyond so many tasks they grow again, up to so many bytes: their files are read by each other."""

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    """Files that a task wrote, and its counts."""

    outputs: Outputs = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


OnResult = Callable[[Task, TaskResult], None]
"""Callback for each finished task, in completion order. May run twice for one task; pop bulky fields from `extra` here
so that the driver does not keep them."""


def search_task_rows(count: int, width: int, k: int) -> int:
    """Return the rows of a task that searches neighbours, from N, D and k alone."""
    row_bytes = 2 * width + 8 * (k + 1)
    most = min(max(TASK_BYTES, count * row_bytes // TASKS), LARGEST_TASK_BYTES)
    return max(TASK_ROWS, min(count // 64, most // row_bytes))


def group_parts(parts: Sequence[int], digest: str, wanted: int) -> list[Task]:
    """Make tasks of consecutive parts with at least `wanted` rows each, the same for any number of workers.

    Args:
        parts: rows of each part.
        digest: of everything that the results depend on.
        wanted: rows of a task.

    Returns:
        Tasks whose payload is the indexes of their parts, a tuple.
    """
    tasks: list[Task] = []
    group: list[int] = []
    rows = 0
    for index, count in enumerate(parts):
        group.append(index)
        rows += count
        if rows >= wanted or index == len(parts) - 1:
            tasks.append(Task(len(tasks), digest_of([digest, group]), tuple(group), rows))
            group, rows = [], 0
    return tasks


def read_mark(uri: str) -> tuple[str, TaskResult] | None:
    """Return digest and result of a finished task; None if there is no mark or it is damaged."""
    try:
        mark = manifest.read_checked(uri)
        return mark["digest"], TaskResult(mark["outputs"], mark["counts"], mark["extra"])
    except (MissingError, ArtefactError, KeyError, TypeError):
        return None


def write_mark(uri: str, task: Task, result: TaskResult) -> None:
    """Write the mark of a finished task; call it after all of the task's outputs are written."""
    content = {"digest": task.digest, "outputs": result.outputs, "counts": result.counts, "extra": result.extra}
    manifest.write_checked(uri, content)


def run_and_mark(uri: str, task: Task, work: Callable[[], TaskResult]) -> TaskResult:
    """Do a task's work and write its mark at `uri`.

    A mark of other work is removed first: outputs that this work has half overwritten would pass for whole if the old
    settings came back.
    """
    mark = read_mark(uri)
    if mark is not None and mark[0] != task.digest:
        storage.remove(uri)
    result = work()
    write_mark(uri, task, result)
    return result


def finished_tasks(
    run: Run, stage: str, tasks: Sequence[Task], on_result: OnResult | None = None
) -> dict[int, TaskResult]:
    """Return results, by index, of the tasks whose mark matches and whose outputs are all there.

    `on_result` is called for each of them.
    """
    listing, results = FileListing(run), dict[int, TaskResult]()
    uris = [run.mark(task.index, stage) for task in tasks]
    with ThreadPoolExecutor(STORAGE_THREADS) as threads:
        for task, mark in zip(tasks, threads.map(read_mark, uris), strict=True):
            if mark is None or mark[0] != task.digest:
                continue
            result = mark[1]
            if listing.has_all(result.outputs):
                if on_result is not None:
                    on_result(task, result)
                results[task.index] = result
    return results


def run_tasks(
    run: Run,
    stage: str,
    tasks: Sequence[Task],
    function: Callable[[Task], TaskResult],
    on_result: OnResult | None = None,
    section: str = "parts",
    *,
    gpus: float = 0,
) -> list[TaskResult]:
    """Run the tasks that have no mark on the cluster, small ones in the driver, and mark each as it ends.

    Args:
        run: holds marks and outputs.
        stage: name, for the marks and the progress.
        tasks: the whole work, in order of index.
        function: does one task; runs in a Ray worker with one CPU.
        on_result: called once for each task.
        section: name of the timing, where a stage has several kinds of tasks; shown beside its progress.
        gpus: of each task; its worker sees no others.

    Returns:
        All results, those of earlier calls among them, in the order of `tasks`.
    """
    results = finished_tasks(run, stage, tasks, on_result)
    todo = [task for task in tasks if task.index not in results]
    report_resume(stage, len(tasks), len(results))

    def timed(task: Task) -> tuple[TaskResult, float, str]:
        started = time.monotonic()
        result = run_and_mark(run.mark(task.index, stage), task, lambda: function(task))
        if gpus:
            free_cached_memory()
        return result, time.monotonic() - started, worker_name()

    if todo:
        if not in_driver():
            connect()
        done = sum(task.size for task in tasks if task.index in results)
        bar = Progress(stage, "rows", sum(task.size for task in tasks), done)
        with bar, timed_section(section) as timing:
            bar.advance(note=section if section != "parts" else None)
            for task, (result, seconds, worker) in map_tasks(timed, todo, gpus=gpus):
                timing.add("working", seconds, worker)
                if on_result is not None:
                    on_result(task, result)
                results[task.index] = result
                bar.advance(task.size)
                timing.done += result.counts.get("rows", task.size)  # the rows of a table may not be known beforehand
    return [results[task.index] for task in tasks]


def report_resume(stage: str, total: int, done: int) -> None:
    """Log how many tasks an earlier call has left to do."""
    if done:
        logger.info("%s: %d of %d parts were finished before, %d left", stage, done, total, total - done)


def map_tasks(
    function: Callable[[Item], Result], items: Iterable[Item], *, in_order: bool = False, gpus: float = 0
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with `function(item)`, computed by Ray tasks of one CPU each, and some GPUs, or in the driver.

    Args:
        function: runs in a Ray worker; must give the same result if it runs twice.
        items: taken as they are needed: two per CPU, or per share of GPUs, are under way, so that none waits and the
            driver stays small.
        in_order: yield in the order of `items`, else as results come.
        gpus: of each task.
    """
    if in_driver():
        for item in items:
            with threads(1):
                result = function(item)
            yield item, result
        return
    import ray

    options, labels = task_options(gpus)
    # max_calls: by default Ray starts a process for every task with a GPU, seconds each.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=5, max_calls=0, **options)(function)
    waiting, running = iter(items), dict[Any, Item]()
    with plain_errors():
        while True:
            at_once = cpus(labels) if not gpus else int(sum(node.get("GPU", 0) for node in live_nodes(labels)) / gpus)
            for item in islice(waiting, max(0, 2 * max(1, at_once) - len(running))):  # a cluster may shrink
                running[remote.remote(item)] = item
            if not running:
                return
            ready = [next(iter(running))] if in_order else ray.wait(list(running), num_returns=1, timeout=60)[0]
            for reference in ready:
                result = ray.get(reference)
                yield running.pop(reference), result
