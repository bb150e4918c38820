"""Inverses and log-determinants of many symmetric positive definite matrices at once.

By halves: of [[A, B], [Bᵀ, C]] the Schur complement S = C − Bᵀ A⁻¹ B has log|A| + log|S| as log-determinant, and the
inverse follows by products. Below LEAF columns a Cholesky factorisation takes over. Nearly all work is in batched
matrix products, which LAPACK's one-by-one factorisations of small matrices are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rayclust.kernels import definite
from rayclust.kernels.crew import Crew
from rayclust.losses.outer_products import put_quarters, quarters

LEAF = 32
"""Width up to which matrices are factorised by Cholesky."""
TOGETHER = 64
"""Small matrices that one thread takes at a time: they stay in its cache."""
SMALL = 256
"""Width up to which matrices are shared out over threads; larger ones keep all threads busy by themselves."""


def inverse_and_log_determinant(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """A⁻¹ and log|A| of each matrix.

    Args:
        matrices: Float[C m m], symmetric positive definite; only what is on and above the diagonal is read.

    Returns:
        Float[C m m] and Float[C], in the dtype of `matrices`; not numbers where a matrix is not positive definite.
    """
    width = matrices.shape[-1]
    if width <= LEAF:
        return definite.inverse_and_log_determinant(matrices)
    half = width // 2
    inverse = torch.empty_like(matrices)
    corner = matrices[:, :half, :half], matrices[:, :half, half:], matrices[:, half:, half:]
    first, across, last, logs = _by_quarters(*corner)
    inverse[:, :half, :half], inverse[:, :half, half:], inverse[:, half:, half:] = first, across, last
    inverse[:, half:, :half] = across.mT
    return inverse, logs


def _by_quarters(first: Tensor, across: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A₁₁, A₁₂, A₂₂ to those of the inverse, and the log-determinant."""
    inverse, logs = inverse_and_log_determinant(first)
    ratio = torch.bmm(inverse, across)  # A₁₁⁻¹ A₁₂
    schur = torch.baddbmm(last, across.mT, ratio, alpha=-1.0)
    corner, more = inverse_and_log_determinant(schur)
    product = torch.bmm(ratio, corner)
    inverse = torch.baddbmm(inverse, product, ratio.mT)
    return inverse, product.neg_(), corner, logs + more


def invert_rectangles(rectangles: Tensor, scales: Tensor, jitter: float = 0.0) -> Tensor:
    """Replaces the rectangles of M_j by the weights of (I + s_j M_j)⁻¹, and gives log|I + s_j M_j|.

    Args:
        rectangles: Float[C k d + 1], see outer_products.py; contiguous.
        scales: Float[C], s_j.
        jitter: added to the diagonal.

    Returns:
        Float[C].
    """
    logs = torch.empty_like(scales)

    def piece(number: int, _: int = 0) -> None:
        some = slice(number * together, (number + 1) * together)
        part = rectangles[some].mul_(scales[some, None, None])
        first, across, last = quarters(part)
        eye = torch.eye(part.shape[1], dtype=part.dtype, device=part.device) * (1.0 + jitter)
        *found, logs[some] = _by_quarters(first + eye, across.contiguous(), last + eye)
        put_quarters(part, *found)

    together = TOGETHER if _shares_out(rectangles, 2 * rectangles.shape[1]) else len(rectangles)
    in_pieces(piece, -(-len(rectangles) // together), shared=together < len(rectangles))
    return logs


def in_pieces(work: Callable[[int, int], None], count: int, shared: bool) -> None:
    """Calls `work(piece, member)` for all pieces, over the processor's threads where they are `shared`."""
    threads = torch.get_num_threads()
    if shared and threads > 1:
        _crew(threads).each(work, count)
    else:
        with torch.no_grad():
            for number in range(count):
                work(number, 0)


def _shares_out(x: Tensor, width: int) -> bool:
    return x.device.type == "cpu" and width <= SMALL


@lru_cache(4)
def _crew(size: int) -> Crew:
    return Crew(size)
