"""Agreement that two partitions have by chance alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from rayclust.arrays import IntArray


def expected_mutual_information(a: IntArray, b: IntArray) -> float:
    """Mean mutual information over all tables with the same row and column sums.

    It depends on a class and a cluster through their sizes alone: equal sizes are summed once, which makes thousands of
    clusters cheap.

    Args:
        a: Int[C], sizes of the classes, above 0.
        b: Int[K], sizes of the clusters, above 0, of the same sum.

    Returns:
        Nats, at least 0.

    Source: Vinh, Epps & Bailey 2010, equation 24a.
    """
    sizes_a, times_a = np.unique(a, return_counts=True)
    sizes_b, times_b = np.unique(b, return_counts=True)
    total = int(a.sum())
    log_factorial = gammaln(np.arange(total + 1) + 1.0)
    result = 0.0
    for size_a, time_a in zip(sizes_a.tolist(), times_a.tolist(), strict=True):
        for size_b, time_b in zip(sizes_b.tolist(), times_b.tolist(), strict=True):
            result += time_a * time_b * _expected_cell(size_a, size_b, total, log_factorial)
    return result


def _expected_cell(a: int, b: int, total: int, log_factorial: NDArray[np.float64]) -> float:
    """One cell's part: its count is hypergeometric."""
    n = np.arange(max(1, a + b - total), min(a, b) + 1)
    fixed = log_factorial[a] + log_factorial[b] + log_factorial[total - a] + log_factorial[total - b]
    free = log_factorial[n] + log_factorial[a - n] + log_factorial[b - n] + log_factorial[total - a - b + n]
    chance = np.exp(fixed - log_factorial[total] - free)
    return float((n / total * np.log(n * (total / (a * b))) * chance).sum())
