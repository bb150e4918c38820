"""Time of one TEMI training step: the published form against ours, and ours against the matrix products it is made of.

Claims, in one run: on a GPU a step is at least 10 times as fast as the published form; on a CPU it is no slower in
float32, and faster in bf16 where the processor multiplies that fast.

    python benchmarks/temi_step.py [--threads 2] [--rounds 9] [--device cpu] [--compile]
        [--shape 16,10 --shape 50,1000]

A step draws a batch of 512 pairs of rows of width 1280, runs teacher and student, back-propagates, and updates both.
All contenders take turns, round after round, so that a busy machine disturbs all alike; times are the least and, in
brackets, the median over rounds. The rate of the products alone is that of bf16 products of the same sizes over
operands of all heads, each in the layout and call that was fastest here. What a step reaches of it is
(operations of its products / its time) / that rate.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from published_temi import PublishedTemi

from rayclust.methods import build
from rayclust.methods.temi_settings import TemiConfig
from rayclust.training.loop import Stepper
from rayclust.training.sampling import ArrayRows, RowSource

D, B, HIDDEN, BOTTLENECK = 1280, 512, 512, 256
R, N, NEIGHBORS = 2 * B, 20 * B, 50
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Product:
    """One head's product left (O I) times right (I R), and how often a step needs it."""

    name: str
    rows: int
    inner: int
    columns: int
    times: int = 1
    shared: bool = False
    """Whether all heads have the same right side."""

    @property
    def operations(self) -> int:
        """Of one head in a step."""
        return 2 * self.times * self.rows * self.inner * self.columns


def products(clusters: int) -> list[Product]:
    """Those of one head in a step; forward ones are needed by student and teacher."""
    return [
        Product("W1 x", HIDDEN, D, R, 2, shared=True),
        Product("W2 h", BOTTLENECK, HIDDEN, R, 2),
        Product("W3 u", clusters, BOTTLENECK, R, 2),
        Product("dW3", clusters, R, BOTTLENECK),
        Product("du", BOTTLENECK, clusters, R),
        Product("dW2", BOTTLENECK, R, HIDDEN),
        Product("dh", HIDDEN, BOTTLENECK, R),
        Product("dW1", HIDDEN, R, D, shared=True),
    ]


