"""Check a run before it costs money: access, encoder, vocabulary, a sample of its images, and estimates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from rayclust.config import RunConfig
from rayclust.encoders.decode import Undecodable
from rayclust.encoders.tensors import load_tensors
from rayclust.errors import DataError, RayclustError
from rayclust.language.vocabulary import merged
from rayclust.methods import is_recuttable
from rayclust.metrics.selection import geometric_grid
from rayclust.report.formats import duration, size
from rayclust.runtime.cluster import describe_placement, has_idle_gpu
from rayclust.runtime.encoder import RunEncoders, encoding, refuse_other_width
from rayclust.runtime.inputs import input_shards, refuse_misplaced, source_shards, with_encoder
from rayclust.runtime.members import plan_members
from rayclust.runtime.spaces import plan_ready
from rayclust.runtime.trackers import refuse_missing
from rayclust.runtime.vocabularies import check_classes, noun_lists, read_lists, vocabulary_kinds
from rayclust.store import storage
from rayclust.store.lock import check_conditional_puts
from rayclust.store.sources import read_records, read_rows

HOUR = 3600.0
NEIGHBOR_BYTES = 10
"""Of one neighbour in storage: its row, int64, and its similarity, float16."""
SAMPLE_IMAGES = 16
"""Images that are decoded and encoded."""
LISTED_SHARDS = 1000
"""Shards that are listed to estimate the size of the run."""
THOUSAND = 1000
"""Images in the estimates if their number is not known."""
GPU_BATCH = 256
"""Images per pass through the network on a GPU, if the config leaves it open."""
REFINED_PER_ROUND = 4
"""Most candidates that a round of select-k's refinement adds."""


@dataclass(frozen=True)
class Sample:
    """Mean cost of the first images on this machine."""

    file_bytes: float
    """Of an encoded image."""
    decode_seconds: float
    """Of one CPU."""
    encode_seconds: float
    """Of one GPU, or of one CPU if `on_gpu` is false."""
    on_gpu: bool


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    subject: str
    good: bool
    text: str


def check(config: RunConfig) -> list[Finding]:
    """Check everything that a run needs, without Ray and without writing any artefact.

    All subjects are checked, also after one that is bad; each gives one finding.
    """
    checks = _Checks(config)
    config = checks.config
    subjects: dict[str, Callable[[], str]] = {
        "config": checks.describe_config,
        "run": checks.run,
        "images": checks.list_images,
        "gpus": checks.gpus,
        "encoder": checks.encoder,
        "method": checks.method,
        "label": checks.vocabulary,
        "estimate": lambda: (
            ("at least " if checks.is_lower_bound and checks.images else "")
            + traffic(config, checks.images, checks.dimension, checks.sample)
        ),
        "work": lambda: work(config, checks.images, checks.sample),
        "placement": lambda: describe_placement(config.resources.placement),
        "cost": lambda: cost(config, checks.images, checks.sample),
    }
    findings = []
    for subject, step in subjects.items():
        try:
            findings.append(Finding(subject, True, step()))
        except RayclustError as error:
            findings.append(Finding(subject, False, str(error)))
    return findings


