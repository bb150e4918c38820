"""check: refuse a bad run before it costs money."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from rayclust.config import RunConfig
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Undecodable, decode
from rayclust.errors import DataError, RayclustError
from rayclust.language.vocabulary import merged
from rayclust.methods import METHODS
from rayclust.stages import estimate
from rayclust.stages.estimate import Sample
from rayclust.stages.inputs import input_shards
from rayclust.stages.models import load_run_encoder
from rayclust.stages.placing import plan
from rayclust.stages.words import check_classes, kinds, read_lists
from rayclust.store import filesystem
from rayclust.store.sources import Shard, read_records, read_rows

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
        ("placement", lambda config, size: plan(config.resources.placement)),
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
    good, reasons = _tried(config, encoder, size)
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


def _tried(config: RunConfig, encoder: Encoder, size: _Size) -> tuple[int, list[str]]:
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
    return _fit(config, size)


def _search(config: RunConfig, size: _Size) -> str:
    """What select-k will fit: how often, and the largest of them."""
    options = config.select_k
    if not size.images or size.is_lower_bound:
        return f"{config.method.name} once for each candidate and seed, of which the number of images decides"
    options.refuse_above(size.images)
    first = options.first(size.images)
    largest = _fit(config.closed(first[-1]), size)
    if not METHODS[config.method.name][1].refits_for_clusters:
        return f"one fit of {largest}, cut into {len(first)} candidates up to {first[-1]} clusters"
    more = f", and up to {MORE_A_ROUND * options.rounds} candidates more" if options.candidates == "auto" else ""
    fits = len(first) * options.seeds
    shown = f"{len(first)} candidates × {options.seeds} seeds = {fits} fits up to {first[-1]} clusters"
    return f"{shown}{more}; each of {largest}"


def _fit(config: RunConfig, size: _Size) -> str:
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
    found, own = read_lists(config), "classes" in kinds(config).values()
    if not found:
        return "the classes' own names" if own else "no vocabulary: clusters get no names"
    return f"{len(merged(found).words):,} words" + (", and the classes' own names" if own else "")


def _estimate(config: RunConfig, size: _Size) -> str:
    if not size.images:
        return "the number of images is not known before they are read"
    least = "at least " if size.is_lower_bound else ""
    return least + estimate.traffic(config, size.images, size.dimension, size.sample)


def _work(config: RunConfig, size: _Size) -> str:
    if size.sample is None:
        return "nothing is encoded"
    return estimate.work(config, size.images or THOUSAND, size.sample) + ("" if size.images else ", each 1,000 images")


def _cost(config: RunConfig, size: _Size) -> str:
    if not config.prices:
        return "not known: give prices, such as prices.g6.4xlarge: {dollars_per_hour: …, cpus: 16, gpus: 1}"
    if size.sample is None:
        return "nothing is encoded"
    each = "" if size.images else ", each 1,000 images"
    return f"encode{each} on " + "; on ".join(estimate.costs(config, size.images or THOUSAND, size.sample))
