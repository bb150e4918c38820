"""Stage `encode`: images to embeddings, one part per input shard.

Ray Data carries chunks of raw bytes through decoding actors on CPUs to encoding actors on GPUs (or CPUs); writer actors
gather the chunks of each shard, write it and mark it done. A row of the Ray data set is a *chunk*: consecutive records
of one shard, in the order of their keys. An embedding depends on its image alone, to the bit: neither the cut nor the
number of workers shows in the result. Tables of ready embeddings are copied shard by shard instead. A shard whose mark
matches is not done again. Rows are numbered once all counts are known.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from rayclust.config import RunConfig
from rayclust.encoders.base import GPU_BATCH, Encoder
from rayclust.encoders.decode import Preprocess, Undecodable, decode
from rayclust.encoders.settings import SpaceConfig
from rayclust.encoders.tensors import load_tensors
from rayclust.errors import ArtefactError, DataError
from rayclust.report.formats import duration
from rayclust.runtime import progress
from rayclust.runtime.cluster import (
    connect,
    cores,
    cpus,
    in_driver,
    label_selector,
    may_use_driver,
    plain_errors,
    threads,
    use_driver,
    worker_count,
)
from rayclust.runtime.encoder import (
    MEASURED_FROM,
    RunEncoders,
    encoder_shape,
    encoding,
    refuse_other_width,
    seconds_per_image,
    with_engines,
    worker_device,
)
from rayclust.runtime.pipeline import StageContext, StageResult
from rayclust.runtime.progress import Progress, worker_name
from rayclust.runtime.shards import MomentsInOrder, Split, renumber, write_shard
from rayclust.runtime.spaces import SpaceTables
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
from rayclust.store import storage
from rayclust.store.manifest import drop_stale_parts
from rayclust.store.run import Run
from rayclust.store.sources import Shard, read_records, read_rows
from rayclust.store.storage import prefetch

logger = logging.getLogger(__name__)

MAX_STALLED_PASSES = 3
"""Passes over unfinished shards without any progress after which the stage gives up."""
DRIVER_ROWS, DRIVER_IMAGES = 2**15, 1024
"""Most rows that are done in the driver, and most images for a network where this machine has more cores than
`DRIVER_CORES`: Ray's workers use them all, and win back the time that they take to start."""
TAR_IMAGES = 2**13
"""Images that a tar is taken to hold, which are not counted before it is read."""
TENSOR_ROW_BYTES = 2**10
"""Bytes that a row of a file of tensors is taken to have."""
DRIVER_CORES = 8
"""Most threads that encode in the driver: more would wait for Python's lock."""
DRIVER_CHUNK = 8
"""Images of a chunk in the driver: less than a second of work for most networks, so that Ctrl-C ends soon."""
CPU_CHUNK = 32
"""Images of a chunk where encoders run on CPUs."""
RECORD = pa.struct([("key", pa.string()), ("uri", pa.string()), ("label", pa.string())])
REJECT = pa.struct([("key", pa.string()), ("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
CHUNK = pa.schema(
    [
        ("task", pa.string()),  # JSON of the shard's index and digest and of the row it is expected to start at
        ("chunk", pa.int32()),
        ("last", pa.bool_()),
        ("records", pa.list_(RECORD)),
        ("rejects", pa.list_(REJECT)),
        ("pixels", pa.large_binary()),  # uint8[B H W C], C order, for each distinct preprocessing
        ("worker", pa.string()),  # the decoder, and its seconds
        ("reading", pa.float64()),
        ("decoding", pa.float64()),
    ]
)


def run(context: StageContext) -> StageResult:
    """Encode the shards that are not done, number the rows, and total the counts; a small input in the driver."""
    shards, encoders = context.plan.shards, encoding(context.config)
    is_network = any(encoder.family not in ("pixels", "unknown") for encoder in encoders)
    most = DRIVER_IMAGES if is_network and not shards[0].has_embeddings and cores() > DRIVER_CORES else DRIVER_ROWS
    count = 0
    for shard in shards:
        if shard.count is not None:
            count += shard.count
        elif not shard.has_embeddings:
            count += TAR_IMAGES
        elif (found := storage.stat(shard.uri)) is not None:
            # A file of tensors must be read to count its rows: an estimate by its bytes.
            count += 1 + found.size // TENSOR_ROW_BYTES
        if count > most:
            break
    with use_driver(count <= most and may_use_driver(context.config)):
        return _encode(context)


def _encode(context: StageContext) -> StageResult:
    config, listed = context.config, context.plan
    tasks = [
        Task(shard.index, digest, shard, shard.count or 1)
        for shard, digest in zip(listed.shards, listed.digests, strict=True)
    ]
    # 1. Remove tables of shards that are gone, and of spaces that the run no longer has. Only several encoders write
    # the folder rows/; without it there are no such spaces.
    run = context.run
    spaces = [storage.join(run.embeddings_folder, name) for name in run.spaces]
    for folder in (run.rows_folder, run.rejects_folder, *spaces):
        drop_stale_parts(folder, len(tasks))
    has_rows = bool(spaces) or next(storage.walk(run.at("rows"), missing_ok=True), None) is not None
    if has_rows and not spaces:
        storage.remove_tree(run.at("rows"))
    for file in storage.walk(run.embeddings_folder, missing_ok=True) if has_rows else ():
        if file.key.rpartition("/")[0] not in (run.spaces or ("",)):
            storage.remove(file.uri)
    # 2. The shards.
    work = _import_rows if listed.shards[0].has_embeddings else _encode_images
    moments = MomentsInOrder()
    results = work(context, tasks, moments)
    storage.remove_tree(run.at("manifests", "encode-inputs"))
    # 3. Totals; too many rejects stop the run here.
    has_split = Split.of(config) is not None
    names = ("rows", "rejects", "labelled", *(("test",) if has_split else ()))
    counts = {name: sum(result.counts[name] for result in results) for name in names}
    reasons = Counter[str]()
    for result in results:
        reasons.update(result.extra["reasons"])
    total = counts["rows"] + counts["rejects"]
    _check_reject_share(config, counts["rejects"], total, reasons)
    if counts["rejects"] == total:
        why = f"no image there can be used: {_most_frequent(reasons)}" if reasons else "no images are in its files"
        raise DataError(f"images.uri = {config.images.uri}: {why}")
    if has_split and counts["test"] in (0, counts["rows"]):
        given = config.images.test or config.images.split
        share = "no row" if not counts["test"] else "every row"
        raise DataError(
            f"images.split = {given}: keeps {share} of {counts['rows']} aside; some must be left for either"
        )
    labels = config.images.labels
    labels = config.images.columns.get("label", labels) if labels == "auto" else labels
    if labels not in ("auto", "none") and not counts["labelled"]:
        logger.warning("images.labels = %s: gives no row a label; labels are text or whole numbers", labels)
    for space in listed.ready if config.images.classes is None else ():
        space.refuse_surplus(run, len(tasks), total)
    # 4. Row numbers, now that all counts are known.
    results = _number_rows(run, results)
    extra = {
        "dimension": moments.dimension,
        "parts": [result.counts["rows"] for result in results],
        "moments": moments.sum,
        "reasons": dict(reasons),
    }
    if has_split:
        extra["test"] = [result.counts["test"] for result in results]
    if config.encoders:
        widths = results[0].extra["widths"]
        extra["spaces"] = [{"name": n, "dimension": d} for n, d in zip(config.spaces, widths, strict=True)]
    outputs = {path: written for result in results for path, written in result.outputs.items()}
    summary = f"{counts['rows']:,} images in {len(results)} parts, {counts['rejects']:,} rejects"
    return StageResult(outputs, counts, extra, summary)


def _import_rows(context: StageContext, tasks: list[Task], moments: MomentsInOrder) -> list[TaskResult]:
    """Copy tables of ready embeddings, shard by shard; all must be as wide as the first that holds a usable row."""
    run, split = context.run, Split.of(context.config)
    for shard in context.plan.shards:
        first = read_rows(shard, load_tensors=load_tensors)
        if len(first.keys):
            width, dtype = int(first.embeddings.shape[1]), first.embeddings.dtype
            refuse_other_width(context.config, width)
            break
    else:
        images = context.config.images
        of_classes = "" if images.classes is None else " of the classes in images.classes"
        lost = first.rejects
        why = f"; {len(lost):,} rejects of {shard.uri}, the first one: {lost[0]['detail']}" if lost else ""
        raise DataError(f"images.uri = {images.uri}: no table there holds a usable embedding{of_classes}{why}")

    spaces = SpaceTables(run.spaces, {run.spaces[0]: width}, context.plan.ready) if run.spaces else None

    def copy_rows(task: Task) -> TaskResult:
        rows = read_rows(task.payload, load_tensors=load_tensors, width=width)
        records = [
            {"key": key, "uri": uri, "label": label}
            for key, uri, label in zip(rows.keys, rows.uris, rows.labels, strict=True)
        ]
        # Wide where the first table is, so that the parts of a run are alike.
        embeddings: Any = rows.embeddings.astype(np.promote_types(dtype, rows.embeddings.dtype))
        if spaces is not None:
            embeddings = spaces.divide(embeddings, rows.keys, task.payload.first)
        return write_shard(run, task, task.payload.first, records, embeddings, rows.rejects, split=split)

    return run_tasks(run, "encode", tasks, copy_rows, on_result=moments.take)


def _encode_images(context: StageContext, tasks: list[Task], moments: MomentsInOrder) -> list[TaskResult]:
    """Send unfinished shards through Ray Data until none is left; the shards of a lost writer go through again."""
    idle, done = 0, finished_tasks(context.run, "encode", tasks, moments.take)
    report_resume("encode", len(tasks), len(done))
    # What is not counted before it is read may be many.
    images = sum(task.size if task.payload.count else MEASURED_FROM for task in tasks)
    callers, loaded = driver_threads(context.config) if in_driver() else 1, dict[str, Encoder]()
    config = with_engines(context.config, context.run, images, is_begun=bool(done), callers=callers, loaded=loaded)
    context = replace(context, config=config)
    chunks: Callable[..., Iterator[Mapping[str, Any]]]
    if len(done) < len(tasks):
        # Loaded here first: weights that are missing are one line at once, not many workers' failures.
        if in_driver():
            worker = EncodeChunks(config, [], loaded)
            for encoder in worker.encoders.encoders:
                encoder.callers = callers
            seconds, count = sum(map(seconds_per_image, worker.encoders.encoders)), callers
            chunks = partial(chunks_in_driver, worker)
        else:
            shapes = [encoder_shape(config, encoder) for encoder in encoding(config)]
            chunks = partial(chunks_on_ray, shapes)
            connect()
            seconds, count = sum(seconds for _, _, seconds in shapes), worker_count(config, "encode")
        if not config.resources.gpus:
            count_left = sum(task.size for task in tasks if task.payload.count and task.index not in done)
            time_left = f": {count_left:,} in about {duration(count_left * seconds / count)}" if count_left else ""
            name, rate = " and ".join(encoder.name for encoder in encoding(config)), count / seconds
            logger.info("encode: %s, about %.3g images a second on CPUs as fast as this one%s", name, rate, time_left)
    while len(done) < len(tasks):
        total = sum(task.size for task in tasks) if all(task.payload.count for task in tasks) else None
        resumed = sum(result.counts["rows"] + result.counts["rejects"] for result in done.values())
        rejected = sum(result.counts["rejects"] for result in done.values())
        todo = [task for task in tasks if task.index not in done]
        with plain_errors(), Progress("encode", "images", total, resumed) as bar:
            bar.advance(note=f"{rejected} rejects")
            for images, newly_rejected in count_chunks(chunks(context, todo)):
                rejected += newly_rejected
                bar.advance(images + newly_rejected, f"{rejected:,} rejects", rejects=rejected)
                _check_reject_share(config, rejected, total, {})
        before, done = len(done), finished_tasks(context.run, "encode", tasks, moments.take)
        idle = 0 if len(done) > before else idle + 1
        if idle == MAX_STALLED_PASSES:
            left = [task.payload.name for task in tasks if task.index not in done]
            raise ArtefactError(
                f"encode: {len(left)} shard(s) do not finish, the first is {left[0]}: see the workers' logs"
            )
    return [done[task.index] for task in tasks]


def _check_reject_share(config: RunConfig, rejected: int, total: int | None, reasons: dict[str, int]) -> None:
    """Raise DataError where more images are rejected than `images.max_reject_share` allows.

    `total` is None while the number of images is not known.
    """
    if total and rejected > config.images.max_reject_share * total:
        why = f" ({_most_frequent(reasons)})" if reasons else ""
        raise DataError(
            f"encode: {rejected} of {total} images rejected{why}, {rejected / total:.1%}, "
            f"above images.max_reject_share = {config.images.max_reject_share:g}: "
            f"see {storage.join(config.run, 'rejects')}, then mend the input or raise the bound"
        )


def _most_frequent(reasons: dict[str, int]) -> str:
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered[:5])


def _number_rows(run: Run, results: Sequence[TaskResult]) -> list[TaskResult]:
    """Assign every part its first row; only parts that guessed it wrong are written again."""
    starts = np.cumsum([0, *[result.counts["rows"] for result in results]]).tolist()
    numbered = list(results)
    wrong = [i for i, result in enumerate(results) if result.extra["row_start"] != starts[i] and result.counts["rows"]]
    if wrong:
        logger.info("encode: numbering the rows of %d parts", len(wrong))
        moved = [(part, starts[part]) for part in wrong]
        for (part, _), result in map_tasks(lambda item: renumber(run, *item), moved, in_order=True):
            numbered[part] = result
            del result.extra["moments"]
    return numbered


def count_chunks(chunks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    """Yield (images, rejects) of chunks that their shard's writer has received, and keep the workers' times."""
    with (
        progress.timed_section("decoders") as decoding,
        progress.timed_section("encoders", unit="images") as encoding,
        progress.timed_section("writers") as writing,
    ):
        timed = (decoding, "reading", "worker"), (decoding, "decoding", "worker"), (encoding, "encoding", "encoder")
        for chunk in chunks:
            for timing, kind, worker in (*timed, (writing, "writing", "writer")):
                for seconds, name in zip(chunk[kind], chunk[worker], strict=True):
                    timing.add(kind, float(seconds), str(name))
            images, rejected = int(sum(chunk["images"])), int(sum(chunk["rejected"]))
            encoding.done += images + rejected
            yield images, rejected


def driver_threads(config: RunConfig) -> int:
    """Return the number of threads that encode where that is done in the driver."""
    return 1 if config.resources.workers == 1 else min(cores(), DRIVER_CORES)


def chunks_in_driver(encode: EncodeChunks, context: StageContext, todo: Sequence[Task]) -> Iterator[Mapping[str, Any]]:
    """Decode, encode and write shards without a mark in threads of this process; yield counts and times of chunks.

    Args:
        encode: with the encoders; gets its writer here.
        context: of the stage.
        todo: the shards.
    """
    config, count = context.config, driver_threads(context.config)
    widths = [encoder.dimension for encoder in encode.encoders.encoders]
    encode.writers[:] = [ShardWriter(*writer_arguments(context, widths))]
    has_batches = any(encoder.batch_size for encoder in encoding(config))  # their cut may show in the last bit
    decode = ReadAndDecode(chunk_rows(config) if has_batches else DRIVER_CHUNK, encode.encoders.preprocesses)

    def encoded(read: dict[str, Any]) -> dict[str, Any]:
        name = f"{worker_name()}/{threading.current_thread().name}"
        return encode.encode(decode.decode(read)) | {"worker": name, "encoder": name}

    # Reading and writing stay here; what is read ahead is bounded.
    reads = (read for item in _items(context, todo) for read in decode.read(item))
    with threads(max(encoder.threads for encoder in encoding(config))):
        for _, chunk in prefetch(encoded, reads, 2 * count, threads=count):
            yield encode.write(chunk).to_pydict()


def chunks_on_ray(
    shapes: Sequence[tuple[Preprocess, int, float]], context: StageContext, todo: Sequence[Task]
) -> Iterator[Mapping[str, Any]]:
    """Decode, encode and write shards without a mark through Ray Data; yield counts and times of chunks.

    Args:
        shapes: of the encoders, from `encoder_shape`.
        context: of the stage.
        todo: the shards.
    """
    import ray.data

    config, places = context.config, context.config.resources.placement
    pools, gpus = ActorPools.of(config), config.resources.gpus
    # Errors reach the user through the command line; Ray Data would print their tracebacks besides.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    # A block holds about one chunk of pixels, so that chunks spread over encoders and flow early.
    preprocesses = tuple(dict.fromkeys(preprocess for preprocess, _, _ in shapes))
    image_bytes = sum(math.prod(preprocess.shape) for preprocess in preprocesses)
    settings.target_max_block_size = max(1 << 20, image_bytes * chunk_rows(config))
    settings.wait_for_min_actors_s = -1  # waiting for an autoscaled GPU is no failure

    # 1. Writers gather the chunks of shards.
    at_tasks = label_selector("tasks", places.tasks)
    Writer = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, **at_tasks)(ShardWriter)
    arguments = writer_arguments(context, [dimension for _, dimension, _ in shapes])
    writers = [Writer.remote(*arguments) for _ in range(max(1, worker_count(config, "encode") // 4))]
    # 2. Shards to chunks of pixels, on CPUs.
    chunks = ray.data.from_items(_items(context, todo), override_num_blocks=len(todo)).map_batches(
        ReadAndDecode,
        fn_constructor_args=(chunk_rows(config), preprocesses),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pools.decoders),
        num_cpus=pools.share if not gpus else 1,
        **label_selector("decode", places.decode),
        batch_size=1,
        batch_format="pyarrow",
    )
    # 3. Chunks of pixels to embeddings, on GPUs or CPUs, and on to the writers.
    counts = chunks.map_batches(
        EncodeChunks,
        fn_constructor_kwargs={"config": config, "writers": writers},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pools.encoders),
        **({"num_gpus": gpus} if gpus else {"num_cpus": pools.share}),
        **label_selector("encode", places.encode),
        batch_size=1,
        batch_format="pyarrow",
    )
    yield from counts.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)


def writer_arguments(context: StageContext, widths: Sequence[int]) -> tuple[Any, ...]:
    """Return what `ShardWriter` is built from: of encoders of these widths."""
    config = context.config
    if not config.encoders:
        return config.run, Split.of(config)
    names = (encoder.space for encoder in encoding(config) if isinstance(encoder, SpaceConfig))
    encoded = dict(zip(names, widths, strict=True))
    return config.run, Split.of(config), SpaceTables(config.spaces, encoded, context.plan.ready)


@dataclass(frozen=True)
class ActorPools:
    """Sizes of the stage's pools of actors."""

    decoders: int
    encoders: int
    share: float
    """Logical CPUs of a decoder, and of an encoder without a GPU. They only place actors; small shares let one core
    of a laptop hold one of each at once."""

    @classmethod
    def of(cls, config: RunConfig) -> ActorPools:
        """Return the sizes for the nodes that are there now; kinds of work with their own nodes use all CPUs there."""
        places, wanted = config.resources.placement, config.resources.decode_workers
        # Apart where no node can carry both sets of labels. Others may share nodes, though they differ: decoders with
        # whole CPUs there would leave an encoder no place.
        apart = any(places.encode.get(key, value) != value for key, value in places.decode.items())
        decoding, encoding, encoders = cpus(places.decode), cpus(places.encode), worker_count(config, "encode")
        decoders = max(1, decoding if apart else decoding // 2) if wanted == "auto" else wanted
        if apart:
            share = min(decoding / decoders, encoding / encoders)
        else:
            share = min(decoding, encoding) / (encoders + decoders)
        return cls(decoders, encoders, min(1.0, int(100 * share) / 100))


def _items(context: StageContext, todo: Sequence[Task]) -> list[dict[str, str]]:
    """Return a row per unfinished shard; the shard itself is written to storage, so that rows stay small."""

    def item(task: Task) -> dict[str, str]:
        uri = context.run.at("manifests", "encode-inputs", f"{task.index:05d}.json")
        storage.write_bytes(uri, zlib.decompress(context.plan.packed[task.index]))
        named = {"index": task.index, "digest": task.digest, "row_start": task.payload.first}
        return {"task": json.dumps(named), "shard": uri}

    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        return list(pool.map(item, todo))


def chunk_rows(config: RunConfig) -> int:
    """Return the images of a chunk: one pass of the network on a GPU, about a second of work on a CPU."""
    usual = GPU_BATCH if config.resources.gpus else CPU_CHUNK
    return max(encoder.batch_size or usual for encoder in encoding(config))


@dataclass(frozen=True)
class ReadAndDecode:
    """Ray Data operator: shards to chunks of pixels, on a CPU and without torch. Undecodable images become rejects."""

    rows: int
    """Of a chunk."""
    preprocesses: tuple[Preprocess, ...]
    """Each gives one kind of pixels."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yield the chunks of the shard named in `batch`, a row of one task, in order."""
        [item] = batch.to_pylist()
        yield from map(self.decode, self.read(item))

    def read(self, item: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a shard, in order, before they are decoded: records with bytes."""
        started, shard = time.monotonic(), Shard.from_json(storage.read_json(item["shard"]))
        records = iter(read_records(shard, self.preprocesses[0].max_bytes))
        group, number = list(islice(records, self.rows)), 0
        while True:
            following = list(islice(records, self.rows))
            seconds = time.monotonic() - started
            yield {"task": item["task"], "chunk": number, "last": not following, "records": group, "reading": seconds}
            if not following:
                return
            group, number, started = following, number + 1, time.monotonic()

    def decode(self, read: dict[str, Any]) -> pa.Table:
        """Decode a chunk that `read` yields; return it as a table of one row."""
        started, pixels = time.monotonic(), list[list[np.ndarray]]()
        kept, rejects = list[dict[str, Any]](), list[dict[str, Any]]()
        for record in read["records"]:
            reason, detail = record.reason, record.detail
            if reason is None:
                try:
                    pixels.append([decode(record.data or b"", kind) for kind in self.preprocesses])
                    kept.append({"key": record.key, "uri": record.uri, "label": record.label})
                except Undecodable as error:
                    reason, detail = error.reason, error.detail
            if reason is not None:
                rejects.append({"key": record.key, "uri": record.uri, "reason": reason, "detail": detail})
        row = read | {"records": kept, "rejects": rejects, "worker": worker_name()}
        # All images in the one kind of pixels, then all in the next.
        row["pixels"] = b"".join(np.stack(kind).tobytes() for kind in zip(*pixels, strict=True))
        return pa.Table.from_pylist([row | {"decoding": time.monotonic() - started}], schema=CHUNK)


class EncodeChunks:
    """Ray Data operator: chunks of pixels to embeddings, sent to the writer of their shard; gives counts and times."""

    def __init__(self, config: RunConfig, writers: list[Any], loaded: Mapping[str, Encoder] | None = None) -> None:
        self.encoders = RunEncoders(config, worker_device(config), loaded)
        self.writers = writers

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode a chunk, a table of one row, and send it to its writer; return counts, workers and seconds."""
        return self.write(self.encode(batch))

    def encode(self, batch: pa.Table) -> dict[str, Any]:
        """Encode a chunk, a table of one row; return it with `embeddings` in the place of pixels."""
        started = time.monotonic()
        [chunk] = batch.drop_columns(["pixels"]).to_pylist()
        count, kinds, start = len(chunk["records"]), list[np.ndarray](), 0
        chunk["embeddings"] = np.zeros((0, self.encoders.dimension), np.float16)
        if count:
            # All images in the one kind of pixels, then all in the next.
            values = np.frombuffer(batch["pixels"][0].as_buffer(), np.uint8)
            for preprocess in self.encoders.preprocesses:
                size = count * math.prod(preprocess.shape)
                kinds.append(values[start : start + size].reshape(count, *preprocess.shape))
                start += size
            with np.errstate(over="ignore"):  # what overflows becomes a reject
                chunk["embeddings"] = self.encoders.encode(kinds).astype(np.float16)
        return chunk | {"encoder": worker_name(), "encoding": time.monotonic() - started}

    def write(self, chunk: dict[str, Any]) -> pa.Table:
        """Send an encoded chunk to its writer; return counts, workers and seconds."""
        place = json.loads(chunk["task"])["index"] % len(self.writers)
        writer = self.writers[place]
        content = [chunk.pop(name) for name in ("task", "chunk", "last", "records", "rejects", "embeddings")]
        if isinstance(writer, ShardWriter):
            written = writer.add(*content)
        else:
            import ray

            # Waiting here keeps the writers from falling behind without bound.
            written = ray.get(writer.add.remote(*content))
        counts = {"images": len(content[3]), "rejected": len(content[4]), "writer": place, "writing": written}
        return pa.Table.from_pylist([chunk | counts])


class ShardWriter:
    """Ray actor that gathers the chunks of each shard and writes the shard when it is complete.

    A chunk that comes twice (its worker died after sending) counts once. If the writer itself dies, its unfinished
    shards have no mark and the driver sends them through again.
    """

    def __init__(self, run: str, split: Split | None = None, spaces: SpaceTables | None = None) -> None:
        self._run, self._split, self._spaces = Run(run, () if spaces is None else spaces.names), split, spaces
        self._open: dict[str, dict[int, tuple[list[Any], list[Any], np.ndarray]]] = {}
        self._lengths: dict[str, int] = {}
        self._written: set[str] = set()

    def add(
        self, task: str, chunk: int, last: bool, records: list[Any], rejects: list[Any], embeddings: np.ndarray
    ) -> float:
        """Add one chunk of the shard that `task` names; return the seconds that this took."""
        started = time.monotonic()
        if task in self._written:
            return time.monotonic() - started
        found = self._open.setdefault(task, {})
        found[chunk] = (records, rejects, np.array(embeddings))
        if last:
            self._lengths[task] = chunk + 1
        if len(found) == self._lengths.get(task):
            # All chunks are here: write the shard.
            chunks = [found[number] for number in range(len(found))]
            named = json.loads(task)
            shard, start = Task(named["index"], named["digest"]), named["row_start"]
            records = [record for kept, _, _ in chunks for record in kept]
            rejects = [reject for _, rejected, _ in chunks for reject in rejected]
            rows: Any = np.concatenate([rows for _, _, rows in chunks])
            if self._spaces is not None:
                rows = self._spaces.divide(rows, [record["key"] for record in records], start)
            write = partial(write_shard, self._run, shard, start, records, rows, rejects, split=self._split)
            run_and_mark(self._run.mark(shard.index), shard, write)
            self._written.add(task)
            del self._open[task], self._lengths[task]
        return time.monotonic() - started
