"""A mixture of two beta distributions, which splits scores in [0, 1] into low and high ones without a threshold.

EM whose M-step matches moments in place of likelihood: closed-form, and enough to tell clean from noisy samples by
their losses or confidences (Arazo et al. 2019, arXiv 1904.11238, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betaln, logsumexp

from rayclust.arrays import FloatArray
from rayclust.errors import ShapeError

_EDGE = 1e-4
"""Scores are kept as far from 0 and 1, where densities may be infinite."""


@dataclass(frozen=True)
class BetaMixture:
    """Σ_c weight_c · Beta(alpha_c, beta_c), the component of the lower mean first; Float64[2] each."""

    weight: FloatArray
    alpha: FloatArray
    beta: FloatArray

    def log_joint(self, scores: FloatArray) -> FloatArray:
        """Return ln(weight_c · p_c(s)), Float64[N 2], of scores Float[N] in [0, 1]."""
        s = np.clip(np.asarray(scores, np.float64), _EDGE, 1 - _EDGE)[:, None]
        log_density = (self.alpha - 1) * np.log(s) + (self.beta - 1) * np.log1p(-s) - betaln(self.alpha, self.beta)
        return np.asarray(np.log(self.weight) + log_density)

    def posterior(self, scores: FloatArray) -> FloatArray:
        """Return the probability that each score is of the high component, Float64[N]."""
        joint = self.log_joint(scores)
        return np.asarray(np.exp(joint[:, 1] - logsumexp(joint, axis=1)))


def fit(scores: FloatArray, iterations: int = 10) -> BetaMixture:
    """Fit the mixture by EM, from the halves below and above the scores' mean.

    Args:
        scores: Float[N] in [0, 1], at least two that differ.
        iterations: of EM.

    Raises:
        ShapeError: scores are no vector, outside [0, 1], or all equal.
    """
    s = np.asarray(scores, np.float64)
    if s.ndim != 1 or not len(s) or not (s.min() >= 0 and s.max() <= 1 and s.min() < s.max()):
        raise ShapeError("scores: a vector of numbers from 0 to 1 that are not all equal is needed")
    s = np.clip(s, _EDGE, 1 - _EDGE)
    high = (s > s.mean()).astype(np.float64)
    mixture = _match(s, high)
    for _ in range(iterations):
        mixture = _match(s, mixture.posterior(s))
    return mixture


def _match(s: FloatArray, high: FloatArray) -> BetaMixture:
    """M-step: beta distributions of each component's mean m and variance v, α + β = m(1 − m)/v − 1."""
    responsibility = np.maximum(np.stack([1 - high, high]), 1e-12)
    total = responsibility.sum(axis=1)
    mean = responsibility @ s / total
    variance = np.maximum((responsibility * (s - mean[:, None]) ** 2).sum(axis=1) / total, 1e-8)
    strength = np.maximum(mean * (1 - mean) / variance - 1, 1e-2)
    order = np.argsort(mean)
    return BetaMixture((total / len(s))[order], (mean * strength)[order], ((1 - mean) * strength)[order])
