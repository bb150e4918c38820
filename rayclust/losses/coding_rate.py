"""Rate reduction: how much room rows fill all together, and how much group by group.

L = −R(Z) + γ R_c(Z, Π) + (λ/2) ‖Π‖_F²; R_c is in compression_rate.py.

Source: arXiv 2306.05272 (the loss), arXiv 2006.08558 (the rate).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayclust.arrays import require_matrix


def coding_rate(z: Tensor, distortion: float) -> Tensor:
    """R(Z) = ½ log|I + d/(nε²) ZᵀZ|: half the log-volume that the rows fill at a given distortion.

    Args:
        z: Float[n d], unit rows, already gathered across workers; taken in float32 or wider.
        distortion: squared error allowed per row, ε², in squared row lengths; above 0.

    Returns:
        Float[], nats; 0 when every row is zero, at most (d/2) ln(1 + 1/ε²) for unit rows.

    Raises:
        ShapeError: `z` does not have two axes.

    Source: arXiv 2006.08558, R(Z, ε), with `distortion` = ε².
    """
    require_matrix(z, "z")
    z = z if z.dtype == torch.float64 else z.float()
    count, width = z.shape
    if count < width:  # ZZᵀ has the same determinant
        z = z.T
    moments = z.T @ z
    moments = torch.eye(len(moments), dtype=z.dtype, device=z.device) + width / (count * distortion) * moments
    factor: Tensor = torch.linalg.cholesky(moments)
    return factor.diagonal().log().sum()


def membership_energy(membership: Tensor) -> Tensor:
    """½ ‖Π‖_F²: n/2 where every row belongs to one column, ½ where all belong to all alike.

    Args:
        membership: Float[n m], columns of Π; the sum over workers' columns is that of the whole.

    Returns:
        Float[]; for doubly stochastic Π in [½, n/2].
    """
    return 0.5 * membership.square().sum()
