"""What a run will read, write, take and cost, from a few of its images and the prices in its config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rayclust.config import RunConfig
from rayclust.prices import NodePrice
from rayclust.stages.progress import duration

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
