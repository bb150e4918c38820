"""Time and memory of a TEMI step at very many clusters: the published form, all logits at once, chunks, kernels.

Claims: 16 heads of 25,000 clusters on rows of width 768 train in batches of 1,024 pairs in less than 12 GB on a CPU,
with the loss of the plain form to 1e-5 of its size. On one GPU of the H100's class: 1.28 M rows in an epoch of less
than 15 s, in less than 24 GB, and at least 10 times as fast as the published form.

    python benchmarks/temi_overcluster.py [--device cpu] [--threads 2] [--steps 3] [--shape 16,25000,768,1024 ...]

Every form runs in a process of its own, on the same batches from the same weights. Time is the least of the steps; peak
is the process's largest resident memory, on a GPU the most memory that torch has allocated; TFLOP/s counts the matrix
products of the model alone (`temi.estimate_cost`), also where a form makes some of them twice; its share is of the rate
of one large bf16 product on the same device. A form that would not fit into the memory that is free is left out, with
what it would take. Forms: published: a loop over heads in float32 (published_temi.py). whole: all logits at
once. chunks: the chunked losses on plain kernels/pair_softmax.py. kernels: the same with its kernels, on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from published_temi import PublishedTemi
from temi_step import processor, synchronize

from rayclust.kernels import pair_softmax
from rayclust.losses import information
from rayclust.methods import build
from rayclust.methods.base import Batch
from rayclust.methods.settings import EMBEDDINGS, Plan
from rayclust.methods.temi import Temi
from rayclust.methods.temi_settings import Cost, Layout, TemiConfig, estimate_cost
from rayclust.training.loop import Stepper

IMAGENET_ROWS = 1_281_167
GIGABYTE = 1e9
BATCHES = 8
"""Drawn ahead of the steps, which take them in turn."""
FORMS = {
    "cpu": ("published", "whole fp32", "chunks fp32", "chunks bf16"),
    "cuda": ("published", "whole bf16", "chunks bf16", "kernels bf16"),
}
COPIES = {"published": 4.0, "whole": 8.0}
"""Copies of all logits in float32 that a form holds at once, about; the others hold chunks."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a training."""

    heads: int
    clusters: int
    dimension: int
    pairs: int

    @property
    def logits_bytes(self) -> float:
        """Of all heads and both views in float32."""
        return 8.0 * self.pairs * self.clusters * self.heads


@dataclass(frozen=True)
class Measured:
    """What one form took."""

    seconds: float
    peak: float
    loss: float
    """After the last step; of the published form another one, its heads start elsewhere."""


def batches(shape: Shape, device: str) -> Iterator[Batch]:
    """Pairs of rows that lie near each other."""
    generator = torch.Generator().manual_seed(0)
    step = 0
    while True:
        x = torch.randn(shape.pairs, shape.dimension, generator=generator)
        y = x + 0.3 * torch.randn(shape.pairs, shape.dimension, generator=generator)
        views = torch.nn.functional.normalize(torch.stack([x, y]), dim=-1)
        yield Batch({EMBEDDINGS: views.to(device)}, torch.arange(shape.pairs), step, 1)
        step += 1


def method_of(shape: Shape, precision: str) -> Temi:
    """Heads whose teachers are sure enough for pairs to have weight."""
    settings = {"clusters": shape.clusters, "heads": shape.heads, "batch_size": shape.pairs, "precision": precision}
    settings |= {"learning_rate": 2.56e-4, "min_learning_rate": 2.56e-4, "warmup_steps": 0}
    settings |= {"preset": "none", "beta": 1.0, "freeze_last_layer": 0, "hidden": 512, "bottleneck": 256}
    method = build(TemiConfig.model_validate(settings), shape.dimension, IMAGENET_ROWS, seed=0)
    assert isinstance(method, Temi)
    with torch.no_grad():
        method.student.scale.fill_(3.0)
        method.teacher.scale.fill_(3.0)
    return method


def stepper(form: str, shape: Shape, device: str) -> Callable[[], float]:
    """Takes one step and gives its loss."""
    if form == "published":
        x = torch.nn.functional.normalize(torch.randn(2 * shape.pairs, shape.dimension), dim=-1).numpy()
        neighbors = torch.arange(2 * shape.pairs).roll(1)[:, None].numpy()
        published = PublishedTemi(x, neighbors, shape.heads, shape.clusters, torch.device(device))
        return lambda: published.step(shape.pairs, beta=1.0)
    name, precision = form.rsplit(" ", 1)
    if name == "whole":
        information.CHUNK_BYTES[device] = information.KEPT_BYTES[device] = 1 << 60
    if name == "chunks":
        pair_softmax._has_kernels = lambda logits: False
    method = method_of(shape, precision).to(device)
    steps = Stepper(method)
    drawn = itertools.cycle(list(itertools.islice(batches(shape, device), BATCHES)))  # drawing takes longer than a GPU
    return lambda: float(steps.step(next(drawn))["loss"])


