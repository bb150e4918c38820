"""How workers divide a TEMI training: the rows of a batch, the heads, the clusters, or several; and what that takes.

Rows divided: every worker holds all heads, and all gradients are summed in every step. Heads divided: every worker sees
the whole batch, and all that is summed is one number a pair. Clusters divided, for heads that are too large for a
worker: every worker holds the layers before the last one and a part of that; what is summed are numbers of each row and
the gradient in front of the last layer. Any of them in a grid. All are the same training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from rayclust.errors import ConfigError
from rayclust.losses.chunked import CHUNK_BYTES, KEPT_BYTES
from rayclust.methods.base import Plan
from rayclust.methods.heads import HeadShape

OPERATIONS_PER_BYTE_SENT = 4000.0
"""Operations of matrix products in the time of a byte between workers: 400 TFLOP/s and 100 GB/s; CPUs have as many."""
OPERATIONS_PER_BYTE_HELD = 150.0
"""The same for a byte of memory that the optimiser reads or writes."""
LEAST_GRADIENTS = 1 << 24
"""Bytes of gradients below which the rows are divided, whatever is faster."""
STATE_COPIES = 4
"""Student, teacher and the optimiser's two averages."""
OPTIMIZER_BYTES = 36
"""Read and written per parameter and step."""
FLOAT, NARROW = 4, 2
PAIR_NUMBERS = 7
"""Of each pair, told to workers with other clusters: the teacher's log-sum-exps and agreement, the student's four."""
GIGABYTE = 1e9


@dataclass(frozen=True)
class Layout:
    """Workers in a grid of `head_parts` × `row_parts` × `cluster_parts`."""

    head_parts: int
    """Parts into which the heads are divided."""
    row_parts: int
    """Parts into which the rows of a batch are divided."""
    cluster_parts: int = 1
    """Parts into which the clusters of each head are divided."""

    @property
    def workers(self) -> int:
        """W."""
        return self.head_parts * self.row_parts * self.cluster_parts

    def __str__(self) -> str:
        if self.workers == 1:
            return "one worker"
        parts = {"heads": self.head_parts, "rows of a batch": self.row_parts, "clusters": self.cluster_parts}
        told = [f"{what} over {count}" for what, count in parts.items() if count > 1]
        return f"{', '.join(told[:-1])} and {told[-1]} workers" if len(told) > 1 else f"{told[0]} workers"


