"""Passes over the activations and weights of one clustering head, with one column per row of the batch.

Every function writes into tensors that the caller holds, so that a step allocates little. *Narrow* below is the dtype
of matrix products, BFloat16, Float32 or Float64; *wide* is that of parameters and sums, Float32 or Float64. The
compiled forms are for bf16 and want the number of columns to be a multiple of BLOCK, other widths one of LANES.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayclust.kernels.native import call

BLOCK = 64
"""Columns that a compiled pass holds in the cache together."""
LANES = 16
"""Numbers that it handles at once."""
SHORTEST = 1e-12
"""Lengths are not divided by less."""

_aten = torch.ops.aten


def gelu(product: Tensor, bias: Tensor, hidden: Tensor, kept: Tensor | None) -> None:
    """`hidden` ← GELU(product + bias).

    Args:
        product: Narrow[F R].
        bias: Wide[F].
        hidden: Narrow[F R], written.
        kept: Narrow[F R], written: what `gelu_backward` wants to know; or None where no gradient follows.
    """
    if _is_bf16(product) and call("gelu", product, bias, hidden, kept, *product.shape):
        return
    x = torch.add(product, bias.to(product.dtype)[:, None], out=product if kept is None else kept)
    _aten.gelu.out(x, out=hidden)


def gelu_backward(gradient: Tensor, kept: Tensor, bias_gradient: Tensor) -> None:
    """`gradient` of `hidden` ← that of the product, and its sum over the batch into `bias_gradient`, Wide[F]."""
    if _is_bf16(gradient) and call("gelu_backward", gradient, kept, bias_gradient, *gradient.shape):
        return
    _aten.gelu_backward.grad_input(gradient, kept, grad_input=gradient)
    torch.sum(gradient, dim=1, dtype=bias_gradient.dtype, out=bias_gradient)


def unit_columns(x: Tensor, bias: Tensor, inverse: Tensor) -> None:
    """`x` ← (x + bias) / ‖x + bias‖ of each column, and the reciprocal lengths into `inverse`, Wide[R]."""
    if _is_bf16(x) and call("unit_columns", x, bias, inverse, *x.shape):
        return
    wide = x + bias[:, None]
    torch.reciprocal(wide.square().sum(0).sqrt_().clamp_(min=SHORTEST), out=inverse)
    torch.mul(wide, inverse, out=wide)
    x.copy_(wide)


def unit_columns_backward(gradient: Tensor, unit: Tensor, inverse: Tensor, bias_gradient: Tensor) -> None:
    """`gradient` of unit columns ← that of the columns before, and its sum over the batch into `bias_gradient`."""
    if _is_bf16(gradient) and call("unit_columns_backward", gradient, unit, inverse, bias_gradient, *gradient.shape):
        return
    wide, direction = gradient.to(inverse.dtype), unit.to(inverse.dtype)
    wide = (wide - direction * (wide * direction).sum(0)).mul_(inverse)
    torch.sum(wide, dim=1, out=bias_gradient)
    gradient.copy_(wide)


def transpose(x: Tensor, transposed: Tensor) -> None:
    """`transposed` ← xᵀ, contiguous, for Narrow[O I]."""
    if not (_is_bf16(x) and call("transpose", x, transposed, *x.shape)):
        transposed.copy_(x.T)


def scaled_rows(
    layer: tuple[Tensor, Tensor], factor: float, weights: Tensor, transposed: Tensor | None, inverse: Tensor
) -> None:
    """`weights` ← factor · scale · direction / ‖direction‖ of each row: a weight-normalised layer over a temperature.

    Args:
        layer: direction, Wide[K F], and scale g, Wide[K].
        factor: 1/τ.
        weights: Narrow[K F], written.
        transposed: Narrow[F K], written, or None.
        inverse: Wide[K], reciprocal lengths, written.
    """
    direction, scale = layer
    if _is_bf16(weights) and call("scaled_rows", *layer, float(factor), weights, transposed, inverse, *weights.shape):
        return
    torch.reciprocal(torch.linalg.vector_norm(direction, dim=1).clamp(min=SHORTEST), out=inverse)
    weights.copy_(direction * (inverse * scale * factor)[:, None])
    if transposed is not None:
        transposed.copy_(weights.T)


def scaled_rows_backward(
    gradient: Tensor, layer: tuple[Tensor, Tensor], inverse: Tensor, factor: float, out: tuple[Tensor, Tensor]
) -> None:
    """Gradients of direction and scale from that of `scaled_rows`' weights.

    Args:
        gradient: Narrow[K F].
        layer: as given to `scaled_rows`.
        inverse: Wide[K], from `scaled_rows`.
        factor: 1/τ.
        out: Wide[K F] and Wide[K], written.
    """
    sizes = gradient.shape
    if _is_bf16(gradient) and call("scaled_rows_backward", gradient, *layer, inverse, float(factor), *out, *sizes):
        return
    direction, scale = layer
    unit, wide = direction * inverse[:, None], gradient.to(direction.dtype)
    cosine = (unit * wide).sum(1)
    torch.mul(cosine, factor, out=out[1])
    torch.mul(wide - unit * cosine[:, None], (scale * factor * inverse)[:, None], out=out[0])


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16
