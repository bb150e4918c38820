"""One clustering head forward and back on the CPU, without autograd, in memory that is used again and again.

Activations stand with one column per row of the batch; see kernels/heads.py, also for what narrow and wide are. The
head is that of heads.py with two layers before the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayclust.kernels import heads as passes
from rayclust.kernels import information as pairs
from rayclust.kernels.products import Shared
from rayclust.methods.heads import HeadShape


@dataclass(frozen=True)
class Net:
    """One head's parameters; the matrices of the first two layers as products take them."""

    first: Tensor
    """Narrow[hidden D]."""
    second: Tensor
    """Narrow[bottleneck hidden]."""
    biases: tuple[Tensor, Tensor]
    """Wide[hidden] and Wide[bottleneck]."""
    last: tuple[Tensor, Tensor]
    """Direction, Wide[K bottleneck], and scale, Wide[K]."""


class Room:
    """What one thread works in.

    Args:
        shape: of the heads.
        columns: R, the batch's rows in both views with padding.
        narrow: dtype of products.
        wide: dtype of parameters and sums.
    """

    def __init__(self, shape: HeadShape, columns: int, narrow: torch.dtype, wide: torch.dtype) -> None:
        hidden, bottleneck, clusters = shape.hidden, shape.bottleneck, shape.clusters

        def room(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=narrow)

        def sums(*sizes: int) -> Tensor:
            return torch.empty(*sizes, dtype=wide)

        self.terms = pairs.scratch(clusters)
        self._hidden, self._kept, self._hidden_gradient = room(3, hidden, columns)
        self._unit, self._unit_gradient = room(2, bottleneck, columns)
        self._inverse = sums(columns)
        self._second_transposed, self._second_gradient = room(hidden, bottleneck), room(bottleneck, hidden)
        self._last, self._last_gradient = room(2, clusters, bottleneck)
        self._last_transposed, self._last_inverse = room(bottleneck, clusters), sums(clusters)
        self._bias_gradients = sums(hidden), sums(bottleneck)
        self._last_gradients = sums(clusters, bottleneck), sums(clusters)

    def forward(self, net: Net, x: Shared, factor: float, logits: Tensor, learns: bool) -> None:
        """Logits times `factor` into `logits`, Narrow[K R]; `learns` keeps what `backward` needs."""
        product = x.product(net.first)
        passes.gelu(product, net.biases[0], self._hidden, self._kept if learns else None)
        torch.mm(net.second, self._hidden, out=self._unit)
        passes.unit_columns(self._unit, net.biases[1], self._inverse)
        transposed = self._last_transposed if learns else None
        passes.scaled_rows(net.last, factor, self._last, transposed, self._last_inverse)
        torch.mm(self._last, self._unit, out=logits)

    def backward(self, net: Net, xt: Shared, factor: float, gradient: Tensor, last_learns: bool) -> dict[str, Tensor]:
        """Gradients by the parameters' names in `Heads`, valid until the next call.

        Args:
            net: as in `forward`.
            xt: the batch transposed.
            factor: as in `forward`.
            gradient: Narrow[K R], of what `forward` wrote.
            last_learns: whether the last layer's gradients are wanted.
        """
        gradients: dict[str, Tensor] = {}
        if last_learns:
            torch.mm(gradient, self._unit.T, out=self._last_gradient)
            passes.scaled_rows_backward(self._last_gradient, net.last, self._last_inverse, factor, self._last_gradients)
            gradients.update(direction=self._last_gradients[0], scale=self._last_gradients[1])
        torch.mm(self._last_transposed, gradient, out=self._unit_gradient)
        passes.unit_columns_backward(self._unit_gradient, self._unit, self._inverse, self._bias_gradients[1])
        torch.mm(self._unit_gradient, self._hidden.T, out=self._second_gradient)
        passes.transpose(net.second, self._second_transposed)
        torch.mm(self._second_transposed, self._unit_gradient, out=self._hidden_gradient)
        passes.gelu_backward(self._hidden_gradient, self._kept, self._bias_gradients[0])
        first = xt.product(self._hidden_gradient)
        names = ("weights.0", "weights.1", "biases.0", "biases.1")
        return gradients | dict(zip(names, (first, self._second_gradient, *self._bias_gradients), strict=True))