@dataclass(frozen=True)
class Load:
    """What a training with all its heads is made of."""

    shape: HeadShape
    """With H heads."""
    plan: Plan
    """Batch and steps."""

    def divided(self, cluster_parts: int) -> Load:
        """With the clusters of the largest of so many parts."""
        return replace(self, shape=replace(self.shape, clusters=-(-self.shape.clusters // cluster_parts)))

    @property
    def head_parameters(self) -> int:
        """Of one head."""
        widths = self.shape.widths
        inner = sum(o * i + o for i, o in pairwise(widths))
        return inner + self.shape.clusters * (self.shape.bottleneck + 1)

    @property
    def pair_operations(self) -> int:
        """Of matrix products, per head and pair in a step: teacher and student forward, both sides of the student back.

        Rows themselves get no gradient, so that the first layer has one product less.
        """
        widths = self.shape.widths
        inner = 4 * sum(o * i for i, o in pairwise(widths)) - widths[0] * widths[1]
        return 2 * 2 * (inner + 4 * self.shape.clusters * self.shape.bottleneck)


@dataclass(frozen=True)
class Estimate:
    """What a worker of a layout takes, of the largest one."""

    state_bytes: float
    """Parameters, their teacher, gradients and the optimiser's averages."""
    logits_bytes: float
    """Logits that are there at one time."""
    passing_bytes: float
    """What else is there during a step: last layers as matrix products take them, and gradients about to be summed."""
    sent_bytes: float
    """Sent and received per step."""
    operations: float
    """Of matrix products per step."""

    @property
    def cost(self) -> float:
        """Time of a step in operations."""
        held = self.state_bytes / ((STATE_COPIES + 1) * FLOAT) * OPTIMIZER_BYTES
        return self.operations + OPERATIONS_PER_BYTE_SENT * self.sent_bytes + OPERATIONS_PER_BYTE_HELD * held

    @property
    def held_bytes(self) -> float:
        """Of memory, at most at one time."""
        return self.state_bytes + self.logits_bytes + self.passing_bytes


def estimate(load: Load, layout: Layout, device: str = "cuda") -> Estimate:
    """What a layout takes of each worker.

    Args:
        load: the training.
        layout: its division.
        device: `cpu` or `cuda`, where the workers compute.
    """
    load = load.divided(layout.cluster_parts)
    heads, pairs = -(-load.shape.heads // layout.head_parts), -(-load.plan.batch_size // layout.row_parts)
    parameters, clusters = heads * load.head_parameters, load.shape.clusters
    logits = 2 * pairs * clusters * NARROW
    teacher, student = (min(heads * logits, most[device]) for most in (KEPT_BYTES, CHUNK_BYTES))
    chunk = min(heads, max(1, CHUNK_BYTES[device] // logits)) * clusters * load.shape.bottleneck
    buckets = FLOAT * parameters if layout.row_parts > 1 else 0
    return Estimate(
        state_bytes=float(FLOAT * (STATE_COPIES + 1) * parameters),
        logits_bytes=float(teacher + student),
        passing_bytes=float((2 * NARROW + FLOAT) * chunk + buckets),
        sent_bytes=_sent(load, layout, heads, pairs),
        operations=float(heads * pairs * load.pair_operations),
    )


def _sent(load: Load, layout: Layout, heads: int, pairs: int) -> float:
    """Bytes per step: gradients and p̂ over rows, trust over heads, and over clusters the numbers of each pair, of which
    each worker gets every other's, and the gradient in front of the last layer.
    """
    gradients = heads * (load.head_parameters + load.shape.clusters) * _ring(layout.row_parts)
    trust = pairs * _ring(layout.head_parts)
    features = heads * 2 * pairs * load.shape.bottleneck * _ring(layout.cluster_parts)
    sums = heads * pairs * PAIR_NUMBERS * (layout.cluster_parts - 1)
    return FLOAT * (gradients + trust + features + sums)


def _ring(workers: int) -> float:
    """Numbers that each worker sends for each one that all of them sum up."""
    return 2 * (workers - 1) / workers


def layouts(load: Load, workers: int, cluster_parts: int = 1) -> list[Layout]:
    """The grids in which every worker has a head and a pair, with so many parts of the clusters."""
    width = workers // cluster_parts
    grids = (Layout(parts, width // parts, cluster_parts) for parts in range(1, width + 1) if width % parts == 0)
    return [g for g in grids if g.head_parts <= load.shape.heads and g.row_parts <= load.plan.batch_size]


def choose(
    load: Load, workers: int, wanted: str = "auto", memory: float = float("inf"), whole_for: str | None = None
) -> Layout:
    """The layout that is wanted or, for `auto`, the one with the fastest steps.

    `auto` divides clusters only where one head does not fit into a worker, and then into as few parts as can be.

    Args:
        load: the training.
        workers: W.
        wanted: `auto`, `data`, `heads`, `clusters`, `RxC` or `RxCxS`: heads in R parts, rows in C, clusters in S.
        memory: bytes that a worker has, for `auto`.
        whole_for: what needs whole heads on every worker; None: nothing.

    Raises:
        ConfigError: the workers do not make up that grid, some would have no head or cluster, clusters must be divided
            and cannot be, or the heads do not fit into that many workers.
    """
    if wanted == "auto":
        return _fastest(load, workers, memory, whole_for)
    words = {"data": (1, workers), "heads": (workers, 1), "clusters": (1, 1, workers)}
    layout = Layout(*words.get(wanted) or (int(number) for number in wanted.split("x")))
    refuse = f"method.parallel = {wanted}: "
    if layout.workers != workers:
        raise ConfigError(
            f"{refuse}is for {layout.workers} workers, there are {workers}; set resources.workers, or auto"
        )
    for what, count, parts in (
        ("heads", load.shape.heads, layout.head_parts),
        ("clusters", load.shape.clusters, layout.cluster_parts),
    ):
        if parts > count:
            raise ConfigError(f"{refuse}{count} {what} cannot be divided over {parts} workers; use fewer, or data")
    if layout.cluster_parts > 1 and whole_for is not None:
        raise ConfigError(f"{refuse}{whole_for} needs whole heads on every worker, set data")
    return layout


def _fastest(load: Load, workers: int, memory: float, whole_for: str | None) -> Layout:
    """See `choose`."""
    found = layouts(load, workers)
    if not found or FLOAT * load.shape.heads * load.head_parameters < LEAST_GRADIENTS:
        return Layout(1, workers)
    one = estimate(replace(load, shape=replace(load.shape, heads=1)), Layout(1, 1)).held_bytes
    if workers > 1 and one > memory:
        found = [] if whole_for else _fitting(load, workers, memory)
        if not found:
            reason = f"{workers} workers cannot hold H = {load.shape.heads} of them; use more workers, fewer heads,"
            if whole_for:
                reason = f"{whole_for} needs whole heads; do without it,"
            raise ConfigError(
                f"method.clusters = {load.shape.clusters}: a head takes {one / GIGABYTE:.1f} GB, a worker has "
                f"{memory / GIGABYTE:g}, and {reason} or raise method.worker_memory"
            )
    return min(found, key=lambda layout: (estimate(load, layout).cost, layout.head_parts))


def _fitting(load: Load, workers: int, memory: float) -> list[Layout]:
    """The layouts that fit with as few parts of the clusters as can be; none where none fits."""
    for parts in range(2, min(workers, load.shape.clusters) + 1):
        if workers % parts == 0:
            found = [grid for grid in layouts(load, workers, parts) if estimate(load, grid).held_bytes <= memory]
            if found:
                return found
    return []


def outlook(load: Load, layout: Layout, device: str) -> str:
    """The layout and its estimate in a line."""
    found = estimate(load, layout, device)
    work = found.operations * load.plan.steps
    return (
        f"{layout}: {found.state_bytes / GIGABYTE:.2f} GB of weights and optimiser, "
        f"{found.logits_bytes / GIGABYTE:.2f} GB of logits and {found.passing_bytes / GIGABYTE:.2f} GB in passing "
        f"a worker, {found.sent_bytes / 1e6:.3g} MB sent a step, "
        f"{load.plan.steps:,} steps of {found.operations / 1e12:.3g} TFLOP ({work / 1e15:.3g} PFLOP a worker)"
    )
