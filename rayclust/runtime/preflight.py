"""check: refuse a bad run before it costs money."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from rayclust.config import NodePrice, RunConfig
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Undecodable, decode
from rayclust.errors import DataError, RayclustError
from rayclust.language.vocabulary import merged
from rayclust.methods import METHODS
from rayclust.runtime.cluster import describe_placement
from rayclust.runtime.inputs import input_shards
from rayclust.runtime.models import load_run_encoder
from rayclust.runtime.progress import duration
from rayclust.runtime.vocabularies import check_classes, read_lists, vocabulary_kinds
from rayclust.store import filesystem
from rayclust.store.sources import Shard, read_records, read_rows

# What a run will read, write, take and cost, from a few of its images and the prices in its config.


GIGABYTE = 1e9
HOUR = 3600.0
NEIGHBOR_BYTES = 10
"""Of one neighbour in storage: its row, int64, and its similarity, float16."""


@dataclass(frozen=True)
class Sample:
    """What the first images take on this machine, on average."""

    file_bytes: float
    """Of an encoded image."""
    decode_seconds: float
    """Of one CPU."""
    encode_seconds: float
    """Of one GPU, or of one CPU where `on_gpu` is false."""
    on_gpu: bool


def traffic(config: RunConfig, images: int, dimension: int, sample: Sample | None) -> str:
    """Bytes that are read and written, and what a training node keeps."""
    stored, neighbors = images * dimension * 2, images * min(config.neighbors.k, max(images - 1, 0)) * NEIGHBOR_BYTES
    read = f"reads {images * sample.file_bytes / GIGABYTE:.2f} GB of images; " if sample else ""
    return (
        f"{read}{stored / GIGABYTE:.2f} GB of embeddings and {neighbors / GIGABYTE:.2f} GB of neighbours in storage, "
        f"{_training_rows(config, images * dimension * 4 / GIGABYTE)}"
    )


def _training_rows(config: RunConfig, gigabytes: float) -> str:
    """What a training node, or each worker with its own cells, keeps of so many gigabytes of rows."""
    workers = config.resources.workers
    if config.resources.rows == "whole":
        return f"{gigabytes:.2f} GB of rows per training node"
    if workers == "auto":
        return f"{gigabytes:.2f} GB of rows over all training workers"
    return f"about {gigabytes / workers:.2f} GB of rows per training worker"


def work(config: RunConfig, images: int, sample: Sample) -> str:
    """CPU and GPU time of the stage encode at the speed of this machine, and how many CPUs keep a GPU busy."""
    decode, encode = images * sample.decode_seconds, images * sample.encode_seconds
    if not config.resources.gpus_per_worker:
        return f"decode {duration(decode)} and encode {duration(encode)} of CPU time at the speed of this machine"
    if not sample.on_gpu:
        return f"decode {duration(decode)} of CPU time; how fast a GPU encodes cannot be seen on this machine"
    ratio = sample.decode_seconds / sample.encode_seconds
    return (
        f"decode {duration(decode)} of CPU time and encode {duration(encode)} of GPU time at this machine's speed: "
        f"{ratio:.1f} CPUs keep one GPU busy"
    )


def costs(config: RunConfig, images: int, sample: Sample) -> Iterator[str]:
    """A line for each kind of node in `prices`: hours and dollars of the stage encode on it, and what bounds it."""
    wants_gpus = bool(config.resources.gpus_per_worker)
    for name, node in config.prices.items():
        if wants_gpus and not node.gpus:
            hours = images * sample.decode_seconds / HOUR / node.cpus
            yield f"{name}: decoding alone takes {_priced(hours, node)}"
            continue
        rate = _images_per_second(node, sample, wants_gpus)
        if rate is None:
            yield f"{name}: not known, set prices.{name}.images_per_second: no GPU is here to see how fast one encodes"
            continue
        yield f"{name}: {_encoding(images, node, sample, rate) if wants_gpus else _on_cpus(images, node, sample, rate)}"


def _images_per_second(node: NodePrice, sample: Sample, wants_gpus: bool) -> float | None:
    """Of one GPU, or one CPU."""
    if node.images_per_second is not None:
        return node.images_per_second
    return None if wants_gpus != sample.on_gpu else 1 / sample.encode_seconds


def _encoding(images: int, node: NodePrice, sample: Sample, rate: float) -> str:
    """On nodes with GPUs, whose own CPUs decode: the slower of the two bounds the node."""
    encode = images / rate / HOUR / node.gpus
    decode = images * sample.decode_seconds / HOUR / node.cpus
    needed, there = sample.decode_seconds * rate, node.cpus / node.gpus
    bound = (
        f"its GPUs bound it, {needed:.1f} of {there:.1f} CPUs a GPU are busy"
        if encode >= decode
        else f"its CPUs bound it, {needed:.1f} a GPU are needed and {there:.1f} are there: add CPU nodes"
    )
    return f"{_priced(max(encode, decode), node)}, {encode * node.gpus:.2f} GPU hours; {bound}"


def _on_cpus(images: int, node: NodePrice, sample: Sample, rate: float) -> str:
    return _priced(images * (sample.decode_seconds + 1 / rate) / HOUR / node.cpus, node)


def _priced(hours: float, node: NodePrice) -> str:
    return f"{hours:.2f} node hours, ${hours * node.dollars_per_hour:,.2f}"


SAMPLE_IMAGES = 16
"""Images decoded and encoded to see that they can be, and how long they take."""
LISTED_SHARDS = 1000
"""Shards that are listed to estimate the size of the run."""
THOUSAND = 1000
"""Images that are reckoned with where their number is not known."""
GPU_BATCH = 256
"""Images per pass through the network on a GPU, where the config leaves it open."""
MORE_A_ROUND = 4
"""Candidates that a round of select-k's refinement adds at most."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    subject: str
    good: bool
    text: str


