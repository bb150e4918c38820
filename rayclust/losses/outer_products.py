"""Products z zᵀ of many rows, each kept as half a matrix in a full rectangle, and sums of them as matrix products.

The rectangle of a symmetric d × d matrix A (d even, k = d/2) is R[b, a], b in 0 … k − 1, a in 0 … d:

    a > b:  R[b, a] = A[b, a − 1]              the first k rows of A, from the diagonal on
    a ≤ b:  R[b, a] = A[k + b, k + a]          the lower triangle of A's last quarter

so that k·(d + 1) numbers hold exactly d(d + 1)/2 entries, and each quarter of A is a plain slice.

Source: Gustavson, Wasniewski, Dongarra, Langou, "Rectangular full packed format for Cholesky's algorithm", 2010.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def cells(width: int) -> int:
    """Numbers in the rectangle of a matrix of even width."""
    return width // 2 * (width + 1)


def outer_products(columns: Tensor, first: int, last: int) -> Tensor:
    """Rows b = first … last − 1 of the rectangles of all z_i z_iᵀ.

    Args:
        columns: Float[d n], contiguous: z_i are its columns; d even.
        first: of the rectangle's rows.
        last: behind the last of them.

    Returns:
        Float[(last − first)·(d + 1) n].
    """
    width, count = columns.shape
    half = width // 2
    out = columns.new_empty(last - first, width + 1, count)
    for b in range(first, last):
        torch.mul(columns[b:], columns[b], out=out[b - first, b + 1 :])
        torch.mul(columns[half : half + b + 1], columns[half + b], out=out[b - first, : b + 1])
    return out.view(-1, count)


def fold(weights: Tensor, columns: Tensor, first: int, total: Tensor) -> None:
    """Adds to `total` the gradient of Σ weights ∘ outer_products(columns, …) with respect to `columns`.

    Args:
        weights: Float[r·(d + 1) n], of r rows of the rectangle; overwritten.
        columns: Float[d n].
        first: of these rows.
        total: Float[d n].
    """
    width, count = columns.shape
    half = width // 2
    weights = weights.view(-1, width + 1, count)
    for row, b in enumerate(range(first, first + len(weights))):
        pairs = ((weights[row, b + 1 :], b, b), (weights[row, : b + 1], half, half + b))
        for weight, start, other in pairs:
            stretch = slice(start, start + len(weight))
            total[stretch].addcmul_(weight, columns[other])
            total[other] += weight.mul_(columns[stretch]).sum(0)


def quarters(rectangles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The quarters A₁₁, A₁₂, A₂₂ of A as views, Float[C k k] each.

    Args:
        rectangles: Float[C k d + 1].

    Returns:
        A₁₁ and A₂₂ hold what they should on and above the diagonal only, A₁₂ everywhere.
    """
    half = rectangles.shape[1]
    return rectangles[:, :, 1 : half + 1], rectangles[:, :, half + 1 :], rectangles[:, :, :half].mT


def put_quarters(rectangles: Tensor, first: Tensor, across: Tensor, last: Tensor) -> None:
    """Writes a symmetric matrix as the weights that Σ R ∘ z zᵀ gives zᵀ A z: entries off the diagonal count twice.

    Args:
        rectangles: Float[C k d + 1], overwritten.
        first: A₁₁, Float[C k k].
        across: A₁₂.
        last: A₂₂.
    """
    half = rectangles.shape[1]
    doubled = _doubled(half, rectangles)
    torch.mul(last, doubled.mT, out=rectangles[:, :, :half])
    rectangles[:, :, half].zero_()
    rectangles[:, :, 1 : half + 1].addcmul_(first, doubled)
    torch.mul(across, 2.0, out=rectangles[:, :, half + 1 :])


def _doubled(half: int, like: Tensor) -> Tensor:
    return _cached_doubled(half, like.dtype, like.device)


@lru_cache(8)
def _cached_doubled(half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 on the diagonal, 2 above, 0 below: Float[k k]."""
    ones = torch.ones(half, half, dtype=dtype, device=device)
    return ones.triu() + ones.triu(1)
