"""First centres: greedy k-means++."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayclust.errors import ConfigError

_DISTANCES_AT_ONCE = 2**22


def kmeans_plusplus(x: Tensor, clusters: int, seeds: Sequence[int | tuple[int, ...]]) -> Tensor:
    """Greedy k-means++ seeds of several restarts, drawn together.

    Each next seed is the best of 2 + ⌊ln K⌋ rows that are drawn with a probability proportional to their squared
    distance to the seeds before: the one that leaves the least sum of squared distances; ties go to the first drawn.

    Args:
        x: Float[N D], on one worker.
        clusters: K, from 1 to N.
        seeds: one per restart; a restart's seeds depend on its own seed alone.

    Returns:
        Int64[R K], which rows of `x` are the seeds.

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
    each = torch.arange(len(seeds), device=x.device)
    chosen = (uniform[:, 0, :1] * len(x)).long()
    closest = _squared_distances(x, squares, chosen)[:, 0]
    for k in range(1, clusters):
        candidates = _draw(closest, uniform[:, k])
        distances = torch.minimum(_squared_distances(x, squares, candidates), closest[:, None])
        best = distances.sum(2, dtype=torch.float64).argmin(1)
        closest = distances[each, best]
        chosen = torch.cat([chosen, candidates[each, best, None]], dim=1)
    return chosen


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Positions Int64[R T] drawn with probability proportional to weights Float[R N], from numbers in [0, 1)."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.clamp_(max=weights.shape[1] - 1)


def _squared_distances(x: Tensor, squares: Tensor, chosen: Tensor) -> Tensor:
    """Squared distances Float[R T N] of all rows to chosen rows Int64[R T]."""
    R, T = chosen.shape
    flat = chosen.reshape(-1)
    result = x.new_empty((R * T, len(x)))
    for low in range(0, len(x), max(1, _DISTANCES_AT_ONCE // (R * T))):
        span = slice(low, low + max(1, _DISTANCES_AT_ONCE // (R * T)))
        torch.addmm(squares[None, span], x[flat], x[span].T, alpha=-2.0, out=result[:, span])
        result[:, span].add_(squares[flat, None]).clamp_(min=0)
    result.scatter_(1, flat[:, None], 0.0)  # a row is at no distance from itself, whatever the rounding says
    return result.view(R, T, len(x))
