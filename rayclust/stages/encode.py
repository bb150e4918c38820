"""encode: images to embeddings, one part per input shard.

Ray Data carries chunks of raw bytes through decoding actors on CPUs to encoder actors on GPUs (or CPUs); writers gather
each shard's chunks and seal the shard. Tables of ready embeddings are taken over shard by shard instead. A shard whose
marker matches is not done again. Rows are numbered once all counts are known.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, DataError
from rayclust.stages.cluster import connect, cpus, encode_workers, plain_errors
from rayclust.stages.models import weights_stamp
from rayclust.stages.outputs import drop_stale_parts
from rayclust.stages.pipeline import STAGES, StageContext, StageResult
from rayclust.stages.progress import Progress
from rayclust.stages.shards import Moments, renumber, write_shard
from rayclust.stages.units import STORAGE_THREADS, Unit, UnitResult, finished, report_resume, run_units
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.manifest import digest_of
from rayclust.store.sources import Shard, plan_shards, read_rows

logger = logging.getLogger(__name__)

ROUNDS = 3
"""Passes over unfinished shards without any progress after which the stage gives up."""
EMBEDDING_KINDS = ("embeddings_parquet", "embeddings_npy", "embeddings_pt")


@dataclass(frozen=True)
class Plan:
    """The input shards as listed: identities in order, without the names of their images."""

    digest: str
    shards: tuple[Shard, ...]
    digests: tuple[str, ...]


def plan(config: RunConfig) -> Plan:
    """Lists the input. The listing streams: what stays in memory is one small record per shard.

    Raises:
        DataError: the input is missing, unreadable or empty.
    """
    shards, digests = [], []
    settings = STAGES["encode"].settings(config) | {"weights": weights_stamp(config)}
    for shard in input_shards(config):
        digests.append(digest_of({"shard": shard.stamp, "name": shard.name, "settings": settings}))
        shards.append(replace(shard, members=()))
    if not shards:
        raise DataError(f"images.uri = {config.images.uri}: no images there in the format {config.images.format}")
    return Plan(digest_of(digests), tuple(shards), tuple(digests))


def input_shards(config: RunConfig) -> Iterator[Shard]:
    """The shards of the run's input, in order, streamed."""
    from rayclust.stages import datasets

    images = config.images
    uri = datasets.local_folder(images.uri)
    classes = class_names(images.classes)
    return plan_shards(uri, images.format, images.labels, shard_size=images.shard_size, classes=classes)


def class_names(classes: tuple[str, ...] | str | None) -> tuple[str, ...] | None:
    """The class list of `images.classes`, read from its file where it names one."""
    if classes is None or isinstance(classes, tuple):
        return classes
    lines = filesystem.read_bytes(classes).decode("utf-8", "replace").splitlines()
    names = tuple(line.split()[0] for line in lines if line.strip() and not line.startswith("#"))
    if not names:
        raise DataError(f"images.classes = {classes}: the file names no class")
    return names


def run(context: StageContext) -> StageResult:
    """Encodes what is not encoded yet, numbers the rows, and totals the counts."""
    config, listed = context.config, context.plan
    units = [Unit(shard.index, digest, shard, shard.count or 1) for shard, digest in zip(listed.shards, listed.digests, strict=True)]
    for folder in (context.run.embeddings_folder, context.run.rejects_folder):
        drop_stale_parts(folder, len(units))
    if listed.shards[0].kind in EMBEDDING_KINDS:
        results = _import_rows(context, units)
    else:
        results = _encode_images(context, units)
    _check_rejects(config, results)
    results = _number_rows(context.run, results)
    return _sealed(results)


def _import_rows(context: StageContext, units: list[Unit]) -> list[UnitResult]:
    run, width = context.run, _first_width(context.config)

    def take_over(unit: Unit) -> UnitResult:
        from rayclust.encoders.weights import load_tensors

        rows = read_rows(unit.payload, load_tensors=load_tensors, width=width)
        records = [
            {"key": key, "uri": uri, "label": label}
            for key, uri, label in zip(rows.keys, rows.uris, rows.labels, strict=True)
        ]
        return write_shard(run, unit, unit.payload.first or 0, records, rows.embeddings, rows.rejects)

    return run_units("encode", units, run.shard_manifest, take_over)


def _first_width(config: RunConfig) -> int:
    """Columns of the first table that can be read: all others must be as wide."""
    from rayclust.encoders.weights import load_tensors

    for shard in input_shards(config):
        rows = read_rows(shard, load_tensors=load_tensors)
        if len(rows.keys):
            return int(rows.embeddings.shape[1])
    raise DataError(f"images.uri = {config.images.uri}: no table there holds a usable embedding")


def _encode_images(context: StageContext, units: list[Unit]) -> list[UnitResult]:
    """Sends unfinished shards through until none is left; a lost writer's shards go round again."""
    markers, idle = context.run.shard_manifest, 0
    done = finished(markers, units)
    report_resume("encode", len(units), len(done))
    while len(done) < len(units):
        _one_pass(context, units, done)
        before, done = len(done), finished(markers, units)
        idle = 0 if len(done) > before else idle + 1
        if idle == ROUNDS:
            left = [unit.payload.name for unit in units if unit.index not in done]
            raise ArtefactError(f"encode: {len(left)} shard(s) do not finish, the first is {left[0]}: see the workers' logs")
    return [done[unit.index] for unit in units]


