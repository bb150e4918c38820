"""One clustering head forward and back in torch alone, without autograd, in memory that is used again and again.

The twin of tile_head.py, for any processor and dtype. Activations stand with one column per row of the batch: the
columns 0 … B − 1 are the rows themselves, B … 2B − 1 their neighbours. *Narrow* is the dtype of matrix products,
BFloat16, Float32 or Float64; *wide* that of parameters and sums, Float32 or Float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayclust.kernels.products import Shared

SHORTEST = 1e-12
"""Lengths are not divided by less."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Sizes:
    """Widths of a head and the columns of its batch."""

    hidden: int
    bottleneck: int
    clusters: int
    columns: int
    narrow: torch.dtype
    wide: torch.dtype


@dataclass(frozen=True)
class Net:
    """One head's parameters, Wide."""

    weights: tuple[Tensor, Tensor]
    """Wide[hidden D] and Wide[bottleneck hidden]."""
    biases: tuple[Tensor, Tensor]
    """Wide[hidden] and Wide[bottleneck]."""
    direction: Tensor
    """Wide[K bottleneck]."""
    scale: Tensor
    """Wide[K], g."""


@dataclass(frozen=True)
class Lesson:
    """What a student learns from."""

    teacher: Tensor
    """Narrow[K 2B], the teacher's logits."""
    normalizer: Tensor
    """Wide[2B], their log-sum-exp."""
    log_marginal: Tensor
    """Wide[K], ln p̂."""
    weights: Tensor
    """Wide[B], of the pairs."""
    beta: float
    """Power on the product of probabilities."""
    scale: float
    """Of each column's part in the loss."""


class Room:
    """What one thread works in: the activations of the last head that went forward.

    Args:
        sizes: of the heads.
    """

    def __init__(self, sizes: Sizes) -> None:
        hidden, bottleneck, clusters, columns = sizes.hidden, sizes.bottleneck, sizes.clusters, sizes.columns

        def room(*size: int) -> Tensor:
            return torch.empty(*size, dtype=sizes.narrow)

        self.sizes = sizes
        self._hidden, self._before, self._hidden_gradient = room(3, hidden, columns)
        self._unit, self._unit_gradient = room(2, bottleneck, columns)
        self._logits, self._second_gradient = room(clusters, columns), room(bottleneck, hidden)
        self._last, self._last_gradient = room(2, clusters, bottleneck)

    def teach(self, net: Net, x: Shared, factor: float, out: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """A teacher forward, and what the loss needs to know of it.

        Args:
            net: the teacher's head.
            x: the batch, Narrow[2B D].
            factor: 1/τ, on the logits.
            out: written: logits, Narrow[K 2B]; their log-sum-exp, Wide[2B]; Σ of probabilities over rows and views,
                Wide[K]; the probability that a row's views fall into one cluster, Wide[B].
        """
        logits, normalizer, sums, agreement = out
        self._forward(net, x, factor, logits)
        wide = logits.to(self.sizes.wide)
        torch.logsumexp(wide, dim=0, out=normalizer)
        probabilities = (wide - normalizer).exp_().view(len(wide), 2, -1)
        torch.sum(probabilities, dim=(1, 2), out=sums)
        torch.sum(probabilities.prod(1), dim=0, out=agreement)

    def learn(
        self, net: Net, x: Shared, xt: Shared, factor: float, lesson: Lesson, last_learns: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A student forward and back.

        Args:
            net: the student's head.
            x: the batch, Narrow[2B D].
            xt: the batch transposed.
            factor: 1/τ, on the logits.
            lesson: what it is compared with.
            last_learns: whether the last layer's gradients are wanted.

        Returns:
            The loss, Wide[], and the gradients by the parameters' names in `methods.heads.Heads`.

        Source: arXiv 2303.17896, eq. 8; d(−PMI)/dz = β·(softmax(z) − softmax(β(z + z_t) − ln p̂)).
        """
        self._forward(net, x, factor, self._logits)
        loss = self._compare(lesson)
        gradients = self._last_backward(net, factor) if last_learns else {}
        torch.mm(self._last.T, self._logits, out=self._unit_gradient)
        second_bias = self._unit_backward()
        torch.mm(self._unit_gradient, self._hidden.T, out=self._second_gradient)
        torch.mm(net.weights[1].to(self.sizes.narrow).T, self._unit_gradient, out=self._hidden_gradient)
        _aten.gelu_backward.grad_input(self._hidden_gradient, self._before, grad_input=self._hidden_gradient)
        first_bias = self._hidden_gradient.sum(1, dtype=self.sizes.wide)
        first = xt.product(self._hidden_gradient)
        found = {"weights.0": first, "weights.1": self._second_gradient, "biases.0": first_bias}
        wide = {name: gradient.to(self.sizes.wide) for name, gradient in {**gradients, **found}.items()}
        return loss, {**wide, "biases.1": second_bias}

    def _forward(self, net: Net, x: Shared, factor: float, logits: Tensor) -> None:
        narrow = self.sizes.narrow
        product = x.product(net.weights[0].to(narrow))
        torch.add(product, net.biases[0].to(narrow)[:, None], out=self._before)
        _aten.gelu.out(self._before, out=self._hidden)
        torch.mm(net.weights[1].to(narrow), self._hidden, out=self._unit)
        wide = self._unit + net.biases[1][:, None]
        self._inverse = wide.square().sum(0).sqrt_().clamp_(min=SHORTEST).reciprocal_()
        self._unit.copy_(wide.mul_(self._inverse))
        self._lengths = torch.linalg.vector_norm(net.direction, dim=1).clamp_(min=SHORTEST)
        self._last.copy_(net.direction * (net.scale * factor / self._lengths)[:, None])
        torch.mm(self._last, self._unit, out=logits)

    def _compare(self, lesson: Lesson) -> Tensor:
        """The loss; the logits give way to its gradient."""
        wide, taught = self._logits.to(self.sizes.wide), lesson.teacher.to(self.sizes.wide)
        rows = wide.shape[1] // 2
        joint = (wide + taught.roll(rows, 1)).mul_(lesson.beta).sub_(lesson.log_marginal[:, None])
        own, both = torch.logsumexp(wide, 0), torch.logsumexp(joint, 0)
        weights = lesson.weights.repeat(2) * lesson.scale
        difference = (wide - own).exp_().sub_((joint - both).exp_())
        self._logits.copy_(difference.mul_(weights * lesson.beta))
        loss: Tensor = (weights * (lesson.beta * (own + lesson.normalizer.roll(rows)) - both)).sum()
        return loss

    def _last_backward(self, net: Net, factor: float) -> dict[str, Tensor]:
        torch.mm(self._logits, self._unit.T, out=self._last_gradient)
        unit, gradient = net.direction / self._lengths[:, None], self._last_gradient.to(self.sizes.wide)
        cosine = (unit * gradient).sum(1)
        reach = net.scale * factor / self._lengths
        return {"direction": (gradient - unit * cosine[:, None]) * reach[:, None], "scale": cosine * factor}

    def _unit_backward(self) -> Tensor:
        """The gradient of unit columns becomes that of the columns before; its sum over them."""
        gradient, unit = self._unit_gradient.to(self.sizes.wide), self._unit.to(self.sizes.wide)
        wide = (gradient - unit * (gradient * unit).sum(0)).mul_(self._inverse)
        self._unit_gradient.copy_(wide)
        total: Tensor = wide.sum(1)
        return total
