"""Statistics of rows that are spread over workers, and access to rows by their position among all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.errors import DataError
from rayclust.settings import Metric

Blocks = Callable[[], Iterable[Tensor]]
"""Returns this worker's rows as Float[B D] blocks: the same blocks in the same order at every call."""


_UNIT_TOLERANCE = 1e-4
"""A row whose squared length is this near to 1 counts as a unit row."""


@dataclass(frozen=True)
class RowStats:
    """Statistics over all workers' rows, and this worker's rows in the form that the metric needs."""

    blocks: Blocks
    """This worker's rows; unit rows (or zero rows) for cosine."""
    count: int
    """Rows on all workers."""
    first: int
    """Position of this worker's first row: workers hold the rows in order of rank."""
    origin: Tensor
    """Float64[D] that is subtracted from centres: the mean for Euclidean, zero for cosine."""
    scatter: float
    """Sum of the squared distances to the origin."""
    variance: float
    """Mean over dimensions of the variance; tolerances are relative to it."""
    weights: Tensor | None = None
    """Float64[N'] above 0, of this worker's rows; None weighs all rows 1."""


def compute(blocks: Blocks, metric: Metric, weights: Tensor | None = None) -> RowStats:
    """Compute the statistics of all workers' rows in one pass; in two if rows for cosine are not of unit length.

    Args:
        blocks: this worker's rows; a worker without rows returns one block Float[0 D].
        metric: `cosine` uses the rows' directions only.
        weights: Float64[N'] above 0, of this worker's rows in order: sums and means are weighted; None weighs all 1.

    Raises:
        DataError: a value is not finite, or there are no rows.
        ShapeError: a block is not a matrix, or not as wide as the first.
    """
    # 1. Local sums: rows, Σ x, Σ |x|² and the number of rows that are neither unit nor zero.
    own, total, rest = 0, None, None
    for block in blocks():
        require_matrix(block, "block of rows", None if total is None else len(total))
        squares = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square()
        not_unit = ((squares - 1).abs() > _UNIT_TOLERANCE) & (squares > 0)
        part = torch.stack([squares.sum(), not_unit.sum().double()])
        added = block.sum(0, dtype=torch.float64)
        if weights is not None:
            own_weights = weights[own : own + len(block)]
            added, part[0] = own_weights @ block.double(), own_weights @ squares
        own += len(block)
        total = added + (0 if total is None else total)
        rest = part + (0 if rest is None else rest)
    if total is None or rest is None:
        raise DataError("blocks = 0: a worker without rows gives one empty block, so that the width is known")
    # 2. Sums over workers.
    total, rest = distributed.all_reduce(total), distributed.all_reduce(rest)
    if not bool(rest[0].isfinite()):
        raise DataError("rows hold NaN or infinite values: remove them before clustering")
    if metric == "cosine" and bool(rest[1] > 0):

        def unit_blocks() -> Iterator[Tensor]:
            """Yield the blocks with rows divided by their lengths; zero rows stay zero."""
            for block in blocks():
                yield functional.normalize(block if block.dtype == torch.float64 else block.float(), dim=1)

        return compute(unit_blocks, "cosine", weights)
    counts = distributed.data_group().all_gather(torch.tensor([own], device=total.device))
    count, first = int(counts.sum()), int(counts[: distributed.data_group().rank].sum())
    if count == 0:
        raise DataError("rows = 0: k-means needs at least one")
    # 3. Moments.
    mass = float(count) if weights is None else float(distributed.all_reduce(weights.sum()))
    mean, squared_norms = total / mass, float(rest[0])
    scatter = max(squared_norms - mass * float(mean @ mean), 0.0)
    variance = scatter / (mass * len(mean))
    if metric == "cosine":
        return RowStats(blocks, count, first, torch.zeros_like(mean), squared_norms, variance, weights)
    return RowStats(blocks, count, first, mean, scatter, variance, weights)


def gather_rows(stats: RowStats, positions: Tensor) -> Tensor:
    """Return the rows at Int64[S] positions as Float[S D], on every worker.

    The positions are on the CPU, increasing, and the same on all workers.
    """
    selected: list[Tensor] = []
    start = stats.first
    for block in stats.blocks():
        low, high = torch.searchsorted(positions, torch.tensor([start, start + len(block)])).tolist()
        rows = block[(positions[low:high] - start).to(block.device)]
        selected.append(rows if rows.dtype == torch.float64 else rows.float())
        start += len(block)
    # Workers hold the rows in order of rank, so joining their parts keeps the order of the positions.
    return distributed.differentiable_all_gather(torch.cat(selected))


def even_sample(count: int, size: int, seed: int) -> Tensor:
    """Return the positions of a seeded, evenly spread sample: one random row from each of `size` equal slices.

    Int64[S], increasing, S = min(count, size).
    """
    if size >= count:
        return torch.arange(count)
    bounds = np.arange(size + 1) * count // size
    within = np.random.default_rng([seed, 0x5EED]).random(size)
    return torch.from_numpy(bounds[:-1] + (within * np.diff(bounds)).astype(np.int64))
