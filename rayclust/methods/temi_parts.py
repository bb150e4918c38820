"""What a worker holds of TEMI's heads: some heads, and of each head some clusters; and the way to the whole and back.

Of a head, the last layer with its teacher and optimiser, and p̂, are divided by clusters. The layers before it are held
by every worker of a stack: these see the same rows and the same summed gradient, and so stay equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayclust.collectives import Grid, stretches
from rayclust.losses.information import Marginal
from rayclust.methods.base import Method

NOT_BY_HEAD = ("best_head", "head_losses")
"""Tensors of the state that every worker holds whole, whatever heads it trains."""
BY_CLUSTER = ("student.direction", "student.scale", "teacher.direction", "teacher.scale", "marginal.shares")
"""Tensors of the state whose axis 1 is that of clusters."""
BLOCK = 1 << 16
"""Clusters that are put together at once."""


@dataclass(frozen=True)
class Parts:
    """This worker's part of H heads of K clusters."""

    grid: Grid
    heads: int
    """H."""
    clusters: int
    """K."""

    @property
    def own_heads(self) -> slice:
        """The heads that this worker trains."""
        return stretches(self.heads, self.grid.column.size)[self.grid.column.rank]

    @property
    def own_clusters(self) -> slice:
        """The clusters of each head that this worker trains."""
        return stretches(self.clusters, self.grid.stack.size)[self.grid.stack.rank]

    def whole(self, tensors: dict[str, Tensor], by_cluster: Iterable[str]) -> dict[str, Tensor]:
        """See `Method.whole`; a loss is the sum of all heads'.

        Args:
            tensors: each with the heads along axis 0, but for numbers and `NOT_BY_HEAD`.
            by_cluster: names of those with clusters along axis 1. Where these are divided, their wholes are on the CPU,
                for one of them may not fit where its parts do.
        """
        column, divided = self.grid.column, set(by_cluster) if self.grid.stack.size > 1 else set()
        found = {}
        for name, x in tensors.items():
            if name == "loss":
                found[name] = column.all_sum(x)
            elif name in divided and x.dim() > 1:
                found[name] = self._joined(x)
            else:
                found[name] = column.joined(x, self.heads) if x.dim() and name not in NOT_BY_HEAD else x
        return found

    def _joined(self, x: Tensor) -> Tensor:
        """Float[H K …] on the CPU of every worker's Float[h k …]."""
        parts = stretches(self.clusters, self.grid.stack.size)
        longest = max(part.stop - part.start for part in parts)
        whole = torch.empty((self.heads, self.clusters, *x.shape[2:]), dtype=x.dtype)
        for start in range(0, longest, BLOCK):
            length = min(BLOCK, longest - start)
            block = x.new_zeros((len(x), length, *x.shape[2:]))
            own = x[:, start : start + length]
            block[:, : own.shape[1]] = own
            told = self.grid.stack.gathered(self.grid.column.joined(block, self.heads))
            for part, one in zip(parts, told, strict=True):
                place = whole[:, part.start + start : min(part.start + start + length, part.stop)]
                place.copy_(one[:, : place.shape[1]])
        return whole

    def part(self, tensors: dict[str, Tensor], by_cluster: Iterable[str]) -> dict[str, Tensor]:
        """This worker's part of what `whole` gave; a loss is the first worker's of each column."""
        if self.grid.column.size * self.grid.stack.size == 1:
            return tensors
        own, some, divided = self.own_heads, self.own_clusters, set(by_cluster)
        found = {}
        for name, x in tensors.items():
            if name == "loss":
                found[name] = torch.zeros_like(x) if self.grid.column.rank else x
            elif x.dim() and name not in NOT_BY_HEAD:
                # An optimiser in one pass over memory takes strides for granted.
                found[name] = x[own, some].contiguous() if name in divided and x.dim() > 1 else x[own]
            else:
                found[name] = x
        return found

    def health(self, marginal: Marginal) -> dict[str, Tensor]:
        """Of every head, Float[H] each: entropy of p̂ in nats, live clusters, share of the largest."""
        stack = self.grid.stack
        told = {"entropy": stack.all_sum(marginal.entropy()), "live": stack.all_sum(marginal.live())}
        told["largest"] = stack.gathered(marginal.shares.amax(1)).amax(0)
        return self.whole(told, ())

    @torch.no_grad()
    def agree(self, modules: Iterable[nn.Module]) -> None:
        """Gives a stack its first worker's layers before the last one.

        They differ by rounding at most, where rows are divided as well: sums of gradients are taken in an order that
        depends on sizes of the last layer. Over a long training that would add up.
        """
        if self.grid.stack.size == 1:
            return
        for module in modules:
            for name, x in module.state_dict(keep_vars=True).items():
                if name not in ("direction", "scale"):
                    x.copy_(self.grid.stack.first_one(x))


def by_cluster(method: Method, names: Iterable[str]) -> list[str]:
    """Which of some names, of the state or of the optimiser's state as "position.key", have clusters along axis 1."""
    trained = [(name, parameter) for name, parameter in method.named_parameters() if parameter.requires_grad]
    ordered = sorted(trained, key=lambda one: not method.is_decayed(*one))  # the order of training/optimizer.py
    positions = {str(position) for position, (name, _) in enumerate(ordered) if name in BY_CLUSTER}
    return [name for name in names if name in BY_CLUSTER or name.partition(".")[0] in positions]
