"""A stand-in for the cluster: what stages send to workers is done here and now, one piece after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest

from rayclust.runtime import pipeline, tasks
from rayclust.runtime.tasks import Task
from rayclust.stages import assign, counterparts, curate, encode, evaluate, figures, index, label, select_k, train
from rayclust.stages.encode import ReadAndDecode, ShardWriter
from rayclust.stages.select_k import Search, examine


class Metrics:
    """Keeps the rows of metrics that a training reports."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.report = self

    def remote(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Makes every stage do its work in this process, for as long as the patch lasts."""
    for module in (assign, counterparts, curate, evaluate, figures, index, label):
        patch.setattr(module, "run_remotely", lambda function, *arguments, **options: function(*arguments))
    for module in (tasks, encode, train):
        patch.setattr(module, "connect", lambda: None)
    for module in (encode, pipeline):
        patch.setattr(module, "with_gpus", lambda config, kind: config)
    patch.setattr(encode, "worker_count", lambda config, work: 1)
    patch.setattr(tasks, "map_tasks", _map)
    patch.setattr(encode, "map_tasks", _map)
    patch.setattr(encode, "stream", _stream)
    patch.setattr(select_k, "run_trials", _try_all)
    for module in (curate, select_k, train):
        patch.setattr(module, "on_every_node", lambda function, *arguments: function(*arguments))
    patch.setattr(train, "_watch_metrics", lambda stage: nullcontext(Metrics()))
    patch.setattr(
        train, "_fit", lambda job, metrics, storage: train._work({"job": job, "metrics": metrics, "threads": 1})
    )


def _map(function: Callable[[Any], Any], items: Iterable[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
    return ((item, function(item)) for item in items)


def _try_all(search: Search, candidates: Sequence[int], on_change: Callable[[Sequence[int], int], None]) -> None:
    for k in candidates:
        on_change([k], 0)
        marker = search.run.shard_manifest(k, "select-k")
        tasks.run_and_mark(marker, search.task(k), lambda k=k: examine(search, k))
        on_change([], 1)


def _stream(context: Any, todo: Sequence[Task], shapes: Sequence[Any]) -> Iterator[tuple[int, int]]:
    import pyarrow as pa

    writer = ShardWriter(*encode.writer_arguments(context, shapes))
    encoder = encode.EncodeChunks(context.config, [])
    decoder = ReadAndDecode(encode.chunk_rows(context.config), *dict.fromkeys(shape[0] for shape in shapes))
    for item in encode._items(context, todo):
        for chunk in decoder(pa.Table.from_pylist([item])):
            row = chunk.to_pylist()[0]
            embeddings = encoder._embeddings(chunk["pixels"][0], len(row["records"]))
            assert json.loads(row["task"])["index"] in {task.index for task in todo}
            writer.add(row["task"], row["chunk"], row["last"], row["records"], row["rejects"], embeddings)
            yield len(row["records"]), len(row["rejects"])
