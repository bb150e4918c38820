"""encode: images to embeddings, one part per input shard.

Ray Data carries chunks of raw bytes through decoding actors on CPUs to encoder actors on GPUs (or CPUs); writers gather
each shard's chunks and seal the shard. Tables of ready embeddings are taken over shard by shard instead. A shard whose
marker matches is not done again. Rows are numbered once all counts are known.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.config import RunConfig, are_disjoint
from rayclust.encoders.base import GPU_BATCH
from rayclust.encoders.decode import Preprocess, Undecodable, decode
from rayclust.errors import ArtefactError, DataError
from rayclust.runtime import progress
from rayclust.runtime.artefacts import drop_stale_parts
from rayclust.runtime.cluster import connect, cpus, encode_workers, label_selector, plain_errors
from rayclust.runtime.inputs import input_shards, list_shards, plan_inputs
from rayclust.runtime.models import encoder_shape, load_run_encoder, worker_device
from rayclust.runtime.pipeline import Stage, StageContext, StageResult, settings_of
from rayclust.runtime.progress import Progress, worker_name
from rayclust.runtime.rows import Moments, MomentsInOrder, renumber, write_shard
from rayclust.runtime.tasks import (
    STORAGE_THREADS,
    Task,
    TaskResult,
    finished_tasks,
    map_tasks,
    report_resume,
    run_and_mark,
    run_tasks,
)
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.sources import Record, Shard, read_records, read_rows

# The Ray Data pipeline of encode: chunks of raw bytes → decoders on CPUs → encoders on GPUs or CPUs → writers.


def stream(
    context: StageContext, todo: Sequence[Task], preprocess: Preprocess, dimension: int
) -> Iterator[tuple[int, int]]:
    """Encodes the unfinished shards.

    Args:
        context: of the encode stage.
        todo: shards without a marker.
        preprocess: what the encoder takes.
        dimension: D.

    Yields:
        (images, rejects) of chunks that have been handed to their shard's writer.
    """
    writers = _writers(context, dimension)
    counts = _pipeline(context, todo, preprocess, writers)
    with (
        progress.timed_section("decoders") as reading,
        progress.timed_section("encoders", unit="images") as encoding,
        progress.timed_section("writers", len(writers)) as writing,
    ):
        for batch in counts.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            _measure(batch, reading, encoding, writing)
            images, rejected = int(batch["images"].sum()), int(batch["rejected"].sum())
            encoding.done += images + rejected
            yield images, rejected


def _writers(context: StageContext, dimension: int) -> list[Any]:
    """Actors that gather the chunks of shards."""
    import ray

    config = context.config
    where = label_selector("tasks", config.resources.placement.tasks)
    Writer = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, **where)(ShardWriter)
    return [Writer.remote(config.run, dimension) for _ in range(max(1, encode_workers(config) // 4))]


def _pipeline(context: StageContext, todo: Sequence[Task], preprocess: Preprocess, writers: list[Any]) -> Any:
    """Shards through decoders and encoders to `encode_worker.COUNTS`, as a data set of Ray's."""
    import ray.data

    config, places = context.config, context.config.resources.placement
    crew, gpus = Crew.of(config), config.resources.gpus_per_worker
    _configure_ray_data(preprocess.shape, chunk_rows(config))
    chunks = ray.data.from_items(_items(context, todo), override_num_blocks=len(todo)).map_batches(
        ReadAndDecode,
        fn_constructor_kwargs={"rows": chunk_rows(config), "preprocess": preprocess},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=crew.decoders),
        num_cpus=crew.share if not gpus else 1,
        **label_selector("decode", places.decode),
        batch_size=1,
        batch_format="pyarrow",
    )
    return chunks.map_batches(
        EncodeChunks,
        fn_constructor_kwargs={"config": config, "writers": writers},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=crew.encoders),
        **({"num_gpus": gpus} if gpus else {"num_cpus": crew.share}),
        **label_selector("encode", places.encode),
        batch_size=1,
        batch_format="pyarrow",
    )


def _measure(batch: dict[str, np.ndarray], *crews: progress.Timing) -> None:
    """Counts what decoders, encoders and writers took for each chunk."""
    of_crew = (("reading", "worker"), ("decoding", "worker")), (("encoding", "encoder"),), (("writing", None),)
    for crew, columns in zip(crews, of_crew, strict=True):
        for kind, worker in columns:
            names = batch[worker] if worker else [""] * len(batch[kind])
            for seconds, name in zip(batch[kind], names, strict=True):
                crew.add(kind, float(seconds), name)


