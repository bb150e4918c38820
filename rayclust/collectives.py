"""Sums and gathers over workers; the identity when alone.

One code path serves one worker and many: a caller never asks how many there are. The differentiable forms carry the
gradient that the same loss on the union batch would have, when the gradients of all workers are afterwards *averaged*
(as DistributedDataParallel does) and each worker's loss is its share's mean.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of workers; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, from 0; 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_sum(x: Tensor) -> Tensor:
    """Sum over workers, without gradient.

    Args:
        x: any numeric tensor, of one shape on all workers.

    Returns:
        A tensor like `x`: the element-wise sum, the same bits on every worker.
    """
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


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


def barrier() -> None:
    """Waits for all workers; returns at once when alone."""
    if world_size() > 1:
        dist.barrier()