@dataclass
class _Size:
    """What is known of the run's size."""

    images: int = 0
    is_lower_bound: bool = False
    dimension: int = 0
    sample: Sample | None = None


def check(config: RunConfig) -> list[Finding]:
    """Looks at everything that a run needs, without Ray and without writing any artefact.

    Returns:
        One finding per subject; all are looked at, also after one that is bad.
    """
    size = _Size()
    findings = [Finding("config", True, f"method {config.method.name}, {_clusters(config)} clusters")]
    steps: tuple[tuple[str, Callable[[RunConfig, _Size], str]], ...] = (
        ("run", _writable),
        ("images", _listing),
        ("encoder", _encoder),
        ("method", _method),
        ("label", _words),
        ("estimate", _estimate),
        ("work", _work),
        ("placement", lambda config, size: describe_placement(config.resources.placement)),
        ("cost", _cost),
    )
    for subject, step in steps:
        try:
            findings.append(Finding(subject, True, step(config, size)))
        except RayclustError as error:
            findings.append(Finding(subject, False, str(error)))
    return findings


def _clusters(config: RunConfig) -> str:
    candidates = config.select_k.candidates
    if candidates is None:
        return str(config.method.clusters)
    return "auto" if candidates == "auto" else "one of " + ", ".join(map(str, candidates))


def _writable(config: RunConfig, size: _Size) -> str:
    filesystem.check_writable(config.run)
    return f"{config.run} can be written"


def _listing(config: RunConfig, size: _Size) -> str:
    shards = list(islice(input_shards(config), LISTED_SHARDS))
    size.is_lower_bound = len(shards) == LISTED_SHARDS or any(shard.count is None for shard in shards)
    size.images = sum(shard.count or 0 for shard in shards)
    counted = f"{size.images:,} images" if size.images else "images"
    more = " at least" if size.is_lower_bound and size.images else ""
    return f"{shards[0].kind}: {counted}{more} in {len(shards):,} shards{'+' if len(shards) == LISTED_SHARDS else ''}"


def _encoder(config: RunConfig, size: _Size) -> str:
    shard = next(input_shards(config))
    if shard.has_embeddings:
        return _ready_rows(shard, size)
    encoder = load_run_encoder(config)
    size.dimension = encoder.dimension
    good, reasons = _try_sample(config, encoder, size)
    if not good:
        why = f"none of the first {len(reasons)} images can be decoded: {', '.join(sorted(set(reasons)))}"
        raise DataError(why if reasons else "the input holds no image")
    rejected = f", {len(reasons)} of the first {good + len(reasons)} images rejected" if reasons else ""
    return f"{encoder.name}, {encoder.dimension} values an image{rejected}"


def _ready_rows(shard: Shard, size: _Size) -> str:
    from rayclust.encoders.weights import load_tensors

    rows = read_rows(shard, load_tensors=load_tensors)
    if not rows.keys:
        raise DataError(f"{shard.uri}: none of the first {len(rows.rejects)} embeddings can be used")
    size.dimension = int(rows.embeddings.shape[1])
    return f"ready embeddings of {size.dimension} values"


