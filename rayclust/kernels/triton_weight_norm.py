"""The passes of weight_norm.py as Triton kernels: a program owns some rows of one head and reads each of them once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORTEST = tl.constexpr(1e-12)
ROWS, WARPS = 16, 4


@triton.jit
def _scale_rows(
    direction, scale, out, clusters, columns, width, factor,
    row_block: tl.constexpr, width_block: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    column = tl.arange(0, width_block)
    known, inside = row < clusters, (column < width)[None, :]
    x = tl.load(
        direction + ((head * clusters + row) * width)[:, None] + column[None, :],
        mask=known[:, None] & inside, other=0.0,
    )  # fmt: skip
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), SHORTEST)
    reach = tl.load(scale + head * clusters + row, mask=known, other=0.0) * factor / length
    place = out + ((head * columns + row) * width)[:, None] + column[None, :]
    tl.store(place, (x * reach[:, None]).to(out.dtype.element_ty), mask=(row < columns)[:, None] & inside)


@triton.jit
def _scale_rows_backward(
    slopes, direction, scale, gradient, scale_gradient, clusters, columns, width, factor,
    row_block: tl.constexpr, width_block: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    column = tl.arange(0, width_block)
    known = row < clusters
    inside = known[:, None] & (column < width)[None, :]
    place = ((head * clusters + row) * width)[:, None] + column[None, :]
    x = tl.load(direction + place, mask=inside, other=0.0)
    slope = tl.load(
        slopes + ((head * columns + row) * width)[:, None] + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), SHORTEST)
    unit = x / length[:, None]
    cosine = tl.sum(unit * slope, axis=1)
    reach = tl.load(scale + head * clusters + row, mask=known, other=0.0) * factor / length
    tl.store(gradient + place, (slope - unit * cosine[:, None]) * reach[:, None], mask=inside)
    tl.store(scale_gradient + head * clusters + row, cosine * factor, mask=known)


def scaled_rows(direction: Tensor, scale: Tensor, factor: float, out: Tensor) -> None:
    """See `weight_norm.scaled_rows`."""
    heads, clusters, width = direction.shape
    columns = out.shape[1]
    _scale_rows[(triton.cdiv(columns, ROWS), heads)](
        direction, scale, out, clusters, columns, width, factor,
        row_block=ROWS, width_block=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip


def scaled_rows_backward(slopes: Tensor, direction: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """See `weight_norm.scaled_rows_backward`."""
    heads, clusters, width = direction.shape
    gradient, scale_gradient = torch.empty_like(direction), torch.empty_like(scale)
    _scale_rows_backward[(triton.cdiv(clusters, ROWS), heads)](
        slopes, direction, scale, gradient, scale_gradient, clusters, slopes.shape[1], width, factor,
        row_block=ROWS, width_block=triton.next_power_of_2(width), num_warps=WARPS,
    )  # fmt: skip
    return gradient, scale_gradient
