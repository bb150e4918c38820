"""The Ray Data pipeline of encode: chunks of raw bytes → decoders on CPUs → encoders on GPUs or CPUs → writers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from rayclust.config import RunConfig
from rayclust.encoders.decode import Preprocess
from rayclust.errors import DataError
from rayclust.placement import are_apart
from rayclust.stages import meter
from rayclust.stages.cluster import cpus, encode_workers
from rayclust.stages.inputs import listing
from rayclust.stages.pipeline import StageContext
from rayclust.stages.placing import selector
from rayclust.stages.units import STORAGE_THREADS, Unit
from rayclust.store import filesystem
from rayclust.store.sources import Shard


def stream(
    context: StageContext, todo: Sequence[Unit], preprocess: Preprocess, dimension: int
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
        meter.section("decoders") as reading,
        meter.section("encoders", unit="images") as encoding,
        meter.section("writers", len(writers)) as writing,
    ):
        for batch in counts.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            _measure(batch, reading, encoding, writing)
            images, rejected = int(batch["images"].sum()), int(batch["rejected"].sum())
            encoding.done += images + rejected
            yield images, rejected


def _writers(context: StageContext, dimension: int) -> list[Any]:
    """Actors that gather the chunks of shards."""
    import ray

    from rayclust.stages.shard_writer import ShardWriter

    config = context.config
    where = selector("tasks", config.resources.placement.tasks)
    Writer = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, **where)(ShardWriter)
    return [Writer.remote(config.run, dimension) for _ in range(max(1, encode_workers(config) // 4))]


def _pipeline(context: StageContext, todo: Sequence[Unit], preprocess: Preprocess, writers: list[Any]) -> Any:
    """Shards through decoders and encoders to `encode_worker.COUNTS`, as a data set of Ray's."""
    import ray.data

    from rayclust.stages.decode_worker import ReadAndDecode
    from rayclust.stages.encode_worker import EncodeChunks, chunk_rows

    config, places = context.config, context.config.resources.placement
    crew, gpus = Crew.of(config), config.resources.gpus_per_worker
    _configure_ray_data(preprocess.shape, chunk_rows(config))
    chunks = ray.data.from_items(_items(context, todo), override_num_blocks=len(todo)).map_batches(
        ReadAndDecode,
        fn_constructor_kwargs={"rows": chunk_rows(config), "preprocess": preprocess},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=crew.decoders),
        num_cpus=crew.share if not gpus else 1,
        **selector("decode", places.decode),
        batch_size=1,
        batch_format="pyarrow",
    )
    return chunks.map_batches(
        EncodeChunks,
        fn_constructor_kwargs={"config": config, "writers": writers},
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=crew.encoders),
        **({"num_gpus": gpus} if gpus else {"num_cpus": crew.share}),
        **selector("encode", places.encode),
        batch_size=1,
        batch_format="pyarrow",
    )


def _measure(batch: dict[str, np.ndarray], *crews: meter.Measured) -> None:
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
        apart = are_apart(places.decode, places.encode)
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


def _items(context: StageContext, todo: Sequence[Unit]) -> list[dict[str, str]]:
    """One row per unfinished shard; the shard itself is written beside the markers, so that the driver stays small."""
    wanted = {unit.index: unit for unit in todo}
    shards = (found for found in listing(context.config) if found[0].index in wanted)

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
