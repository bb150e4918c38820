"""Weight-normalised last layers: rows of a given length from directions and scales, and the gradient in both.

Two forms of the same passes: plain torch, and Triton kernels for float32 on a GPU, which sweep once over memory each
way. Source: arXiv 1602.07868.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs alone
    triton = None

EPSILON = 1e-12
"""Lengths are not divided by less."""
ROWS, WARPS = 16, 4
"""Rows of one head, and warps, of a Triton program."""


def scaled_rows(direction: Tensor, scale: Tensor, factor: float, out: Tensor) -> Tensor:
    """Write each direction at the length scale·factor.

    Args:
        direction: Accum[H K I], of any length.
        scale: Accum[H K].
        factor: on all lengths.
        out: Compute[H P I], P at least K; written, with zeros behind the last row.

    Returns:
        `out`.
    """
    heads, clusters, width = direction.shape
    if _has_kernels(direction):
        columns = out.shape[1]
        _scaled_rows_kernel[(triton.cdiv(columns, ROWS), heads)](
            direction, scale, out, clusters, columns, width, factor,
            row_block=ROWS, width_block=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip
        return out
    out[:, :clusters] = direction * (scale * factor / _lengths(direction))[..., None]
    out[:, clusters:] = 0
    return out


def scaled_rows_backward(slopes: Tensor, direction: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Compute the gradient in direction and scale from that in the rows that `scaled_rows` wrote.

    Args:
        slopes: Compute or Accum[H P I]; rows behind the last cluster are not read.
        direction: Accum[H K I].
        scale: Accum[H K].
        factor: as given to `scaled_rows`.

    Returns:
        Accum[H K I] and Accum[H K].
    """
    heads, clusters, width = direction.shape
    if _has_kernels(direction):
        gradient, scale_gradient = torch.empty_like(direction), torch.empty_like(scale)
        _scaled_rows_backward_kernel[(triton.cdiv(clusters, ROWS), heads)](
            slopes, direction, scale, gradient, scale_gradient, clusters, slopes.shape[1], width, factor,
            row_block=ROWS, width_block=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip
        return gradient, scale_gradient
    lengths = _lengths(direction)
    unit, slopes = direction / lengths[..., None], slopes[:, :clusters].to(direction.dtype)
    cosine = (unit * slopes).sum(-1)
    return (slopes - unit * cosine[..., None]) * (scale * factor / lengths)[..., None], cosine * factor


def _lengths(direction: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(direction, dim=-1).clamp_(min=EPSILON)
    return lengths


def _has_kernels(x: Tensor) -> bool:
    """Return whether the Triton kernels take these directions."""
    return x.is_cuda and triton is not None and x.dtype == torch.float32


if triton is not None:
    _EPSILON = tl.constexpr(EPSILON)

    @triton.jit
    def _scaled_rows_kernel(
        direction, scale, out, clusters, columns, width, factor,
        row_block: tl.constexpr, width_block: tl.constexpr,
    ):  # fmt: skip
        """Scale some rows of one head, each read once."""
        head = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * row_block + tl.arange(0, row_block)
        column = tl.arange(0, width_block)
        is_cluster, inside = row < clusters, (column < width)[None, :]
        x = tl.load(
            direction + ((head * clusters + row) * width)[:, None] + column[None, :],
            mask=is_cluster[:, None] & inside, other=0.0,
        )  # fmt: skip
        length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), _EPSILON)
        ratio = tl.load(scale + head * clusters + row, mask=is_cluster, other=0.0) * factor / length
        place = out + ((head * columns + row) * width)[:, None] + column[None, :]
        tl.store(place, (x * ratio[:, None]).to(out.dtype.element_ty), mask=(row < columns)[:, None] & inside)

    @triton.jit
    def _scaled_rows_backward_kernel(
        slopes, direction, scale, gradient, scale_gradient, clusters, columns, width, factor,
        row_block: tl.constexpr, width_block: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * row_block + tl.arange(0, row_block)
        column = tl.arange(0, width_block)
        is_cluster = row < clusters
        inside = is_cluster[:, None] & (column < width)[None, :]
        place = ((head * clusters + row) * width)[:, None] + column[None, :]
        x = tl.load(direction + place, mask=inside, other=0.0)
        slope = tl.load(
            slopes + ((head * columns + row) * width)[:, None] + column[None, :], mask=inside, other=0.0
        ).to(tl.float32)  # fmt: skip
        length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), _EPSILON)
        unit = x / length[:, None]
        cosine = tl.sum(unit * slope, axis=1)
        ratio = tl.load(scale + head * clusters + row, mask=is_cluster, other=0.0) * factor / length
        tl.store(gradient + place, (slope - unit * cosine[:, None]) * ratio[:, None], mask=inside)
        tl.store(scale_gradient + head * clusters + row, cosine * factor, mask=is_cluster)