def measure(form: str, shape: Shape, device: str, steps: int) -> Measured:
    """In this process."""
    step, seconds, loss = stepper(form, shape, device), [], 0.0
    for _ in range(steps):
        synchronize(torch.device(device))
        start = time.perf_counter()
        loss = step()
        synchronize(torch.device(device))
        seconds.append(time.perf_counter() - start)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(min(seconds), peak / GIGABYTE, loss)


def in_a_process(form: str, shape: Shape, arguments: argparse.Namespace) -> Measured | None:
    """The same, in a fresh one; None where it was killed."""
    told = json.dumps([form, asdict(shape), arguments.device, arguments.steps, arguments.threads])
    command = [sys.executable, __file__, "--one", told]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return Measured(**json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def free_bytes(device: str) -> float:
    """Memory that nobody uses."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024.0 * float(lines["MemAvailable"].split()[0])


def matmul_rate(device: str) -> float:
    """FLOP/s of the largest product that is worth waiting for, bf16 in and out."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    seconds = []
    for _ in range(8):
        synchronize(torch.device(device))
        start = time.perf_counter()
        a @ b
        synchronize(torch.device(device))
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))


def cost_of(shape: Shape, device: str) -> Cost:
    """Estimate what the shape's training takes of one worker."""
    config = TemiConfig.model_validate(
        {"clusters": shape.clusters, "heads": shape.heads, "preset": "none", "batch_size": shape.pairs}
    )
    plan = Plan.of(config, IMAGENET_ROWS)
    return estimate_cost(config.head_shape(shape.dimension), plan, Layout(1, 1), device)


def report(shape: Shape, arguments: argparse.Namespace, rate: float) -> None:
    """Prints a shape's table."""
    found = cost_of(shape, arguments.device)
    print(f"\nH = {shape.heads}, K = {shape.clusters:,}, D = {shape.dimension}, {shape.pairs} pairs: ", end="")
    print(
        f"{found.operations / 1e12:.3g} TFLOP a step; all logits in float32 {shape.logits_bytes / GIGABYTE:.2f} GB, ",
        end="",
    )
    print(f"weights, gradients and optimiser {found.state_bytes / GIGABYTE:.2f} GB")
    head = f"{'s/step':>9}{'peak, GB':>10}{'TFLOP/s':>9}{'of a product':>14}{'1.28 M rows':>22}{'loss':>16}"
    print(f"  {'':18}{head}")
    for form in arguments.forms or FORMS[arguments.device]:
        needs = found.state_bytes + COPIES.get(form.split()[0], 0.0) * shape.logits_bytes
        if needs > 0.75 * free_bytes(arguments.device):
            print(f"  {form:18}left out: takes about {needs / GIGABYTE:.0f} GB")
            continue
        one = in_a_process(form, shape, arguments)
        if one is None:
            print(f"  {form:18}failed, or was killed for its memory")
            continue
        speed, epoch = found.operations / one.seconds, IMAGENET_ROWS / shape.pairs * one.seconds
        share, length = f"{speed / rate:.0%}", f"{epoch:,.0f} s"
        loss = f"{one.loss:.9f}" if form != "published" else ""
        print(
            f"  {form:18}{one.seconds:9.3f}{one.peak:10.2f}{speed / 1e12:9.3f}{share:>14}{length:>22}{loss:>16}",
            flush=True,
        )


def main() -> None:
    """Measures all shapes on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", help="H,K,D,B; several times for several shapes")
    parser.add_argument("--forms", nargs="+", help="some of the forms, such as 'chunks fp32'")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        form, sizes, device, steps, threads = json.loads(arguments.one)
        torch.set_num_threads(threads)
        print(json.dumps(asdict(measure(form, Shape(**sizes), device, steps))))
        return
    torch.set_num_threads(arguments.threads)
    print("python " + shlex.join(["benchmarks/temi_overcluster.py", *sys.argv[1:]]))
    print(f"{processor()}; {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    if arguments.device == "cuda":
        print(torch.cuda.get_device_name())
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    rate = matmul_rate(arguments.device)
    print(f"one bf16 product alone: {rate / 1e12:.2f} TFLOP/s")
    for text in arguments.shape or ["16,25000,768,128", "16,25000,768,1024"]:
        report(Shape(*map(int, text.split(","))), arguments, rate)


if __name__ == "__main__":
    main()
