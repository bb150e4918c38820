"""encode: images to embeddings, one part per input shard.

Ray Data carries chunks of raw bytes through decoding actors on CPUs to encoder actors on GPUs (or CPUs); writers gather
each shard's chunks and seal the shard. Tables of ready embeddings are taken over shard by shard instead. A shard whose
marker matches is not done again. Rows are numbered once all counts are known.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from rayclust.config import RunConfig
from rayclust.encoders.decode import Preprocess
from rayclust.errors import ArtefactError, DataError
from rayclust.stages.cluster import connect, cpus, plain_errors
from rayclust.stages.encode_stream import stream
from rayclust.stages.inputs import input_shards
from rayclust.stages.models import encoder_shape
from rayclust.stages.outputs import drop_stale_parts
from rayclust.stages.pipeline import StageContext, StageResult
from rayclust.stages.placing import selector, task_labels
from rayclust.stages.progress import Progress
from rayclust.stages.shards import Moments, MomentsInOrder, renumber, write_shard
from rayclust.stages.units import Unit, UnitResult, finished, report_resume, run_units
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.sources import read_rows

logger = logging.getLogger(__name__)

ROUNDS = 3
"""Passes over unfinished shards without any progress after which the stage gives up."""


def run(context: StageContext) -> StageResult:
    """Encodes what is not encoded yet, numbers the rows, and totals the counts."""
    config, listed = context.config, context.plan
    units = [
        Unit(shard.index, digest, shard, shard.count or 1)
        for shard, digest in zip(listed.shards, listed.digests, strict=True)
    ]
    for folder in (context.run.embeddings_folder, context.run.rejects_folder):
        drop_stale_parts(folder, len(units))
    work = _import_rows if listed.shards[0].has_embeddings else _encode_images
    moments = MomentsInOrder()
    results = work(context, units, moments)
    filesystem.remove_tree(context.run.at("manifests", "encode-inputs"))
    _check_rejects(config, results)
    results = _number_rows(context.run, results)
    return _sealed(results, moments.sum)


def _import_rows(context: StageContext, units: list[Unit], moments: MomentsInOrder) -> list[UnitResult]:
    run, width = context.run, _first_width(context.config)

    def take_over(unit: Unit) -> UnitResult:
        from rayclust.encoders.weights import load_tensors

        rows = read_rows(unit.payload, load_tensors=load_tensors, width=width)
        records = [
            {"key": key, "uri": uri, "label": label}
            for key, uri, label in zip(rows.keys, rows.uris, rows.labels, strict=True)
        ]
        return write_shard(run, unit, unit.payload.first, records, rows.embeddings, rows.rejects)

    return run_units(run, "encode", units, take_over, take=moments.take)


def _first_width(config: RunConfig) -> int:
    """Columns of the first table that can be read: all others must be as wide."""
    from rayclust.encoders.weights import load_tensors

    for shard in input_shards(config):
        rows = read_rows(shard, load_tensors=load_tensors)
        if len(rows.keys):
            return int(rows.embeddings.shape[1])
    raise DataError(f"images.uri = {config.images.uri}: no table there holds a usable embedding")


def _encode_images(context: StageContext, units: list[Unit], moments: MomentsInOrder) -> list[UnitResult]:
    """Sends unfinished shards through until none is left; a lost writer's shards go round again."""
    idle, done = 0, finished(context.run, "encode", units, moments.take)
    report_resume("encode", len(units), len(done))
    if len(done) < len(units):
        # Loaded here first: weights that are missing or do not fit are one line at once, not many workers' failures.
        shape = encoder_shape(context.config)
        connect()
    while len(done) < len(units):
        _one_pass(context, units, done, shape)
        before, done = len(done), finished(context.run, "encode", units, moments.take)
        idle = 0 if len(done) > before else idle + 1
        if idle == ROUNDS:
            left = [unit.payload.name for unit in units if unit.index not in done]
            raise ArtefactError(
                f"encode: {len(left)} shard(s) do not finish, the first is {left[0]}: see the workers' logs"
            )
    return [done[unit.index] for unit in units]


