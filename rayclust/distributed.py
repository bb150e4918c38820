"""Collectives over workers; the identity for one worker.

One code path serves one worker and many: callers never ask how many there are. The differentiable forms carry the
gradient that the same loss on the union batch would have, when the gradients of all workers are afterwards *averaged*
and each worker's loss is the mean over its own rows.

Workers may form a mesh with two axes: those along `data` share the rows of a batch, those along `heads` share the heads
of a method. Inside `data_parallel` all functions here act on this worker's group along `data`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class ProcessGroup:
    """Some of the workers, this one among them."""

    size: int = 1
    """Number of workers."""
    rank: int = 0
    """Number of this worker in the group, from 0."""
    group: dist.ProcessGroup | None = None
    """Handle for torch; None stands for all workers."""

    @torch.no_grad()
    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the group, without gradient; see the function of that name."""
        if self.size == 1:
            return x
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    @torch.no_grad()
    def all_gather(self, x: Tensor) -> Tensor:
        """Stack every worker's tensor along a new axis 0, in order of rank.

        Args:
            x: of one shape on all workers of the group.

        Returns:
            A tensor with an axis of length `size` in front, the same bits on every worker.
        """
        if self.size == 1:
            return x.detach()[None]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.detach().contiguous(), group=self.group)
        return torch.stack(parts)

    @torch.no_grad()
    def all_gather_cat(self, x: Tensor, total: int) -> Tensor:
        """Concatenate every worker's slice along axis 0, in order of rank.

        Args:
            x: of any shape behind axis 0, whose lengths in the group are those of `even_slices`.
            total: sum of the lengths along axis 0.

        Returns:
            A tensor like `x` of length `total`, the same bits on every worker.
        """
        if self.size == 1:
            return x
        lengths = [part.stop - part.start for part in even_slices(total, self.size)]
        padded = x.new_zeros((max(lengths), *x.shape[1:]))
        padded[: len(x)] = x
        return torch.cat([part[:length] for part, length in zip(self.all_gather(padded), lengths, strict=True)])

    @torch.no_grad()
    def broadcast(self, x: Tensor) -> Tensor:
        """Return the first worker's tensor, without gradient; of one shape in the group."""
        if self.size == 1:
            return x
        received = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(received, group=self.group, group_src=0)
        return received


_data_group: list[ProcessGroup] = []
"""Groups that `data_parallel` has entered, innermost last."""


def world() -> ProcessGroup:
    """Return the group of all workers; this one alone outside a process group of torch."""
    if not (dist.is_available() and dist.is_initialized()):
        return ProcessGroup()
    return ProcessGroup(dist.get_world_size(), dist.get_rank())


def data_group() -> ProcessGroup:
    """Return the workers that share the rows of a batch, and this one's rank: all, or those of `data_parallel`."""
    return _data_group[-1] if _data_group else world()


@contextmanager
def data_parallel(group: ProcessGroup) -> Iterator[None]:
    """Make the functions of this module act on a group, inside the context.

    Args:
        group: a `DeviceMesh`'s `data`.
    """
    _data_group.append(group)
    try:
        yield
    finally:
        _data_group.pop()


@dataclass(frozen=True)
class DeviceMesh:
    """This worker's groups in a mesh of all workers."""

    data: ProcessGroup = ProcessGroup()
    """Workers with the same heads, which share the rows of a batch."""
    heads: ProcessGroup = ProcessGroup()
    """Workers with the same rows of a batch, which share the heads."""

    @classmethod
    def of(cls, head_parts: int) -> DeviceMesh:
        """Build the mesh with so many parts along `heads`; called by all workers together.

        Workers along `data` are numbered consecutively, so that those that exchange gradients share a node if possible.

        Args:
            head_parts: a divisor of the number of workers.
        """
        everyone = world()
        width = everyone.size // head_parts
        along_data = [range(start, start + width) for start in range(0, everyone.size, width)]
        along_heads = [range(place, everyone.size, width) for place in range(width)]
        own = []
        for groups in (along_data, along_heads):
            found = everyone if len(groups) == 1 else ProcessGroup()
            for ranks in groups if 1 < len(groups) < everyone.size else ():
                group = dist.new_group(list(ranks))  # torch wants every worker to create every group
                if everyone.rank in ranks:
                    found = ProcessGroup(len(ranks), ranks.index(everyone.rank), cast(dist.ProcessGroup, group))
            own.append(found)
        return cls(*own)


def even_slices(total: int, parts: int) -> list[slice]:
    """Cut 0 … total into `parts` consecutive slices whose lengths differ by at most 1."""
    bounds = [total * part // parts for part in range(parts + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def own_slice(total: int) -> slice:
    """Return this worker's one of the `even_slices` over the data-parallel workers."""
    group = data_group()
    return even_slices(total, group.size)[group.rank]


def all_reduce(x: Tensor) -> Tensor:
    """Return the sum over workers, without gradient.

    Args:
        x: any numeric tensor, of one shape on all workers.

    Returns:
        A tensor like `x`, the same bits on every worker; `x` itself for one worker.
    """
    return data_group().all_reduce(x)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over workers; parameters without one are skipped.

    Args:
        parameters: in one order on all workers, which have gradients of the same ones.
    """
    group = data_group()
    if group.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pending = [dist.all_reduce(gradient, group=group.group, async_op=True) for gradient in gradients]
    for work in pending:
        work.wait()
    torch._foreach_div_(gradients, float(group.size))


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every worker's loss depends on every worker's x: the adjoint of a sum is a sum.
        return all_reduce(grads[0])


def differentiable_all_reduce(x: Tensor) -> Tensor:
    """Return the sum over workers; its gradient is the sum over workers of the incoming gradients.

    Args:
        x: floating, of one shape on all workers.

    Returns:
        A tensor like `x`.
    """
    if data_group().size == 1:
        return x
    result: Tensor = _AllReduce.apply(x)
    return result


def differentiable_all_gather(x: Tensor) -> Tensor:
    """Concatenate all workers' rows in order of rank; the gradient is the sum over workers of the incoming ones.

    Args:
        x: floating, of any number of rows, of one shape behind axis 0.

    Returns:
        A tensor like `x` with the rows of all workers, the same bits on every worker.
    """
    group = data_group()
    if group.size == 1:
        return x
    # Each worker's rows at their place among zeros: the concatenation is a sum.
    lengths: list[int] = group.all_gather(torch.tensor(len(x), device=x.device)).tolist()
    before, after = sum(lengths[: group.rank]), sum(lengths[group.rank + 1 :])
    parts = [x.new_zeros((before, *x.shape[1:])), x, x.new_zeros((after, *x.shape[1:]))]
    return differentiable_all_reduce(torch.cat(parts))


def barrier() -> None:
    """Wait for all workers, inside `data_parallel` as well; return at once for one worker."""
    if world().size > 1:
        dist.barrier()
