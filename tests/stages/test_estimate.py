"""Numbers worked out by hand: 7,200,000 images, 1 ms of a CPU to decode, 0.5 ms of a GPU to encode, 100 kB each."""

from __future__ import annotations

from typing import Any

from rayclust.config import RunConfig, validate
from rayclust.runtime.preflight import Sample, costs, traffic, work
from tests.stages.runs import tree

IMAGES = 7_200_000
GPU = Sample(file_bytes=100_000, decode_seconds=1e-3, encode_seconds=0.5e-3, on_gpu=True)
CPU = Sample(file_bytes=100_000, decode_seconds=1e-3, encode_seconds=9e-3, on_gpu=False)


def config(gpus: float, **prices: Any) -> RunConfig:
    return validate(
        tree("s3://b/r", "s3://b/i", neighbors={"k": 50}, resources={"gpus_per_worker": gpus}, prices=prices)
    )


def test_bytes():
    assert traffic(config(1), IMAGES, 768, GPU) == (
        "reads 720.00 GB of images; 11.06 GB of embeddings and 3.60 GB of neighbours in storage, 22.12 GB of rows per "
        "training node"
    )
    assert traffic(config(0), 0, 768, None).startswith("0.00 GB of embeddings")


def test_two_hours_of_a_cpu_to_one_of_a_gpu():
    assert work(config(1), IMAGES, GPU) == (
        "decode 2 h 0 min of CPU time and encode 1 h 0 min of GPU time at this machine's speed: "
        "2.0 CPUs keep one GPU busy"
    )
    assert work(config(0), IMAGES, CPU).startswith("decode 2 h 0 min and encode 18 h 0 min of CPU time")
    assert "cannot be seen" in work(config(1), IMAGES, CPU)


def test_the_slower_of_cpus_and_gpus_bounds_a_node():
    prices = {
        "wide": {"dollars_per_hour": 3, "cpus": 16, "gpus": 1},
        "narrow": {"dollars_per_hour": 2, "cpus": 1, "gpus": 1},
        "fast": {"dollars_per_hour": 8, "cpus": 16, "gpus": 4, "images_per_second": 8000},
        "plain": {"dollars_per_hour": 1, "cpus": 32},
    }
    assert list(costs(config(1, **prices), IMAGES, GPU)) == [
        "wide: 1.00 node hours, $3.00, 1.00 GPU hours; its GPUs bound it, 2.0 of 16.0 CPUs a GPU are busy",
        "narrow: 2.00 node hours, $4.00, 1.00 GPU hours; its CPUs bound it, 2.0 a GPU are needed and 1.0 are there: "
        "add CPU nodes",
        "fast: 0.12 node hours, $1.00, 0.25 GPU hours; its CPUs bound it, 8.0 a GPU are needed and 4.0 are there: "
        "add CPU nodes",
        "plain: decoding alone takes 0.06 node hours, $0.06",
    ]


def test_without_gpus_the_cpus_do_both():
    prices = {
        "plain": {"dollars_per_hour": 1.5, "cpus": 10},
        "known": {"dollars_per_hour": 1, "cpus": 10, "images_per_second": 1000},
    }
    assert list(costs(config(0, **prices), IMAGES, CPU)) == [
        "plain: 2.00 node hours, $3.00",
        "known: 0.40 node hours, $0.40",
    ]


def test_a_gpu_that_is_not_here_is_not_guessed():
    prices = {"far": {"dollars_per_hour": 1, "cpus": 16, "gpus": 1}}
    [line] = costs(config(1, **prices), IMAGES, CPU)
    assert line.startswith("far: not known, set prices.far.images_per_second")
    assert "$" not in line
