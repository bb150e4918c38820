"""Passes over the activations and weights of one clustering head, with one column per row of the batch.

Every function writes into tensors that the caller holds, so that a step allocates nothing. Activations are bf16 of
Float[F R] with R a multiple of 2·BLOCK, biases and their gradients float32. Sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.kernels.native import call

BLOCK = 64
"""Columns that a compiled pass holds in the cache together; the batch is padded to a multiple."""
LANES = 16
"""Widths of hidden layers must be a multiple, for aligned rows."""
SHORTEST = 1e-12
"""Lengths are not divided by less."""


def gelu(product: Tensor, bias: Tensor, hidden: Tensor, slope: Tensor | None) -> None:
    """`hidden` ← GELU(product + bias), and its derivative into `slope`.

    Args:
        product: BFloat16[F R].
        bias: Float32[F].
        hidden: BFloat16[F R], written.
        slope: BFloat16[F R], written, or None where no gradient follows.
    """
    if call("gelu", product, bias, hidden, slope, *product.shape):
        return
    x = product.float() + bias[:, None]
    hidden.copy_(functional.gelu(x))
    if slope is not None:
        slope.copy_(torch.ops.aten.gelu_backward(torch.ones_like(x), x))


def gelu_backward(gradient: Tensor, slope: Tensor, bias_gradient: Tensor) -> None:
    """`gradient` ← gradient · slope, and its sum over the rows of the batch into `bias_gradient`, Float32[F]."""
    if call("gelu_backward", gradient, slope, bias_gradient, *gradient.shape):
        return
    product = gradient.float() * slope.float()
    gradient.copy_(product)
    torch.sum(product, dim=1, out=bias_gradient)


def unit_columns(x: Tensor, bias: Tensor, inverse: Tensor) -> None:
    """`x` ← (x + bias) / ‖x + bias‖ of each column, and the reciprocal lengths into `inverse`, Float32[R]."""
    if call("unit_columns", x, bias, inverse, *x.shape):
        return
    wide = x.float() + bias[:, None]
    torch.reciprocal(torch.linalg.vector_norm(wide, dim=0).clamp(min=SHORTEST), out=inverse)
    x.copy_(wide * inverse)


def unit_columns_backward(gradient: Tensor, unit: Tensor, inverse: Tensor, bias_gradient: Tensor) -> None:
    """`gradient` of unit columns ← that of the columns before, and its sum over the batch into `bias_gradient`."""
    if call("unit_columns_backward", gradient, unit, inverse, bias_gradient, *gradient.shape):
        return
    wide, direction = gradient.float(), unit.float()
    wide = inverse * (wide - direction * (wide * direction).sum(0))
    gradient.copy_(wide)
    torch.sum(wide, dim=1, out=bias_gradient)


def transpose(x: Tensor, transposed: Tensor) -> None:
    """`transposed` ← xᵀ, contiguous, for BFloat16[O I]."""
    if not call("transpose", x, transposed, *x.shape):
        transposed.copy_(x.T)


def scaled_rows(
    direction: Tensor, scale: Tensor, factor: float, weights: Tensor, transposed: Tensor | None, inverse: Tensor
) -> None:
    """`weights` ← factor · scale · direction / ‖direction‖ of each row: a weight-normalised layer over a temperature.

    Args:
        direction: Float32[K F].
        scale: Float32[K], g.
        factor: 1/τ.
        weights: BFloat16[K F], written.
        transposed: BFloat16[F K], written, or None.
        inverse: Float32[K], reciprocal lengths, written.
    """
    if call("scaled_rows", direction, scale, float(factor), weights, transposed, inverse, *direction.shape):
        return
    torch.reciprocal(torch.linalg.vector_norm(direction, dim=1).clamp(min=SHORTEST), out=inverse)
    weights.copy_(direction * (inverse * scale * factor)[:, None])
    if transposed is not None:
        transposed.copy_(weights.T)


def scaled_rows_backward(
    gradient: Tensor,
    layer: tuple[Tensor, Tensor],
    inverse: Tensor,
    factor: float,
    out: tuple[Tensor, Tensor],
) -> None:
    """Gradients of direction and scale from that of `scaled_rows`' weights.

    Args:
        gradient: BFloat16[K F].
        layer: direction and scale as given to `scaled_rows`.
        inverse: Float32[K], from `scaled_rows`.
        factor: 1/τ.
        out: Float32[K F] and Float32[K], written.
    """
    direction, scale = layer
    if call("scaled_rows_backward", gradient, direction, scale, inverse, float(factor), *out, *direction.shape):
        return
    unit, wide = direction * inverse[:, None], gradient.float()
    cosine = (unit * wide).sum(1)
    torch.mul(cosine, factor, out=out[1])
    torch.mul((wide - unit * cosine[:, None]), (scale * factor * inverse)[:, None], out=out[0])