def _one_pass(
    context: StageContext, units: Sequence[Unit], done: dict[int, UnitResult], shape: tuple[Preprocess, int]
) -> None:
    total = sum(unit.size for unit in units) if all(unit.payload.count for unit in units) else None
    resumed = sum(result.counts["rows"] + result.counts["rejects"] for result in done.values())
    rejected = sum(result.counts["rejects"] for result in done.values())
    todo = [unit for unit in units if unit.index not in done]
    with plain_errors(), Progress("encode", "images", total, resumed) as progress:
        progress.advance(note=f"{rejected} rejects")
        for images, newly_rejected in stream(context, todo, *shape):
            rejected += newly_rejected
            progress.advance(images + newly_rejected, f"{rejected:,} rejects")
            _stop_early(context.config, rejected, total)


def _stop_early(config: RunConfig, rejected: int, total: int | None) -> None:
    if total and rejected > config.images.max_reject_share * total:
        raise _too_many(config, rejected, total, {})


def _check_rejects(config: RunConfig, results: Sequence[UnitResult]) -> None:
    rejected = sum(result.counts["rejects"] for result in results)
    total = rejected + sum(result.counts["rows"] for result in results)
    reasons: dict[str, int] = {}
    for result in results:
        for reason, count in result.extra["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    if rejected > config.images.max_reject_share * total:
        raise _too_many(config, rejected, total, reasons)
    if rejected == total:
        raise DataError(f"images.uri = {config.images.uri}: no image there can be used: {_listed(reasons)}")


def _too_many(config: RunConfig, rejected: int, total: int, reasons: dict[str, int]) -> DataError:
    share, bound = rejected / max(total, 1), config.images.max_reject_share
    why = f" ({_listed(reasons)})" if reasons else ""
    return DataError(
        f"encode: {rejected} of {total} images rejected{why}, {share:.1%}, above images.max_reject_share = {bound:g}: "
        f"see {filesystem.join(config.run, 'rejects')}, then mend the input or raise the bound"
    )


def _listed(reasons: dict[str, int]) -> str:
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered[:5])


def _number_rows(run: Run, results: Sequence[UnitResult]) -> list[UnitResult]:
    """Gives every part the row it starts at; only parts that guessed wrong are written again."""
    starts = np.cumsum([0, *[result.counts["rows"] for result in results]]).tolist()
    numbered = list(results)
    wrong = [i for i, result in enumerate(results) if result.extra["row_start"] != starts[i] and result.counts["rows"]]
    if wrong:
        logger.info("encode: numbering the rows of %d parts", len(wrong))
        for part, result in zip(wrong, _renumbered(run, {part: starts[part] for part in wrong}), strict=True):
            numbered[part] = result
            del result.extra["moments"]
    return numbered


def _renumbered(run: Run, starts: dict[int, int]) -> Iterator[UnitResult]:
    """The results, in order, of the parts whose first rows are given."""
    import ray

    connect()
    labels = task_labels()
    again = ray.remote(num_cpus=1, max_retries=5, **selector("tasks", labels))(renumber)
    waiting, running = iter(starts.items()), deque[Any]()
    with plain_errors():
        while True:
            # A few more than there are CPUs, so that none waits for the driver; never all, so that it stays small.
            for part, row in islice(waiting, max(0, 2 * cpus(labels) - len(running))):
                running.append(again.remote(run, part, row))
            if not running:
                return
            yield ray.get(running.popleft())


def _sealed(results: Sequence[UnitResult], total: Moments) -> StageResult:
    counts = {name: sum(result.counts[name] for result in results) for name in ("rows", "rejects", "labelled")}
    reasons: dict[str, int] = {}
    for result in results:
        for reason, count in result.extra["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    extra: dict[str, Any] = {
        "dimension": len(total.total),
        "parts": [result.counts["rows"] for result in results],
        "moments": total.to_json(),
        "reasons": reasons,
    }
    outputs = {path: written for result in results for path, written in result.outputs.items()}
    summary = f"{counts['rows']:,} images in {len(results)} parts, {counts['rejects']:,} rejects"
    return StageResult(outputs, counts, extra, summary)