class _Checks:
    """The checks of one run, in order: each may use the results of those before it."""

    def __init__(self, config: RunConfig) -> None:
        # `auto` as a run on this machine would take it; a cluster is not asked.
        self.has_gpu = torch.cuda.is_available()
        if config.resources.gpus_per_worker == "auto":
            resources = config.resources.model_copy(update={"gpus_per_worker": float(self.has_gpu)})
            config = config.model_copy(update={"resources": resources})
        self.config = config
        images = config.images
        self.sources = [images.uri] if images.test is None else [images.uri, images.test]
        self.images = 0
        self.is_lower_bound = False
        self.dimension = 0
        self.sample: Sample | None = None

    def describe_config(self) -> str:
        refuse_missing(self.config)
        candidates = self.config.select_k.candidates
        clusters = str(self.config.method.clusters)
        if candidates is not None:
            clusters = "auto" if candidates == "auto" else "one of " + ", ".join(map(str, candidates))
        return f"method {self.config.method.name}, {clusters} clusters"

    def run(self) -> str:
        storage.check_writable(self.config.run)
        if storage.is_remote(self.config.run):  # a local folder is locked by the system, and stays as it is
            check_conditional_puts(self.config.run)
        return f"{self.config.run} can be written"

    def list_images(self) -> str:
        refuse_misplaced(self.config)
        lines = list[str]()
        for source in self.sources:
            shards = list(islice(source_shards(self.config, source), LISTED_SHARDS))
            is_cut = len(shards) == LISTED_SHARDS
            is_bound = is_cut or any(shard.count is None for shard in shards)
            count = sum(shard.count or 0 for shard in shards)
            self.images, self.is_lower_bound = self.images + count, self.is_lower_bound or is_bound
            counted = f"{count:,} images" if count else "images"
            more = " at least" if is_bound and count else ""
            lines.append(f"{shards[0].kind}: {counted}{more} in {len(shards):,} shards{'+' if is_cut else ''}")
        return "; kept aside, ".join(lines)

    def gpus(self) -> str:
        here = f"1 × {torch.cuda.get_device_name()}" if self.has_gpu else "CPU only"
        if os.environ.get("RAY_ADDRESS"):
            return f"as the cluster at RAY_ADDRESS has them; this machine: {here}"
        if self.has_gpu and not self.config.resources.gpus:
            return f"{here} lies idle: set resources.gpus_per_worker to 1, or leave it out"
        if has_idle_gpu():
            return f"a GPU lies idle: torch {torch.__version__} sees no CUDA device; install a CUDA build"
        return here

    def encoder(self) -> str:
        self.config = with_encoder(self.config, lambda: self.config.resources.gpus > 0)
        shards = list(islice(input_shards(self.config), LISTED_SHARDS))
        ready = {space.name: space for space in plan_ready(self.config, shards)}
        self.dimension = sum(space.width for space in ready.values())
        described = [f"{name}, ready embeddings of {space.width} values" for name, space in ready.items()]
        for encoder in self.config.encoders:
            if encoder.space in ready:
                refuse_other_width(self.config, ready[encoder.space].width, encoder)
        firsts = {source: next(source_shards(self.config, source)) for source in self.sources}
        if len({shard.has_embeddings for shard in firsts.values()}) > 1:
            raise DataError(f"images.test = {self.config.images.test}: one input holds images and the other embeddings")
        if shards[0].has_embeddings:
            # Ready embeddings, of which the first shard of each input is read.
            width = 0
            for source, shard in firsts.items():
                rows = read_rows(shard, load_tensors=load_tensors)
                if not rows.keys:
                    raise DataError(f"{shard.uri}: none of the first {len(rows.rejects)} embeddings can be used")
                found = int(rows.embeddings.shape[1])
                width = width or found
                if found != width:
                    others = f"embeddings of {found} values; those of images.uri have {width}"
                    raise DataError(f"images.test = {source}: {others}")
                for space in ready.values() if source == self.sources[0] else ():
                    space.rows(rows.keys, 0)
            self.dimension += width
            refuse_other_width(self.config, width)
            name = self.config.each_encoder[0].name
            none = ": no names, no search by text or image" if name == "unknown" and not ready else ""
            return "; ".join([f"{name}, ready embeddings of {width} values{none}", *described])
        encoders = RunEncoders(self.config)
        self.dimension += encoders.dimension
        rejected = ""
        for source in reversed(self.sources):  # costs follow from the sample of the first
            good, reasons = self._encode_sample(encoders, source)
            where = f"images.test = {source}: " if source == self.config.images.test else ""
            if not good:
                why = f"none of the first {len(reasons)} images can be decoded: {', '.join(sorted(set(reasons)))}"
                raise DataError(where + (why if reasons else "the input holds no image"))
            rejected += f", {where}{len(reasons)} of the first {good + len(reasons)} images rejected" if reasons else ""
        named = [f"{encoder.name}, {encoder.dimension} values an image" for encoder in encoders.encoders]
        return "; ".join([*named, *described]) + rejected

    def _encode_sample(self, encoders: RunEncoders, source: str) -> tuple[int, list[str]]:
        """Decode and encode the first images; return how many were good, and the reasons of the rejects."""
        config, pixels, reasons = self.config, list[list[np.ndarray]](), list[str]()
        seconds, file_bytes = 0.0, 0
        shards = source_shards(config, source)
        records = (record for shard in shards for record in read_records(shard, config.images.max_bytes))
        for record in islice(records, SAMPLE_IMAGES):
            started = time.perf_counter()
            try:
                found = record.reason or encoders.decode(record.data or b"")
            except Undecodable as error:
                found = error.reason
            if isinstance(found, str):
                reasons.append(found)
                continue
            seconds += time.perf_counter() - started
            file_bytes += len(record.data or b"")
            pixels.append(found)
        if pixels:
            on_gpu = bool(config.resources.gpus) and torch.cuda.is_available()
            usual = max(encoder.batch_size or GPU_BATCH for encoder in encoding(config))
            rows = max(len(pixels), usual if on_gpu else 1)
            batch = [np.stack([kind[i % len(kind)] for i in range(rows)]) for kind in zip(*pixels, strict=True)]
            # Not timed: only the first call allocates.
            encoders.encode(batch if on_gpu else [kind[:1] for kind in batch])
            started = time.perf_counter()
            encoders.encode(batch)
            encode_seconds = (time.perf_counter() - started) / rows
            self.sample = Sample(file_bytes / len(pixels), seconds / len(pixels), encode_seconds, on_gpu)
        return len(pixels), reasons

    def method(self) -> str:
        config, options = self.config, self.config.select_k
        plan_members(config)
        is_known = bool(self.images) and not self.is_lower_bound
        if not config.needs_selection:
            if is_known and self.images < config.method.clusters:
                raise DataError(
                    f"method.clusters = {config.method.clusters}: must be at most the number of images, {self.images}"
                )
            return self._describe_fit(config)
        # How often select-k will fit, and the largest of its fits.
        if not is_known:
            return f"{config.method.name} once for each candidate and seed, of which the number of images decides"
        options.refuse_above(self.images)
        listed, bounds = options.candidates, options.bounds(self.images)
        first = listed if isinstance(listed, tuple) else geometric_grid(*bounds)
        largest = self._describe_fit(config.with_clusters(first[-1]))
        if is_recuttable(config.method.name):
            return f"one fit of {largest}, cut into {len(first)} candidates up to {first[-1]} clusters"
        most = REFINED_PER_ROUND * options.rounds
        more = f", and up to {most} candidates more" if options.candidates == "auto" else ""
        fits = len(first) * options.seeds
        shown = f"{len(first)} candidates × {options.seeds} seeds = {fits} fits up to {first[-1]} clusters"
        return f"{shown}{more}; each of {largest}"

    def _describe_fit(self, config: RunConfig) -> str:
        known = f"{config.method.name} on {self.dimension} values a row"
        if self.images <= config.method.clusters or not self.dimension:
            return known
        workers, resources = config.resources.workers, config.resources
        count = workers if isinstance(workers, int) else 1  # `auto` is the cluster's number of GPUs, not known here
        device = "cuda" if resources.gpus else "cpu"
        plan = config.method.describe_plan(self.images, self.dimension, count, device)
        return f"{known}, {plan}" if plan else known

    def vocabulary(self) -> str:
        check_classes(self.config)
        found, own = read_lists(self.config), "classes" in vocabulary_kinds(self.config).values()
        shown = f"{len(merged(found).words):,} words" + (", and the classes' own names" if own else "")
        if not found:
            shown = "the classes' own names" if own else "no vocabulary: clusters get no names"
        if self.config.method.reads_words:
            nouns = merged(read_lists(self.config, names=noun_lists(self.config)))
            shown += f"; {self.config.method.name} chooses among {len(nouns.words):,} nouns"
        return shown


