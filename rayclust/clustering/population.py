"""All workers' rows seen as one population: its moments, and rows by their position in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.clustering.lloyd import Blocks
from rayclust.errors import DataError

Metric = Literal["cosine", "euclidean"]

_UNIT = 1e-4
"""Rows whose squared length is as near to 1 as this count as unit rows."""


@dataclass(frozen=True)
class Population:
    """What one pass over the rows tells, and the rows as the metric wants them."""

    blocks: Blocks
    """This worker's rows; unit rows (or zero rows) for cosine."""
    count: int
    """Rows on all workers."""
    first: int
    """Position of this worker's first row: workers hold the rows in order of rank."""
    origin: Tensor
    """Float64[D] where centres are seen from: the mean for Euclidean, zero for cosine."""
    scatter: float
    """Sum of the squared distances to the origin."""
    variance: float
    """Mean over dimensions of the variance; what a tolerance is relative to."""


def survey(blocks: Blocks, metric: Metric) -> Population:
    """The population of all workers' rows, by one pass; by two if rows for cosine are not of unit length.

    Args:
        blocks: this worker's rows; a worker that has none gives one block Float[0 D].
        metric: cosine looks at the rows' directions only.

    Raises:
        DataError: a value is not finite, or there are no rows.
        ShapeError: a block is not a matrix, or not as wide as the first.
    """
    own, total, squares, bent = _moments(blocks)
    if metric == "cosine" and bent:
        return survey(_Directions(blocks), "cosine")
    counts = torch.zeros(collectives.world_size(), dtype=torch.int64, device=total.device)
    counts[collectives.rank()] = own
    counts = collectives.all_sum(counts)
    count, first = int(counts.sum()), int(counts[: collectives.rank()].sum())
    if count == 0:
        raise DataError("rows = 0: k-means needs at least one")
    mean = total / count
    scatter = max(squares - count * float(mean @ mean), 0.0)
    variance = scatter / (count * len(mean))
    if metric == "cosine":
        return Population(blocks, count, first, torch.zeros_like(mean), squares, variance)
    return Population(blocks, count, first, mean, scatter, variance)


@dataclass(frozen=True)
class _Directions:
    """Blocks whose rows are divided by their lengths; zero rows stay zero."""

    source: Blocks

    def __call__(self) -> Iterator[Tensor]:
        for block in self.source():
            yield torch.nn.functional.normalize(block if block.dtype == torch.float64 else block.float(), dim=1)


def _moments(blocks: Blocks) -> tuple[int, Tensor, float, bool]:
    """Rows of this worker; sum Float64[D] and sum of squares of all; whether any row is neither unit nor zero."""
    count, total, rest = 0, None, None
    for block in blocks():
        require_matrix(block, "block of rows", None if total is None else len(total))
        squares = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square()
        bent = ((squares - 1).abs() > _UNIT) & (squares > 0)
        part = torch.stack([squares.sum(), bent.sum().double()])
        count += len(block)
        total = block.sum(0, dtype=torch.float64) + (0 if total is None else total)
        rest = part + (0 if rest is None else rest)
    if total is None or rest is None:
        raise DataError("blocks = 0: a worker without rows gives one empty block, so that the width is known")
    total, rest = collectives.all_sum(total), collectives.all_sum(rest)
    if not bool(rest[0].isfinite()):
        raise DataError("rows hold NaN or infinite values: remove them before clustering")
    return count, total, float(rest[0]), bool(rest[1] > 0)


def gather_rows(population: Population, positions: Tensor) -> Tensor:
    """The rows at some positions, on every worker.

    Args:
        population: of all workers' rows.
        positions: Int64[S] on the CPU, increasing, the same on all workers.

    Returns:
        Float[S D].
    """
    found: list[Tensor] = []
    start = population.first
    for block in population.blocks():
        low, high = torch.searchsorted(positions, torch.tensor([start, start + len(block)])).tolist()
        rows = block[(positions[low:high] - start).to(block.device)]
        found.append(rows if rows.dtype == torch.float64 else rows.float())
        start += len(block)
    own = torch.cat(found)
    if collectives.world_size() == 1:
        return own
    low = int(torch.searchsorted(positions, population.first))
    everyone = own.new_zeros((len(positions), own.shape[1]))
    everyone[low : low + len(own)] = own
    return collectives.all_sum(everyone)


def even_sample(count: int, size: int, seed: int) -> Tensor:
    """Positions of a seeded sample that is spread evenly: one row from each of `size` equal stretches.

    Args:
        count: rows there are.
        size: rows wanted; all rows if there are no more.
        seed: of the sample.

    Returns:
        Int64[S], increasing, S = min(count, size).
    """
    if size >= count:
        return torch.arange(count)
    bounds = np.arange(size + 1) * count // size
    within = np.random.default_rng([seed, 0x5EED]).random(size)
    return torch.from_numpy(bounds[:-1] + (within * np.diff(bounds)).astype(np.int64))
