"""Sums and gathers over workers; the identity when alone.

One code path serves one worker and many: a caller never asks how many there are. The differentiable forms carry the
gradient that the same loss on the union batch would have, when the gradients of all workers are afterwards *averaged*
(as DistributedDataParallel does) and each worker's loss is its share's mean.

Workers may stand in a grid: those of a row hold the same heads and share the rows of a batch, those of a column hold
the same rows and share the heads. Inside `sharing_rows` all functions here mean this worker's row of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """Some of the workers, of which this is one."""

    size: int = 1
    """How many."""
    rank: int = 0
    """This worker's place among them, from 0."""
    group: dist.ProcessGroup | None = None
    """What they talk through; None talks to all workers."""

    @torch.no_grad()
    def all_sum(self, x: Tensor) -> Tensor:
        """As the function of that name, over this team."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    @torch.no_grad()
    def joined(self, x: Tensor, total: int) -> Tensor:
        """Every worker's part, one behind the other.

        Args:
            x: of any shape behind axis 0, whose lengths on the team's workers are those of `stretches`.
            total: sum of the lengths along axis 0.

        Returns:
            A tensor like `x` of length `total`, the same bits on every worker.
        """
        if self.size == 1:
            return x
        lengths = [part.stop - part.start for part in stretches(total, self.size)]
        padded = x.new_zeros((max(lengths), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


_row: list[Team] = []
"""The team that `sharing_rows` has made the one that is meant; all workers where there is none."""


def everyone() -> Team:
    """All workers; this one alone outside a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return Team()
    return Team(dist.get_world_size(), dist.get_rank())


def team() -> Team:
    """The workers that are meant: all, or inside `sharing_rows` those of that team."""
    return _row[-1] if _row else everyone()


@contextmanager
def sharing_rows(row: Team) -> Iterator[None]:
    """Inside, the workers that everything here means are those of `row`."""
    _row.append(row)
    try:
        yield
    finally:
        _row.pop()


def stretches(total: int, parts: int) -> list[slice]:
    """0 … total in `parts` stretches one behind the other, none longer than another by more than 1."""
    bounds = [total * part // parts for part in range(parts + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


@dataclass(frozen=True)
class Grid:
    """This worker's place in a grid of all workers."""

    row: Team = Team()
    """Those that hold the same heads and share the rows of a batch."""
    column: Team = Team()
    """Those that hold the same rows of a batch and share the heads."""

    @classmethod
    def of(cls, head_parts: int) -> Grid:
        """The grid with `head_parts` rows, a divisor of the number of workers; made by all workers together.

        Workers of a row are numbered consecutively, so that those who exchange gradients share a node where they can.
        """
        every = everyone()
        width = every.size // head_parts
        if head_parts == 1:
            return cls(row=every)
        if width == 1:
            return cls(column=every)
        rows = [range(part * width, (part + 1) * width) for part in range(head_parts)]
        columns = [range(place, every.size, width) for place in range(width)]
        return cls(_own_team(rows, every.rank), _own_team(columns, every.rank))


def _own_team(teams: Sequence[Sequence[int]], rank: int) -> Team:
    """The one with this worker; every worker has to know of every group."""
    own = Team()
    for ranks in teams:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            own = Team(len(ranks), ranks.index(rank), cast(dist.ProcessGroup, group))
    return own


def world_size() -> int:
    """Number of workers; 1 outside a process group."""
    return team().size


def rank() -> int:
    """Number of this worker, from 0; 0 outside a process group."""
    return team().rank


def is_first() -> bool:
    """Whether this is the first of all workers, inside `sharing_rows` as well."""
    return everyone().rank == 0


@torch.no_grad()
def all_sum(x: Tensor) -> Tensor:
    """Sum over workers, without gradient.

    Args:
        x: any numeric tensor, of one shape on all workers.

    Returns:
        A tensor like `x`: the element-wise sum, the same bits on every worker.
    """
    return team().all_sum(x)


def all_mean(x: Tensor) -> Tensor:
    """Mean over workers, without gradient. `x` is floating; see `all_sum`."""
    return all_sum(x) / world_size()


class _DifferentiableSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every worker's loss depends on every worker's x: the adjoint of a sum is a sum.
        return all_sum(grads[0])


def differentiable_sum(x: Tensor) -> Tensor:
    """Sum over workers whose gradient is the sum over workers of the incoming gradients.

    Args:
        x: floating, of one shape on all workers.

    Returns:
        A tensor like `x`.
    """
    if world_size() == 1:
        return x
    result: Tensor = _DifferentiableSum.apply(x)
    return result


class _DifferentiableGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        own = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
        own[rank()] = len(x)
        lengths: list[int] = all_sum(own).tolist()
        ctx.start, ctx.length = sum(lengths[: rank()]), len(x)
        whole = x.new_zeros((sum(lengths), *x.shape[1:]))
        whole[ctx.start : ctx.start + ctx.length] = x
        return all_sum(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_sum(grads[0])[ctx.start : ctx.start + ctx.length]


def differentiable_gather(x: Tensor) -> Tensor:
    """All workers' rows, one worker's behind the other's; the gradient is the sum over workers of the incoming ones.

    Args:
        x: floating, of any number of rows, of one shape behind axis 0.

    Returns:
        A tensor like `x` with the rows of all workers in order of rank, the same bits on every worker.
    """
    if world_size() == 1:
        return x
    result: Tensor = _DifferentiableGather.apply(x)
    return result


def barrier() -> None:
    """Waits for all workers, inside `sharing_rows` as well; returns at once when alone."""
    if everyone().size > 1:
        dist.barrier()
