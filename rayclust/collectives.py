"""Moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rayclust.distributed import ProcessGroup, world
from rayclust.distributed import all_mean as all_mean
from rayclust.distributed import all_reduce as all_sum
from rayclust.distributed import barrier as barrier
from rayclust.distributed import data_group as team
from rayclust.distributed import data_parallel as sharing_rows
from rayclust.distributed import differentiable_all_gather as differentiable_gather
from rayclust.distributed import differentiable_all_reduce as differentiable_sum
from rayclust.distributed import even_slices as stretches
from rayclust.distributed import is_main as is_first
from rayclust.distributed import rank as rank
from rayclust.distributed import world_size as world_size

__all__ = [
    "Team", "all_mean", "all_sum", "barrier", "differentiable_gather", "differentiable_sum", "everyone", "is_first",
    "rank", "sharing_rows", "stretches", "team", "world_size",
]  # fmt: skip


class Team(ProcessGroup):
    """What the losses' clusters divided over workers need, until they go."""

    all_sum, gathered, joined = ProcessGroup.all_reduce, ProcessGroup.all_gather, ProcessGroup.all_gather_cat

    def spread(self, x: Tensor) -> Tensor:
        """See Megatron's f."""
        return x if self.size == 1 else _Spread.apply(x, self)

    def total(self, x: Tensor) -> Tensor:
        """See Megatron's g."""
        return x if self.size == 1 else _Total.apply(x, self)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.team.all_reduce(grads[0]), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        return team.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def everyone() -> Team:
    """See `distributed.world`."""
    return Team(world().size, world().rank)
