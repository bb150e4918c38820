"""Membership of rows in each other: entropic projection of |C Cᵀ| onto doubly stochastic matrices.

In logarithms, with ℓ = |C Cᵀ|/η: a row half-step sets a_i = −LSE_j(ℓ_ij + b_j), a column half-step
b_j = −LSE_i(ℓ_ij + a_i), and Π = exp(a + ℓ + b). The columns' b carries no gradient and the rows' a cancels, so that
exactly Π = row-softmax(ℓ + stopgrad(b)).

Source: arXiv 2306.05272, Π = Proj_{Ω,η}; the absolute value and the number of half-steps are the published program's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError

PUBLISHED_HALF_STEPS = 5
CONVERGED = 1e-6
"""Largest error of a column's sum at which the half-steps end when they are not counted."""
MOST_HALF_STEPS = 2_001


def membership(codes: Tensor, temperature: float, half_steps: int | None = PUBLISHED_HALF_STEPS) -> Tensor:
    """Π of unit codes, all workers' together.

    Args:
        codes: Float[n d], unit rows, already gathered across workers; taken in float32 or wider. Their signs do not
            matter.
        temperature: η, above 0; towards 0 each row belongs to itself alone, towards infinity to all alike.
        half_steps: odd, rows first and last; None goes on until the columns sum to 1 as well.

    Returns:
        Float[n n], positive; rows sum to 1, columns nearly; differentiable in `codes`.

    Raises:
        ConfigError: the temperature is not above 0, or the half-steps are not odd.
        ShapeError: `codes` is no matrix.
    """
    require_matrix(codes, "codes")
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0")
    if half_steps is not None and (half_steps < 1 or half_steps % 2 == 0):
        raise ConfigError(f"half_steps = {half_steps}: must be odd, rows are normalised last")
    codes = codes if codes.dtype == torch.float64 else codes.float()
    logits = (codes @ codes.T).abs() / temperature
    return (logits + _column_scales(logits.detach(), half_steps)).softmax(dim=1)


def _column_scales(logits: Tensor, half_steps: int | None) -> Tensor:
    """b: Float[n]. The logits are symmetric: sums over i are taken along rows, where memory lies."""
    columns = logits.new_zeros(len(logits))
    for _ in range(((MOST_HALF_STEPS if half_steps is None else half_steps) - 1) // 2):
        rows = -(logits + columns).logsumexp(dim=1)
        sums = (logits + rows).logsumexp(dim=1)
        if half_steps is None and float((sums + columns).expm1().abs().max()) < CONVERGED:
            break
        columns = -sums
    return columns
