"""What TEMI's heads cost a worker, and how workers divide them; reckoned without torch.

Rows divided: every worker holds all heads, and all gradients are summed in every step. Heads divided: every worker sees
the whole batch, and all that is summed is one number a pair. Both are the same training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from rayclust.errors import ConfigError
from rayclust.methods.settings import Plan

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class HeadShape:
    """Sizes and parts of H equal heads."""

    heads: int
    """H."""
    dimension: int
    """D, the width of the rows that come in."""
    clusters: int
    """K, the logits that come out."""
    hidden: int = 512
    """Width of the hidden layers."""
    bottleneck: int = 256
    """Width of the unit rows before the last layer."""
    layers: int = 2
    """Linear layers before the last one, at least 1; 1 is a single map to the bottleneck."""
    batch_norm: bool = False
    """Whether hidden layers are batch-normalised."""
    dropout: float = 0.0
    """Share of hidden units dropped in training."""
    final_gelu: bool = False
    """Whether a GELU follows the bottleneck."""
    learn_scale: bool = True
    """Whether g is learnt; otherwise it stays 1."""
    first: int = 0
    """Number of the first head, where other workers hold those before it."""

    @property
    def widths(self) -> list[int]:
        """Input and output widths of the layers before the last."""
        return [self.dimension, *[self.hidden] * (self.layers - 1), self.bottleneck]


OPERATIONS_PER_BYTE_SENT = 4000.0
"""Operations of matrix products in the time of a byte between workers: 400 TFLOP/s and 100 GB/s; CPUs have as many."""
OPERATIONS_PER_BYTE_HELD = 150.0
"""The same for a byte of memory that the optimiser reads or writes."""
MIN_GRADIENT_BYTES = 1 << 24
"""Bytes of gradients below which the rows are divided, whatever is faster."""
STATE_COPIES = 5
"""Student, teacher, gradient and the optimiser's two averages."""
OPTIMIZER_BYTES = 36
"""Read and written per parameter and step."""
FLOAT, NARROW = 4, 2
GIGABYTE = 1e9


@dataclass(frozen=True)
class Layout:
    """Workers in a mesh of `head_parts` × `row_parts`."""

    head_parts: int
    """Parts into which the heads are divided."""
    row_parts: int
    """Parts into which the rows of a batch are divided."""

    @property
    def workers(self) -> int:
        """W."""
        return self.head_parts * self.row_parts

    def __str__(self) -> str:
        if self.workers == 1:
            return "one worker"
        parts = {"heads": self.head_parts, "rows of a batch": self.row_parts}
        return " and ".join(f"{what} over {count}" for what, count in parts.items() if count > 1) + " workers"


@dataclass(frozen=True)
class Cost:
    """What the most loaded worker of a layout needs."""

    state_bytes: float
    """Parameters, their teacher, gradients and the optimiser's averages."""
    logits_bytes: float
    """Logits that are there at one time."""
    passing_bytes: float
    """Last layers as matrix products take them."""
    sent_bytes: float
    """Sent and received per step."""
    operations: float
    """Of matrix products per step."""
    step_operations: float
    """Time of a step, in operations: those of products, of sending, and of the optimiser's memory."""


def estimate_cost(shape: HeadShape, plan: Plan, layout: Layout, device: str = "cuda") -> Cost:
    """Estimate what a layout takes of each worker.

    Args:
        shape: of all heads.
        plan: of the training.
        layout: its division.
        device: `cpu` or `cuda`, where the workers compute.
    """
    from rayclust.losses.information import CHUNK_BYTES, KEPT_BYTES  # which brings torch

    heads, pairs = -(-shape.heads // layout.head_parts), -(-plan.batch_size // layout.row_parts)
    layers = list(pairwise(shape.widths))
    parameters = heads * (sum(o * i + o for i, o in layers) + shape.clusters * (shape.bottleneck + 1))
    # Products of a pair: teacher and student forward, both sides of the student back; rows get no gradient, so that the
    # first layer has one product less.
    products = 4 * sum(o * i for i, o in layers) - shape.widths[0] * shape.widths[1]
    products += 4 * shape.clusters * shape.bottleneck
    # Logits of the teacher, kept where they fit, and of a chunk of the student; last layers of that chunk's heads.
    logits = 2 * pairs * shape.clusters * NARROW
    kept, chunk = KEPT_BYTES[device], CHUNK_BYTES[device]
    last = min(heads, max(1, chunk // logits)) * shape.clusters * shape.bottleneck
    # Numbers sent: gradients and p̂ over rows, agreement over heads; a ring sends each about twice.
    ring_rows, ring_heads = (2 * (parts - 1) / parts for parts in (layout.row_parts, layout.head_parts))
    sent = FLOAT * ((parameters + heads * shape.clusters) * ring_rows + pairs * ring_heads)
    operations = float(heads * pairs * 4 * products)
    held = float(parameters) * OPTIMIZER_BYTES
    return Cost(
        state_bytes=float(FLOAT * STATE_COPIES * parameters),
        logits_bytes=float(min(heads * logits, kept) + min(heads * logits, chunk)),
        passing_bytes=float((2 * NARROW + FLOAT) * last),
        sent_bytes=sent,
        operations=operations,
        step_operations=operations + OPERATIONS_PER_BYTE_SENT * sent + OPERATIONS_PER_BYTE_HELD * held,
    )


def choose_layout(
    shape: HeadShape, plan: Plan, workers: int, wanted: str = "auto", memory: float = float("inf")
) -> Layout:
    """Return the layout that is wanted or, for `auto`, the one with the fastest steps.

    Args:
        shape: of all heads.
        plan: of the training.
        workers: W.
        wanted: `auto`, `data`, `heads`, or `RxC`: heads in R parts, rows in C.
        memory: bytes that a worker has, for `auto` on several workers.

    Raises:
        ConfigError: the workers do not make up that mesh, some would have no head, or a head does not fit.
    """
    if wanted != "auto":
        words = {"data": (1, workers), "heads": (workers, 1)}
        layout = Layout(*words.get(wanted) or (int(number) for number in wanted.split("x")))
        if layout.workers != workers:
            raise ConfigError(
                f"method.parallel = {wanted}: is for {layout.workers} workers, there are {workers}; "
                "set resources.workers, or auto"
            )
        if layout.head_parts > shape.heads:
            raise ConfigError(
                f"method.parallel = {wanted}: {shape.heads} heads cannot be divided over {layout.head_parts} workers; "
                "use fewer, or data"
            )
        return layout
    layouts = [Layout(parts, workers // parts) for parts in range(1, workers + 1) if workers % parts == 0]
    layouts = [grid for grid in layouts if grid.head_parts <= shape.heads and grid.row_parts <= plan.batch_size]
    gradient_bytes = estimate_cost(shape, plan, Layout(1, 1)).state_bytes / STATE_COPIES
    if not layouts or gradient_bytes < MIN_GRADIENT_BYTES:
        return Layout(1, workers)
    head = estimate_cost(replace(shape, heads=1), plan, Layout(1, 1))
    head_bytes = head.state_bytes + head.logits_bytes + head.passing_bytes
    if workers > 1 and head_bytes > memory:
        raise ConfigError(
            f"method.clusters = {shape.clusters}: a head takes {head_bytes / GIGABYTE:.1f} GB, a worker has "
            f"{memory / GIGABYTE:g}; use fewer clusters, or raise method.worker_memory"
        )
    return min(layouts, key=lambda grid: (estimate_cost(shape, plan, grid).step_operations, grid.head_parts))
