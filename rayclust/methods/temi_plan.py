"""How workers divide a TEMI training: the rows of a batch, the heads, or both; and what that takes.

Rows divided: every worker holds all heads, and all gradients are summed in every step. Heads divided: every worker sees
the whole batch, and all that is summed is one number a pair. Both in a grid. All three are the same training.
"""

from __future__ import annotations

from dataclasses import dataclass
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
GIGABYTE = 1e9


@dataclass(frozen=True)
class Layout:
    """Workers in a grid of `head_parts` × `row_parts`."""

    head_parts: int
    """Parts into which the heads are divided."""
    row_parts: int
    """Parts into which the rows of a batch are divided."""

    def __str__(self) -> str:
        if self.head_parts == self.row_parts == 1:
            return "one worker"
        if self.head_parts == 1:
            return f"rows of a batch over {self.row_parts} workers"
        if self.row_parts == 1:
            return f"heads over {self.head_parts} workers"
        return f"heads over {self.head_parts} and rows of a batch over {self.row_parts} workers"


@dataclass(frozen=True)
class Load:
    """What a training with all its heads is made of."""

    shape: HeadShape
    """With H heads."""
    plan: Plan
    """Batch and steps."""

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
    sent_bytes: float
    """Sent and received per step."""
    operations: float
    """Of matrix products per step."""

    @property
    def cost(self) -> float:
        """Time of a step in operations."""
        held = self.state_bytes / ((STATE_COPIES + 1) * FLOAT) * OPTIMIZER_BYTES
        return self.operations + OPERATIONS_PER_BYTE_SENT * self.sent_bytes + OPERATIONS_PER_BYTE_HELD * held


def estimate(load: Load, layout: Layout, device: str = "cuda") -> Estimate:
    """What a layout takes of each worker.

    Args:
        load: the training.
        layout: its division.
        device: `cpu` or `cuda`, where the workers compute.
    """
    heads = -(-load.shape.heads // layout.head_parts)
    pairs = -(-load.plan.batch_size // layout.row_parts)
    parameters = heads * load.head_parameters
    head_logits = 2 * pairs * load.shape.clusters * NARROW
    teacher = min(heads * head_logits, KEPT_BYTES[device])
    student = min(heads * head_logits, CHUNK_BYTES[device])
    gradients = 2 * FLOAT * (parameters + heads * load.shape.clusters) * (layout.row_parts - 1) / layout.row_parts
    trust = 2 * FLOAT * pairs * (layout.head_parts - 1) / layout.head_parts
    return Estimate(
        state_bytes=float(FLOAT * (STATE_COPIES + 1) * parameters),
        logits_bytes=float(teacher + student),
        sent_bytes=gradients + trust,
        operations=float(heads * pairs * load.pair_operations),
    )


def layouts(load: Load, workers: int) -> list[Layout]:
    """The grids in which every worker has a head and a pair."""
    grids = (Layout(parts, workers // parts) for parts in range(1, workers + 1) if workers % parts == 0)
    return [g for g in grids if g.head_parts <= load.shape.heads and g.row_parts <= load.plan.batch_size]


def choose(load: Load, workers: int, wanted: str = "auto") -> Layout:
    """The layout that is wanted or, for `auto`, the one with the fastest steps.

    Args:
        load: the training.
        workers: W.
        wanted: `auto`, `data`, `heads`, or `RxC`: heads in R parts, rows in C.

    Raises:
        ConfigError: the workers do not make up that grid, or some would have no head.
    """
    if wanted == "auto":
        found = layouts(load, workers)
        if not found or FLOAT * load.shape.heads * load.head_parameters < LEAST_GRADIENTS:
            return Layout(1, workers)
        return min(found, key=lambda layout: (estimate(load, layout).cost, layout.head_parts))
    parts = {"data": (1, workers), "heads": (workers, 1)}.get(wanted)
    head_parts, row_parts = parts or (int(number) for number in wanted.split("x"))
    if head_parts * row_parts != workers:
        raise ConfigError(
            f"method.parallel = {wanted}: is for {head_parts * row_parts} workers, there are {workers}; "
            "set resources.workers, or auto"
        )
    if head_parts > load.shape.heads:
        raise ConfigError(
            f"method.parallel = {wanted}: {load.shape.heads} heads cannot be divided over {head_parts} workers; "
            "use fewer, or data"
        )
    return Layout(head_parts, row_parts)


def outlook(load: Load, layout: Layout, device: str) -> str:
    """The layout and its estimate in a line."""
    found = estimate(load, layout, device)
    work = found.operations * load.plan.steps
    return (
        f"{layout}: {found.state_bytes / GIGABYTE:.2f} GB of weights and optimiser and "
        f"{found.logits_bytes / GIGABYTE:.2f} GB of logits a worker, {found.sent_bytes / 1e6:.3g} MB sent a step, "
        f"{load.plan.steps:,} steps of {found.operations / 1e12:.3g} TFLOP ({work / 1e15:.3g} PFLOP a worker)"
    )
