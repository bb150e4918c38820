"""Sums and gathers over workers; the identity when alone.

One code path serves one worker and many: a caller never asks how many there are. The differentiable forms carry the
gradient that the same loss on the union batch would have, when the gradients of all workers are afterwards *averaged*
(as DistributedDataParallel does) and each worker's loss is its share's mean.

Workers may stand in a grid of up to three axes: those of a row share the rows of a batch, those of a column the heads,
those of a stack the clusters of each head; along each axis the rest is the same. Inside `sharing_rows` all functions
here mean this worker's row of the grid.
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
        parts = self.gathered(padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @torch.no_grad()
    def gathered(self, x: Tensor) -> Tensor:
        """Every worker's `x`, one above the other along a new axis 0.

        Args:
            x: of one shape on all of the team's workers.

        Returns:
            A tensor with an axis of `size` in front, the same bits on every worker.
        """
        if self.size == 1:
            return x.detach()[None]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.detach().contiguous(), group=self.group)
        return torch.stack(parts)

    def first_one(self, x: Tensor) -> Tensor:
        """The `x` of the team's first worker, without gradient; of one shape on all."""
        return self.all_sum(x if self.rank == 0 else torch.zeros_like(x))

    def spread(self, x: Tensor) -> Tensor:
        """`x` itself, which every worker holds and of which each uses a part: its gradient is the sum of theirs.

        Source: arXiv 1909.08053, section 3, the operator f.
        """
        if self.size == 1:
            return x
        spread: Tensor = _Spread.apply(x, self)
        return spread

    def total(self, x: Tensor) -> Tensor:
        """The sum over the team of what each worker adds to a loss that all of them then hold: each has its gradient.

        Source: arXiv 1909.08053, section 3, the operator g.
        """
        if self.size == 1:
            return x
        total: Tensor = _Total.apply(x, self)
        return total


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.team.all_sum(grads[0].contiguous()), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        return team.all_sum(x.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


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
    """Those that hold the same heads and clusters and share the rows of a batch."""
    column: Team = Team()
    """Those that hold the same rows of a batch and clusters and share the heads."""
    stack: Team = Team()
    """Those that hold the same rows of a batch and heads and share the clusters of each head."""

    @classmethod
    def of(cls, head_parts: int, cluster_parts: int = 1) -> Grid:
        """The grid with so many parts, whose product divides the number of workers; made by all workers together.

        Workers of a row are numbered consecutively, then those of a stack, so that those who exchange gradients share a
        node where they can; they exchange most.
        """
        every = everyone()
        width = every.size // (head_parts * cluster_parts)
        depth = width * cluster_parts
        starts = range(0, every.size, width)
        rows = [range(start, start + width) for start in starts]
        blocks = range(0, every.size, depth)
        stacks = [range(block + place, block + depth, width) for block in blocks for place in range(width)]
        columns = [range(place, every.size, depth) for place in range(depth)]
        return cls(*(_own_team(teams, every) for teams in (rows, columns, stacks)))


def _own_team(teams: Sequence[Sequence[int]], every: Team) -> Team:
    """The one with this worker; every worker has to know of every group."""
    if len(teams) == 1:
        return every
    if len(teams[0]) == 1:
        return Team()
    own = Team()
    for ranks in teams:
        group = dist.new_group(list(ranks))
        if every.rank in ranks:
            own = Team(len(ranks), ranks.index(every.rank), cast(dist.ProcessGroup, group))
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