def traffic(config: RunConfig, images: int, dimension: int, sample: Sample | None) -> str:
    """Return bytes read and written, and those on a training node, in one line; embeddings have `dimension` values."""
    if not images:
        return "the number of images is not known before they are read"
    stored, neighbors = images * dimension * 2, images * min(config.neighbors.k, images - 1) * NEIGHBOR_BYTES
    read = f"reads {size(images * sample.file_bytes)} of images; " if sample else ""
    return (
        f"{read}{size(stored)} of embeddings and {size(neighbors)} of neighbours in storage, "
        f"{size(images * dimension * 4)} of rows per training node"
    )


def work(config: RunConfig, images: int, sample: Sample | None) -> str:
    """Return CPU and GPU time of encode at this machine's speed, and how many CPUs keep a GPU busy, in one line."""
    if sample is None:
        return "nothing is encoded"
    decode, encode = ((images or THOUSAND) * seconds for seconds in (sample.decode_seconds, sample.encode_seconds))
    each = "" if images else ", each 1,000 images"
    if not config.resources.gpus:
        return f"decode {duration(decode)} and encode {duration(encode)} of CPU time at the speed of this machine{each}"
    if not sample.on_gpu:
        return f"decode {duration(decode)} of CPU time; how fast a GPU encodes cannot be seen on this machine{each}"
    ratio = sample.decode_seconds / sample.encode_seconds
    return (
        f"decode {duration(decode)} of CPU time and encode {duration(encode)} of GPU time at this machine's speed: "
        f"{ratio:.1f} CPUs keep one GPU busy{each}"
    )


