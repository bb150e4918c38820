"""The compression term of rate reduction, R_c(Z, Π), exact, with its gradient in closed form.

    R_c = Σ_j t_j/(2n) · log|A_j|,   A_j = I + a_j M_j,   a_j = d/(t_j ε²),   M_j = Zᵀ diag(π_j) Z,   t_j = Σ_i Π_ij

    ∂R_c/∂z_i  = 2κ Σ_j Π_ij A_j⁻¹ z_i                      κ = d/(2nε²)
    ∂R_c/∂Π_ij = κ q_ij + (log|A_j| − a_j Σ_i Π_ij q_ij)/(2n),   q_ij = z_iᵀ A_j⁻¹ z_i

The last bracket is the way through t_j: tr(A_j⁻¹ a_j M_j) = a_j Σ_i Π_ij q_ij. The routes to log|A_j|, q and
Σ_j Π_ij A_j⁻¹ z_i are in compression_routes.py; the gradient is found together with the value, and nothing of size
n × d × n is ever kept.

Source: arXiv 2306.05272, R_c with each column of Π as a group; arXiv 2006.08558 for the rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayclust.arrays import require_matrix
from rayclust.errors import ShapeError
from rayclust.losses.compression_routes import Found, Groups, by_rows, by_top, by_width, prefers_rows

GROUP_OFFSET = 1e-8
"""Added to every t_j, as published."""
JITTERS = (0.0, 1e-5, 1e-4)
"""Added to the diagonals that are factorised, whose eigenvalues are at least 1: nothing, and where Cholesky breaks down
in float32 all the same, the next."""


@dataclass(frozen=True)
class CompressionOptions:
    """How the compression term is computed."""

    memory: int = 1 << 30
    """Bytes that working arrays may take, about."""
    top: int | None = None
    """Largest entries kept of each column of Π; None keeps all, which is exact."""
    most_truncated: float = 1e-3
    """Share of Π's mass that `top` may leave out; where it would leave out more, all entries are kept."""


EXACT = CompressionOptions()


def compression_rate(z: Tensor, membership: Tensor, distortion: float, options: CompressionOptions = EXACT) -> Tensor:
    """R_c: the rate of the rows when every column of Π is a group.

    Args:
        z: Float[n d], unit rows, already gathered across workers.
        membership: Float[n m] ≥ 0, columns of Π; a worker's share of them gives its share of the sum.
        distortion: squared error allowed per row, ε², in squared row lengths; above 0.
        options: memory and truncation.

    Returns:
        Float[], nats, not below 0; differentiable once in `z` and `membership`.

    Raises:
        ShapeError: the two are not matrices with the same number of rows.
    """
    require_matrix(z, "z")
    require_matrix(membership, "membership")
    if len(z) != len(membership):
        raise ShapeError(f"membership has {len(membership)} rows: {len(z)} are needed, one for each row of z")
    result: Tensor = _CompressionRate.apply(z, membership, distortion, options)
    return result


def truncated_mass(membership: Tensor, top: int) -> Tensor:
    """The share of Π's mass outside the `top` largest entries of each column: Float[] in [0, 1]."""
    kept = membership.topk(min(top, len(membership)), dim=0).values.sum()
    return (1.0 - kept / membership.sum()).clamp(min=0.0)


class _CompressionRate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, membership: Tensor, distortion: float, options: CompressionOptions) -> Tensor:
        wants = any(ctx.needs_input_grad)
        count, width = z.shape
        sums = membership.detach().sum(0) + GROUP_OFFSET
        groups = Groups(z.detach(), membership.detach(), width / (distortion * sums), wants)
        found = _solve(groups, options)
        if wants:
            kappa = width / (2.0 * count * distortion)
            through_sums = found.logs - groups.scales * (groups.membership * found.forms).sum(0)
            by_membership = found.forms.mul_(kappa).add_(through_sums / (2.0 * count))
            ctx.save_for_backward(found.pulls.mul_(2.0 * kappa), by_membership)
        return sums @ found.logs / (2.0 * count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_z, by_membership = ctx.saved_tensors
        return grad * by_z, grad * by_membership, None, None


def _solve(groups: Groups, options: CompressionOptions) -> Found:
    """By the cheapest route, with as little jitter as will do."""
    top = options.top
    if top is not None and float(truncated_mass(groups.membership, top)) > options.most_truncated:
        top = None
    room = options.memory // groups.z.element_size()
    for jitter in JITTERS:
        if top is not None:
            found = by_top(groups, min(top, len(groups.z)), room, jitter)
        else:
            found = (by_rows if prefers_rows(*groups.z.shape) else by_width)(groups, room, jitter)
        if bool(found.logs.isfinite().all()):
            break
    return found