def _try_sample(config: RunConfig, encoder: Encoder, size: _Size) -> tuple[int, list[str]]:
    """Images that went through and the reasons of those that did not; notes what they took."""
    pixels, reasons = list[Any](), list[str]()
    seconds, file_bytes = 0.0, 0
    first = (record for shard in input_shards(config) for record in read_records(shard, config.images.max_bytes))
    for record in islice(first, SAMPLE_IMAGES):
        started = time.perf_counter()
        try:
            found = record.reason or decode(record.data or b"", encoder.preprocess)
        except Undecodable as error:
            found = error.reason
        if isinstance(found, str):
            reasons.append(found)
            continue
        seconds += time.perf_counter() - started
        file_bytes += len(record.data or b"")
        pixels.append(found)
    if pixels:
        took, on_gpu = _encoded(config, encoder, pixels)
        size.sample = Sample(file_bytes / len(pixels), seconds / len(pixels), took, on_gpu)
    return len(pixels), reasons


def _encoded(config: RunConfig, encoder: Encoder, pixels: Sequence[Any]) -> tuple[float, bool]:
    """Seconds an image takes to encode, and whether that was on a GPU; what only the first takes is left out."""
    on_gpu = bool(config.resources.gpus_per_worker) and torch.cuda.is_available()
    filled = max(len(pixels), (config.encoder.batch_size or GPU_BATCH) if on_gpu else 1)
    batch = np.stack([pixels[i % len(pixels)] for i in range(filled)])
    encoder.encode_images(batch if on_gpu else batch[:1])
    started = time.perf_counter()
    encoder.encode_images(batch)
    return (time.perf_counter() - started) / filled, on_gpu


def _method(config: RunConfig, size: _Size) -> str:
    if config.is_open:
        return _search(config, size)
    if size.images and not size.is_lower_bound and size.images < config.method.clusters:
        raise DataError(
            f"method.clusters = {config.method.clusters}: must be at most the number of images, {size.images}"
        )
    return _plan_fit(config, size)


def _search(config: RunConfig, size: _Size) -> str:
    """What select-k will fit: how often, and the largest of them."""
    options = config.select_k
    if not size.images or size.is_lower_bound:
        return f"{config.method.name} once for each candidate and seed, of which the number of images decides"
    options.refuse_above(size.images)
    first = options.first(size.images)
    largest = _plan_fit(config.closed(first[-1]), size)
    if not METHODS[config.method.name][1].refits_for_clusters:
        return f"one fit of {largest}, cut into {len(first)} candidates up to {first[-1]} clusters"
    more = f", and up to {MORE_A_ROUND * options.rounds} candidates more" if options.candidates == "auto" else ""
    fits = len(first) * options.seeds
    shown = f"{len(first)} candidates × {options.seeds} seeds = {fits} fits up to {first[-1]} clusters"
    return f"{shown}{more}; each of {largest}"


def _plan_fit(config: RunConfig, size: _Size) -> str:
    known = f"{config.method.name} on {size.dimension} values a row"
    if size.images <= config.method.clusters or not size.dimension:
        return known
    workers, resources = config.resources.workers, config.resources
    count = workers if isinstance(workers, int) else 1  # `auto` is the cluster's number of GPUs, not known here
    device = "cuda" if resources.gpus_per_worker else "cpu"
    plan = config.fitted().outlook(size.images, size.dimension, count, device)
    return f"{known}, {plan}" if plan else known


def _words(config: RunConfig, size: _Size) -> str:
    check_classes(config)
    found, own = read_lists(config), "classes" in vocabulary_kinds(config).values()
    if not found:
        return "the classes' own names" if own else "no vocabulary: clusters get no names"
    return f"{len(merged(found).words):,} words" + (", and the classes' own names" if own else "")


def _estimate(config: RunConfig, size: _Size) -> str:
    if not size.images:
        return "the number of images is not known before they are read"
    least = "at least " if size.is_lower_bound else ""
    return least + traffic(config, size.images, size.dimension, size.sample)


def _work(config: RunConfig, size: _Size) -> str:
    if size.sample is None:
        return "nothing is encoded"
    return work(config, size.images or THOUSAND, size.sample) + ("" if size.images else ", each 1,000 images")


def _cost(config: RunConfig, size: _Size) -> str:
    if not config.prices:
        return "not known: give prices, such as prices.g6.4xlarge: {dollars_per_hour: …, cpus: 16, gpus: 1}"
    if size.sample is None:
        return "nothing is encoded"
    each = "" if size.images else ", each 1,000 images"
    return f"encode{each} on " + "; on ".join(costs(config, size.images or THOUSAND, size.sample))
