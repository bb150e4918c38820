"""Greedy k-means++: first centres of several restarts, drawn one after another or, of many, in rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayclust.errors import ConfigError

_DISTANCES_AT_ONCE = 2**22
_GREEDY_CLUSTERS = 256
"""K up to which seed is drawn after seed; above it an eighth of the number drawn so far at once."""


def kmeans_plusplus(
    x: Tensor, clusters: int, seeds: Sequence[int | tuple[int, ...]], weights: Tensor | None = None
) -> Tensor:
    """Draw greedy k-means++ seeds of several restarts together.

    Each next seed is the best of 2 + ⌊ln K⌋ rows that are drawn with a probability proportional to their squared
    distance to the seeds before: the one that leaves the least sum of squared distances; ties go to the first drawn.
    Above 256 clusters an eighth of the number of seeds so far is drawn at once, with the same probabilities.

    Args:
        x: Float[N D], on one worker.
        clusters: K, from 1 to N.
        seeds: one per restart; a restart's seeds depend on its own seed alone.
        weights: Float64[N] above 0, factors of the probabilities and distances; None weighs all 1.

    Returns:
        Int64[R K], positions of the seeds in `x`.

    Raises:
        ConfigError: there are fewer rows than clusters.

    Source: Arthur & Vassilvitskii 2007, section 2.2, with the local trials of their section 6.
    """
    if clusters > len(x):
        raise ConfigError(f"clusters = {clusters}: at most the number of rows, {len(x)}")
    trials = 2 + int(math.log(clusters))
    draws = np.stack([np.random.default_rng(seed).random((clusters, trials)) for seed in seeds])
    uniform = torch.from_numpy(draws).to(x.device)
    x = x - x.mean(0)  # distances from products lose digits far from zero
    squares = x.square().sum(1)

    def distances_to(chosen: Tensor) -> Tensor:
        """Squared distances Float[R T N] of all rows to chosen rows Int64[R T]."""
        R, T = chosen.shape
        flat, step = chosen.reshape(-1), max(1, _DISTANCES_AT_ONCE // (R * T))
        result = x.new_empty((R * T, len(x)))
        for low in range(0, len(x), step):
            span = slice(low, low + step)
            torch.addmm(squares[None, span], x[flat], x[span].T, alpha=-2.0, out=result[:, span])
            result[:, span].add_(squares[flat, None]).clamp_(min=0)
        result.scatter_(1, flat[:, None], 0.0)  # exactly 0 from a row to itself, whatever the rounding
        return result.view(R, T, len(x))

    restarts = torch.arange(len(seeds), device=x.device)
    chosen = (uniform[:, 0, :1] * len(x)).long()
    if weights is not None:
        shares = weights.cumsum(0)
        chosen = torch.searchsorted(shares, uniform[:, 0, :1] * shares[-1], right=True).clamp_(max=len(x) - 1)
    closest = distances_to(chosen)[:, 0]
    if clusters > _GREEDY_CLUSTERS:
        return torch.stack([_draw_in_rounds(x, chosen[r], closest[r], uniform[r, :, 0], weights) for r in restarts])
    for k in range(1, clusters):
        # Draw T candidates with probability ∝ D(x)², by inverting the cumulative sum.
        cumulative = (closest if weights is None else closest * weights).cumsum(1, dtype=torch.float64)
        candidates = torch.searchsorted(cumulative, uniform[:, k] * cumulative[:, -1:], right=True)
        candidates.clamp_(max=len(x) - 1)
        # Keep the one that lowers the potential most.
        distances = torch.minimum(distances_to(candidates), closest[:, None])
        best = (distances if weights is None else distances * weights).sum(2, dtype=torch.float64).argmin(1)
        closest = distances[restarts, best]
        chosen = torch.cat([chosen, candidates[restarts, best, None]], dim=1)
    return chosen


def _draw_in_rounds(x: Tensor, chosen: Tensor, closest: Tensor, uniform: Tensor, weights: Tensor | None) -> Tensor:
    """Draw k-means++ seeds, an eighth of the number so far at once: K products with all rows become a few large ones.

    Args:
        x: Float[N D], near zero.
        chosen: Int64[1], the first seed.
        closest: Float[N], squared distances to it; changed in place.
        uniform: Float64[K] of [0, 1).
        weights: Float64[N] or None, as for `kmeans_plusplus`.

    Returns:
        Int64[K].
    """
    squares = x.square().sum(1)
    while len(chosen) < len(uniform):
        # 1. Systematic sampling with probability ∝ D(x)²: equal steps along the cumulative sum, from one offset. No row
        # is drawn twice but where it alone is worth more than a step.
        count = min(max(1, len(chosen) // 8), len(uniform) - len(chosen))
        cumulative = (closest if weights is None else closest * weights).cumsum(0, dtype=torch.float64)
        steps = torch.arange(count, device=x.device) + uniform[len(chosen)]
        drawn = torch.searchsorted(cumulative, steps / count * cumulative[-1], right=True).clamp_(max=len(x) - 1)
        chosen = torch.cat([chosen, drawn])
        # 2. D(x)² with the new seeds.
        step = max(1, _DISTANCES_AT_ONCE // count)
        for low in range(0, len(x), step):
            span = slice(low, low + step)
            products = torch.addmm(squares[None, drawn], x[span], x[drawn].T, alpha=-2.0)
            closest[span] = torch.minimum(closest[span], products.amin(1).add_(squares[span]).clamp_(min=0))
        closest[drawn] = 0.0
    return chosen