def calls(product: Product, heads: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The ways to compute one kind of product for all heads, by name."""
    left = torch.randn(heads, product.rows, product.inner, device=device).to(BF16)
    right = torch.randn(1 if product.shared else heads, product.inner, product.columns, device=device).to(BF16)
    flipped = right.mT.contiguous().mT
    out = torch.empty(heads, product.rows, product.columns, dtype=BF16, device=device)
    ways: dict[str, Callable[[], object]] = {}
    for order, other in (("", right), (" of transposed", flipped)):
        if product.shared:
            ways["one product" + order] = lambda other=other: torch.mm(
                left.flatten(0, 1), other[0], out=out.flatten(0, 1)
            )
        ways["bmm" + order] = lambda other=other: torch.bmm(left, other.expand(heads, -1, -1), out=out)
    return ways


@dataclass
class Contender:
    """What takes turns, and its times."""

    name: str
    run: Callable[[], object]
    repeats: int = 1
    seconds: list[float] | None = None

    def take_turn(self, device: torch.device) -> None:
        """Measure once."""
        synchronize(device)
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.run()
        synchronize(device)
        self.seconds = [*(self.seconds or []), (time.perf_counter() - start) / self.repeats]

    @property
    def least(self) -> float:
        """Seconds."""
        return min(self.seconds or [float("nan")])

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds or [float("nan")])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(ways: dict[str, Callable[[], object]], device: torch.device) -> tuple[str, Callable[[], object]]:
    """The way with the least time of five, after two to warm up."""
    trials = {name: Contender(name, run) for name, run in ways.items()}
    for trial in trials.values():
        trial.run(), trial.run()
    for _ in range(5):
        for trial in trials.values():
            trial.take_turn(device)
    best = min(trials.values(), key=lambda trial: trial.least)
    return best.name, best.run


def planted() -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around 100 points, and 50 neighbours of each row from around the same point."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(100, size=N))
    x = rng.normal(size=(100, D))[labels] + rng.normal(size=(N, D))
    starts = np.searchsorted(labels, labels)
    sizes = np.bincount(labels, minlength=100)[labels]
    neighbors = starts[:, None] + rng.integers(sizes[:, None], size=(N, NEIGHBORS))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), neighbors


class Ours:
    """Batches and steps as a training takes them."""

    def __init__(
        self, x: np.ndarray, neighbors: np.ndarray, shape: tuple[int, int], precision: str, device: str
    ) -> None:
        heads, clusters = shape
        settings = {"clusters": clusters, "heads": heads, "preset": "none", "neighbors": NEIGHBORS, "batch_size": B}
        settings |= {"precision": precision, "freeze_last_layer": 0, "epochs": 1000}
        self.method = build(TemiConfig.model_validate(settings), D, N, seed=0).to(device)
        self.stepper = Stepper(self.method)
        source = RowSource(ArrayRows(x, neighbors), self.method.pairing, 0, torch.device(device))
        self.batches = source.batches(self.method.plan, rank=0)

    def compiled(self) -> Ours:
        """Take the losses through torch.compile."""
        self.method.training_step = torch.compile(self.method.training_step)
        return self

    def step(self) -> None:
        """Take one step on a new batch."""
        self.stepper.step(next(self.batches))


def contenders(shape: tuple[int, int], device: str, compiled: bool) -> list[Contender]:
    """The published form and ours in both precisions."""
    x, neighbors = planted()
    published = PublishedTemi(x, neighbors, *shape, torch.device(device))
    quick = 20 if device == "cuda" else 5
    found = [
        Contender("published form, float32", published.step),
        Contender("  of which its loader", lambda: published.batch(B)),
        Contender("ours, float32", Ours(x, neighbors, shape, "fp32", device).step),
        Contender("ours, bf16", Ours(x, neighbors, shape, "bf16", device).step, quick),
    ]
    if compiled:
        for precision in ("fp32", "bf16"):
            ours = Ours(x, neighbors, shape, precision, device).compiled()
            found.append(Contender(f"ours, {precision}, compiled", ours.step))
    return found


def measure(shape: tuple[int, int], rounds: int, device: str, compiled: bool) -> None:
    """Print the tables of one shape."""
    heads, clusters = shape
    where = torch.device(device)
    parts = products(clusters)
    chosen = [fastest(calls(part, heads, where), where) for part in parts]
    alone = [Contender(part.name, run, 3) for part, (_, run) in zip(parts, chosen, strict=True)]
    steps = contenders(shape, device, compiled)
    for contender in steps:
        start = time.perf_counter()
        contender.run(), contender.run()
        print(f"  {contender.name}: first two steps {time.perf_counter() - start:.1f} s", flush=True)
    for _ in range(rounds):
        for contender in (*steps, *alone):
            contender.take_turn(where)
    report(shape, steps, [(part, way, run) for part, (way, _), run in zip(parts, chosen, alone, strict=True)])


def report(shape: tuple[int, int], steps: list[Contender], alone: list[tuple[Product, str, Contender]]) -> None:
    """Print times, ratios and rates."""
    heads, clusters = shape
    operations = heads * sum(part.operations for part, _, _ in alone)
    print(f"\nH = {heads}, K = {clusters}, D = {D}, {B} pairs: {operations / 1e9:.1f} GFLOP in products per step")
    least = sum(part.times * run.least for part, _, run in alone)
    median = sum(part.times * run.median for part, _, run in alone)
    print(f"  {'':28}{'ms, least (median)':>22}{'published / this':>20}{'TFLOP/s':>10}{'of products alone':>20}")
    first = steps[0]
    for step in steps:
        ratio = f"{first.least / step.least:.2f} ({first.median / step.median:.2f})"
        fraction = f"{least / step.least:.0%} ({median / step.median:.0%})"
        rate = f"{operations / step.least / 1e12:.2f}"
        tail = "" if "loader" in step.name else f"{ratio:>20}{rate:>10}{fraction:>20}"
        print(f"  {step.name:28}{milliseconds(step.least, step.median)}{tail}")
    rate = f"{operations / least / 1e12:.2f}"
    print(f"  {'bf16 products alone':28}{milliseconds(least, median)}{'':>20}{rate:>10}")
    for part, way, run in alone:
        sizes = f"{part.rows}x{part.inner} {part.inner}x{part.columns}"
        rate = f"{heads * part.operations / part.times / run.least / 1e12:.2f}"
        times = f"{part.times} x " if part.times > 1 else ""
        print(f"    {times + part.name:10}{sizes:20}{way:24}{milliseconds(run.least, run.median)}{rate:>10}")


def milliseconds(least: float, median: float) -> str:
    """Both, in a column."""
    return f"{f'{least * 1e3:.2f} ({median * 1e3:.2f})':>22}"


def processor() -> str:
    """Its name and what matters here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    wanted = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())}, {' '.join(wanted)}"


def main() -> None:
    """Measure all shapes on one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well, and its first steps")
    parser.add_argument("--shape", action="append", help="H,K; several times for several shapes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("python " + " ".join(["benchmarks/temi_step.py", *sys.argv[1:]]))
    print(f"{processor()}; {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    if arguments.device == "cuda":
        print(torch.cuda.get_device_name())
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    for text in arguments.shape or ["16,10", "50,1000"]:
        heads, clusters = map(int, text.split(","))
        measure((heads, clusters), arguments.rounds, arguments.device, arguments.compile)


if __name__ == "__main__":
    main()
