"""Inverses and log-determinants of many small symmetric positive definite matrices.

LAPACK takes them one by one, and a matrix of 32 columns is too little work for it: on a CPU with wide registers
definite.h takes 16 side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayclust.kernels.native import call, library

WIDEST = 32
"""Width up to which the compiled form goes."""
_INDEX_LIMIT = 1 << 27


def inverse_and_log_determinant(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """A⁻¹ and log|A| of each matrix.

    Args:
        matrices: Float[C m m], symmetric positive definite; only what is on and above the diagonal is read.

    Returns:
        Float[C m m] and Float[C]; where a matrix is not positive definite its logarithm is no finite number.
    """
    if _is_compiled(matrices):
        return _compiled(matrices)
    factor, failed = torch.linalg.cholesky_ex(matrices, upper=True)
    logs = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.cholesky_inverse(factor, upper=True), torch.where(failed == 0, logs, torch.nan)


def _is_compiled(matrices: Tensor) -> bool:
    fits = matrices.shape[-1] <= WIDEST and matrices.stride(-1) == 1 and matrices.stride(0) < _INDEX_LIMIT
    return fits and matrices.device.type == "cpu" and matrices.dtype == torch.float32 and library() is not None


def _compiled(matrices: Tensor) -> tuple[Tensor, Tensor]:
    count, width, _ = matrices.shape
    inverse, pivots = matrices.new_empty(count, width, width), matrices.new_empty(count, width)
    call("invert_definite", matrices, matrices.stride(0), matrices.stride(1), inverse, pivots, count, width)
    return inverse, pivots.log().sum(-1)