@dataclass(frozen=True)
class Crew:
    """How many actors share the stage, and the logical CPUs of each."""

    decoders: int
    encoders: int
    share: float
    """CPUs of a decoder, and of an encoder without a GPU. They only place actors; small shares let one laptop core hold
    one of each at once."""

    @classmethod
    def of(cls, config: RunConfig) -> Crew:
        """For the nodes that are there now; kinds of work with nodes of their own have each of those CPUs."""
        places, wanted = config.resources.placement, config.resources.decode_workers
        # Labels that differ may still share nodes: decoders with whole CPUs there would leave an encoder no place.
        apart = are_disjoint(places.decode, places.encode)
        there, near, encoders = cpus(places.decode), cpus(places.encode), encode_workers(config)
        decoders = max(1, there if apart else there // 2) if wanted == "auto" else wanted
        share = min(there / decoders, near / encoders) if apart else min(there, near) / (encoders + decoders)
        return cls(decoders, encoders, min(1.0, int(100 * share) / 100))


def _configure_ray_data(shape: tuple[int, int, int], batch: int) -> None:
    import ray.data

    # Errors reach the user through the command line; Ray Data would print their tracebacks besides.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    # A block holds about one chunk of pixels, so that chunks spread over encoders and flow early.
    settings.target_max_block_size = max(1 << 20, shape[0] * shape[1] * shape[2] * batch)
    # Waiting for an autoscaled GPU is no failure.
    settings.wait_for_min_actors_s = -1


def _items(context: StageContext, todo: Sequence[Task]) -> list[dict[str, str]]:
    """One row per unfinished shard; the shard itself is written beside the markers, so that the driver stays small."""
    wanted = {unit.index: unit for unit in todo}
    shards = (found for found in list_shards(context.config, _settings(context.config)) if found[0].index in wanted)

    def item(found: tuple[Shard, str]) -> dict[str, str]:
        shard, digest = found
        unit, uri = wanted[shard.index], context.run.at("manifests", "encode-inputs", f"{shard.index:05d}.json")
        if digest != unit.digest:
            raise DataError(f"{shard.uri}: the input has changed since it was listed; run again when it is at rest")
        filesystem.write_json(uri, shard.to_json())
        return {
            "unit": json.dumps({"index": unit.index, "digest": unit.digest, "row_start": shard.first}),
            "shard": uri,
        }

    with ThreadPoolExecutor(STORAGE_THREADS) as threads:
        items: list[dict[str, str]] = []
        while group := list(islice(shards, 4 * STORAGE_THREADS)):
            items += threads.map(item, group)
    if len(items) < len(todo):
        raise DataError(f"{context.config.images.uri}: the input has changed since it was listed; run again")
    return items


logger = logging.getLogger(__name__)

MAX_STALLED_PASSES = 3
"""Passes over unfinished shards without any progress after which the stage gives up."""


def run(context: StageContext) -> StageResult:
    """Encodes what is not encoded yet, numbers the rows, and totals the counts."""
    config, listed = context.config, context.plan
    units = [
        Task(shard.index, digest, shard, shard.count or 1)
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
    return _stage_result(results, moments.sum)


def _import_rows(context: StageContext, units: list[Task], moments: MomentsInOrder) -> list[TaskResult]:
    run, width = context.run, _first_width(context.config)

    def take_over(unit: Task) -> TaskResult:
        from rayclust.encoders.weights import load_tensors

        rows = read_rows(unit.payload, load_tensors=load_tensors, width=width)
        records = [
            {"key": key, "uri": uri, "label": label}
            for key, uri, label in zip(rows.keys, rows.uris, rows.labels, strict=True)
        ]
        return write_shard(run, unit, unit.payload.first, records, rows.embeddings, rows.rejects)

    return run_tasks(run, "encode", units, take_over, on_result=moments.take)


def _first_width(config: RunConfig) -> int:
    """Columns of the first table that can be read: all others must be as wide."""
    from rayclust.encoders.weights import load_tensors

    for shard in input_shards(config):
        rows = read_rows(shard, load_tensors=load_tensors)
        if len(rows.keys):
            return int(rows.embeddings.shape[1])
    raise DataError(f"images.uri = {config.images.uri}: no table there holds a usable embedding")


def _encode_images(context: StageContext, units: list[Task], moments: MomentsInOrder) -> list[TaskResult]:
    """Sends unfinished shards through until none is left; a lost writer's shards go round again."""
    idle, done = 0, finished_tasks(context.run, "encode", units, moments.take)
    report_resume("encode", len(units), len(done))
    if len(done) < len(units):
        # Loaded here first: weights that are missing or do not fit are one line at once, not many workers' failures.
        shape = encoder_shape(context.config)
        connect()
    while len(done) < len(units):
        _one_pass(context, units, done, shape)
        before, done = len(done), finished_tasks(context.run, "encode", units, moments.take)
        idle = 0 if len(done) > before else idle + 1
        if idle == MAX_STALLED_PASSES:
            left = [unit.payload.name for unit in units if unit.index not in done]
            raise ArtefactError(
                f"encode: {len(left)} shard(s) do not finish, the first is {left[0]}: see the workers' logs"
            )
    return [done[unit.index] for unit in units]


def _one_pass(
    context: StageContext, units: Sequence[Task], done: dict[int, TaskResult], shape: tuple[Preprocess, int]
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
            _check_reject_share(context.config, rejected, total)


def _check_reject_share(config: RunConfig, rejected: int, total: int | None) -> None:
    if total and rejected > config.images.max_reject_share * total:
        raise _too_many(config, rejected, total, {})


def _check_rejects(config: RunConfig, results: Sequence[TaskResult]) -> None:
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


def _number_rows(run: Run, results: Sequence[TaskResult]) -> list[TaskResult]:
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


def _renumbered(run: Run, starts: dict[int, int]) -> Iterator[TaskResult]:
    """The results, in order, of the parts whose first rows are given."""
    connect()
    for _, result in map_tasks(lambda item: renumber(run, *item), starts.items(), in_order=True):
        yield result


def _stage_result(results: Sequence[TaskResult], total: Moments) -> StageResult:
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


# The first half of encode inside a Ray worker: input shards to chunks of pixels, on a CPU and without torch.
#
# A row of the Ray data set is a *chunk*: consecutive records of one shard, in the order of their keys. An embedding
# depends on its image alone, to the bit: neither the cut nor the number of workers shows in the result.


RECORD = pa.struct([("key", pa.string()), ("uri", pa.string()), ("label", pa.string())])
REJECT = pa.struct([("key", pa.string()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
CHUNK = pa.schema(
    [
        ("unit", pa.string()),  # JSON of the shard's index and digest and of the row it is expected to start at
        ("chunk", pa.int32()),
        ("last", pa.bool_()),
        ("records", pa.list_(RECORD)),
        ("rejects", pa.list_(REJECT)),
        ("pixels", pa.large_binary()),  # uint8[B H W C], C order
        ("worker", pa.string()),  # who made it, and what it took, in seconds
        ("reading", pa.float64()),
        ("decoding", pa.float64()),
    ]
)


class ReadAndDecode:
    """Input shards to chunks of pixels. Images that cannot be decoded become rejects with a reason.

    Args:
        rows: records of a chunk.
        preprocess: what the encoder takes, with the run's limits.
    """

    def __init__(self, rows: int, preprocess: Preprocess) -> None:
        self._rows, self._preprocess = rows, preprocess

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Chunks of each shard named in `batch`, in order."""
        for unit, shard in zip(batch["unit"].to_pylist(), batch["shard"].to_pylist(), strict=True):
            yield from self._chunks(unit, Shard.from_json(filesystem.read_json(shard)))

    def _chunks(self, unit: str, shard: Shard) -> Iterator[pa.Table]:
        records, started = iter(read_records(shard, self._preprocess.max_bytes)), time.monotonic()
        group = list(islice(records, self._rows))
        number = 0
        while True:
            following = list(islice(records, self._rows))
            read = time.monotonic()
            row = self._chunk(unit, number, group, last=not following)
            times = {"worker": worker_name(), "reading": read - started, "decoding": time.monotonic() - read}
            yield pa.Table.from_pylist([row | times], schema=CHUNK)
            if not following:
                return
            group, number, started = following, number + 1, time.monotonic()

    def _chunk(self, unit: str, number: int, group: list[Record], *, last: bool) -> dict[str, Any]:
        kept: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        pixels: list[np.ndarray] = []
        for record in group:
            reason, detail = record.reason, record.detail
            if reason is None:
                try:
                    pixels.append(decode(record.data or b"", self._preprocess))
                    kept.append({"key": record.key, "uri": record.uri, "label": record.label})
                except Undecodable as error:
                    reason, detail = error.reason, error.detail
            if reason is not None:
                rejects.append({"key": record.key, "uri": record.uri, "reason": reason, "detail": detail})
        return {
            "unit": unit,
            "chunk": number,
            "last": last,
            "records": kept,
            "rejects": rejects,
            "pixels": np.stack(pixels).tobytes() if pixels else b"",
        }


# The second half of encode inside a Ray worker: chunks of pixels to embeddings, on a GPU or a CPU.


COUNTS = pa.schema(
    [
        ("images", pa.int64()),
        ("rejected", pa.int64()),
        ("encoder", pa.string()),
        ("encoding", pa.float64()),
        ("writing", pa.float64()),
    ]
)
"""What a chunk leaves behind, beside the columns of its decoder; seconds."""
CPU_CHUNK = 32
"""Images that travel together where encoders are CPUs."""


def chunk_rows(config: RunConfig) -> int:
    """Images of a chunk: a pass of a GPU's network, or a second's work of a CPU's."""
    return config.encoder.batch_size or (GPU_BATCH if config.resources.gpus_per_worker else CPU_CHUNK)


class EncodeChunks:
    """Chunks of pixels to embeddings, handed to the writer of their shard; only counts and times go on."""

    def __init__(self, config: RunConfig, writers: list[Any]) -> None:
        self._encoder = load_run_encoder(config, worker_device(config))
        self._writers = writers

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encodes each chunk and hands it on; counts of images and rejects, and who took how long."""
        import ray

        done: list[dict[str, Any]] = []
        for row in range(batch.num_rows):
            unit = batch["unit"][row].as_py()
            records, rejects = batch["records"][row].as_py(), batch["rejects"][row].as_py()
            started = time.monotonic()
            embeddings = self._embeddings(batch["pixels"][row], len(records))
            encoded = time.monotonic()
            writer = self._writers[json.loads(unit)["index"] % len(self._writers)]
            chunk, last = batch["chunk"][row].as_py(), batch["last"][row].as_py()
            # Waiting here keeps the writers from falling behind without bound.
            written = ray.get(writer.add.remote(unit, chunk, last, records, rejects, embeddings))
            done.append({"images": len(records), "rejected": len(rejects), "encoder": worker_name()})
            done[-1] |= {"encoding": encoded - started, "writing": written}
        of_decoder = {name: batch[name].combine_chunks() for name in ("worker", "reading", "decoding")}
        table = pa.Table.from_pylist(done, schema=COUNTS)
        return pa.table(of_decoder | {name: table[name] for name in COUNTS.names})

    def _embeddings(self, pixels: pa.Scalar, count: int) -> np.ndarray:
        if not count:
            return np.zeros((0, self._encoder.dimension), np.float16)
        array = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(count, *self._encoder.preprocess.shape)
        with np.errstate(over="ignore"):  # what overflows becomes a reject
            return self._encoder.encode_images(array).astype(np.float16)


# The end of encode inside a Ray worker: gathers each shard's chunks and writes the shard when it is whole.


class ShardWriter:
    """Gathers the chunks of each shard and writes it when it is whole; a Ray actor.

    A chunk that comes twice (its worker died after sending) is taken once. If the writer itself dies, its unfinished
    shards have no marker and the driver sends them through again.
    """

    def __init__(self, run: str, dimension: int) -> None:
        self._run, self._dimension = Run(run), dimension
        self._open: dict[str, dict[int, tuple[Any, ...]]] = {}
        self._lengths: dict[str, int] = {}
        self._written: set[str] = set()

    def add(
        self, unit: str, chunk: int, last: bool, records: list[Any], rejects: list[Any], embeddings: np.ndarray
    ) -> float:
        """Takes one chunk of the shard that `unit` names; the seconds that this took."""
        started = time.monotonic()
        if unit not in self._written:
            self._take(unit, chunk, last, (records, rejects, np.array(embeddings)))
        return time.monotonic() - started

    def _take(self, unit: str, chunk: int, last: bool, content: tuple[Any, ...]) -> None:
        chunks = self._open.setdefault(unit, {})
        chunks[chunk] = content
        if last:
            self._lengths[unit] = chunk + 1
        if len(chunks) == self._lengths.get(unit):
            self._write(unit, [chunks[number] for number in range(len(chunks))])
            self._written.add(unit)
            del self._open[unit], self._lengths[unit]

    def _write(self, unit: str, chunks: list[tuple[Any, ...]]) -> None:
        named = json.loads(unit)
        records = [record for kept, _, _ in chunks for record in kept]
        shard = Task(named["index"], named["digest"])
        embeddings = np.concatenate([embeddings for _, _, embeddings in chunks])
        rejects = [reject for _, rejects, _ in chunks for reject in rejects]

        def write() -> TaskResult:
            return write_shard(self._run, shard, named["row_start"], records, embeddings, rejects)

        run_and_mark(self._run.shard_manifest(shard.index), shard, write)

    def ping(self) -> bool:
        """Answers once the actor is up."""
        return True


def _settings(config: RunConfig) -> dict[str, Any]:
    images = ("format", "labels", "classes", "shard_size", "max_bytes", "max_pixels")
    return {"images": settings_of(config.images, *images), "encoder": settings_of(config.encoder)}


STAGE = Stage("encode", _settings, run, plan=lambda config: plan_inputs(config, _settings(config)))