def _one_pass(context: StageContext, units: Sequence[Unit], done: dict[int, UnitResult]) -> None:
    connect()
    total = sum(unit.size for unit in units) if all(unit.payload.count for unit in units) else None
    resumed = sum(result.counts["rows"] + result.counts["rejects"] for result in done.values())
    rejected = sum(result.counts["rejects"] for result in done.values())
    with plain_errors(), Progress("encode", "images", total, resumed) as progress:
        progress.advance(note=f"{rejected} rejects")
        for images, newly_rejected in _pipeline(context, [unit for unit in units if unit.index not in done]):
            rejected += newly_rejected
            progress.advance(images + newly_rejected, f"{rejected:,} rejects")
            _stop_early(context.config, rejected, total)


def _pipeline(context: StageContext, todo: Sequence[Unit]) -> Iterator[tuple[int, int]]:
    """Yields (images, rejects) of each chunk as it is handed to its writer."""
    import ray
    import ray.data

    from rayclust.stages.encode_workers import EncodeChunks, ReadAndDecode, ShardWriter
    from rayclust.stages.models import run_preprocess

    config = context.config
    encoders = encode_workers(config)
    decoders = config.resources.decode_workers
    decoders = max(1, cpus() // 2) if decoders == "auto" else decoders
    preprocess = run_preprocess(config)
    Writer = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ShardWriter)
    writers = [Writer.remote(config.run) for _ in range(max(1, encoders // 4))]
    _configure_ray_data(preprocess.shape, config.encoder.batch_size)
    gpus = config.resources.gpus_per_worker
    # Logical CPUs only place actors. Small shares let one laptop core hold a decoder and an encoder at once.
    share = min(1.0, cpus() / (encoders + decoders))
    chunks = ray.data.from_items(_items(context, todo), override_num_blocks=len(todo)).map_batches(
        ReadAndDecode,
        fn_constructor_kwargs={"config": config, "preprocess": preprocess},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=decoders),
        num_cpus=share if not gpus else 1,
        batch_size=1,
        batch_format="pyarrow",
    )
    counts = chunks.map_batches(
        EncodeChunks,
        fn_constructor_kwargs={"config": config, "writers": writers},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=encoders),
        **({"num_gpus": gpus} if gpus else {"num_cpus": share}),
        batch_size=1,
        batch_format="pyarrow",
    )
    for batch in counts.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        yield int(batch["images"].sum()), int(batch["rejected"].sum())


def _configure_ray_data(shape: tuple[int, int], batch: int) -> None:
    import ray.data

    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    # A block holds about one chunk of pixels, so that chunks spread over encoders and flow early.
    settings.target_max_block_size = max(1 << 20, shape[0] * shape[1] * 3 * batch)
    # Waiting for an autoscaled GPU is no failure.
    settings.execution_options.verbose_progress = False
    settings.wait_for_min_actors_s = -1


def _items(context: StageContext, todo: Sequence[Unit]) -> list[dict[str, str]]:
    """One row per unfinished shard. What is in the shard is written beside the markers: the driver never holds it all."""
    wanted = {unit.index: unit for unit in todo}
    shards = (shard for shard in input_shards(context.config) if shard.index in wanted)

    def item(shard: Shard) -> dict[str, str]:
        unit, uri = wanted[shard.index], context.run.at("manifests", "encode", f"input-{shard.index:05d}.json")
        filesystem.write_json(uri, shard.to_json())
        return {"unit": json.dumps({"index": unit.index, "digest": unit.digest, "row_start": shard.first or 0}), "shard": uri}

    with ThreadPoolExecutor(STORAGE_THREADS) as threads:
        items: list[dict[str, str]] = []
        while group := list(islice(shards, 4 * STORAGE_THREADS)):
            items += threads.map(item, group)
        return items


def _stop_early(config: RunConfig, rejected: int, total: int | None) -> None:
    if total and rejected > max(config.images.max_reject_share * total, 0):
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
        f"encode: {rejected} of {total} images rejected{why}: {share:.1%} is above images.max_reject_share = {bound:g}; "
        f"see {filesystem.join(config.run, 'rejects')}, then mend the input or raise the bound"
    )


def _listed(reasons: dict[str, int]) -> str:
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered[:5])


def _number_rows(run: Run, results: Sequence[UnitResult]) -> list[UnitResult]:
    """Gives every part the row it starts at; only parts that guessed wrong are written again."""
    import ray

    starts = np.cumsum([0, *[result.counts["rows"] for result in results]])
    numbered = list(results)
    wrong = [i for i, result in enumerate(results) if result.extra["row_start"] != starts[i] and result.counts["rows"]]
    if wrong:
        connect()
        logger.info("encode: numbering the rows of %d parts", len(wrong))
        again = ray.remote(num_cpus=1, max_retries=5)(renumber)
        for i in range(0, len(wrong), 64):
            group = wrong[i : i + 64]
            for part, result in zip(group, ray.get([again.remote(run, p, int(starts[p])) for p in group]), strict=True):
                numbered[part] = result
    return numbered


def _sealed(results: Sequence[UnitResult]) -> StageResult:
    moments = [Moments.from_json(result.extra["moments"]) for result in results if result.counts["rows"]]
    total = moments[0]
    for more in moments[1:]:
        total += more
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