def cost(config: RunConfig, images: int, sample: Sample | None) -> str:
    """Return hours and dollars of encode on each kind of node in `prices`, and whether its CPUs or GPUs bound it."""
    if not config.prices:
        return "not known: give prices, such as prices: {g6.4xlarge: {dollars_per_hour: …, cpus: 16, gpus: 1}}"
    if sample is None:
        return "nothing is encoded"
    count, needs_gpus, found = images or THOUSAND, bool(config.resources.gpus), list[str]()
    for name, node in config.prices.items():
        hours, before, after = count * sample.decode_seconds / HOUR / node.cpus, "", ""
        rate = node.images_per_second  # of one GPU, or one CPU
        if rate is None and needs_gpus == sample.on_gpu:
            rate = 1 / sample.encode_seconds
        if needs_gpus and not node.gpus:
            before = "decoding alone takes "
        elif rate is None:
            unknown = f"set prices.{name}.images_per_second: no GPU is here to see how fast one encodes"
            found.append(f"{name}: not known, {unknown}")
            continue
        elif not needs_gpus:
            hours = count * (sample.decode_seconds + 1 / rate) / HOUR / node.cpus
        else:
            # The node's own CPUs decode: the slower of the two bounds it.
            encode = count / rate / HOUR / node.gpus
            needed, there = sample.decode_seconds * rate, node.cpus / node.gpus
            bound = f"its GPUs bound it, {needed:.1f} of {there:.1f} CPUs a GPU are busy"
            if encode < hours:
                bound = f"its CPUs bound it, {needed:.1f} a GPU are needed and {there:.1f} are there: add CPU nodes"
            hours, after = max(encode, hours), f", {encode * node.gpus:.2f} GPU hours; {bound}"
        found.append(f"{name}: {before}{hours:.2f} node hours, ${hours * node.dollars_per_hour:,.2f}{after}")
    each = "" if images else ", each 1,000 images"
    return f"encode{each} on " + "; on ".join(found)
