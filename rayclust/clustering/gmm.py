"""Gaussian mixtures with diagonal or spherical covariances, over rows of all workers, in memory or streamed.

Expectation-maximisation from a k-means partition. Distances are products of matrices, so that neither an N × K × D
tensor nor an N × K matrix is ever held: a pass over the rows gives sums of K (2D + 1) numbers.

Source: Dempster, Laird and Rubin 1977; the updates as in Bishop, Pattern Recognition and Machine Learning, section 9.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed
from rayclust.clustering import kmeans
from rayclust.clustering.row_stats import Blocks
from rayclust.settings import GmmOptions, KMeansOptions

SMALLEST_MASS = 1e-8
"""Share of a row below which a component keeps its mean and variances."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians."""

    weights: Tensor
    """Float64[K], sum to 1."""
    means: Tensor
    """Float64[K D]."""
    variances: Tensor
    """Float64[K D]; equal along a row for spherical ones."""
    log_likelihood: float = -math.inf
    """Mean over the rows, in nats, under the estimate before; −∞ before any pass."""

    def log_joint(self, x: Tensor) -> Tensor:
        """Return ln w_k + ln N(x | μ_k, σ²_k), Float64[B K] for Float[B D].

        ‖(x − μ)/σ‖² is expanded into products; rows and means are taken relative to the mixture's mean, so that few
        digits are lost.
        """
        origin = self.weights @ self.means
        x, means = x.double() - origin, self.means - origin
        precisions = 1.0 / self.variances
        squares = x.square() @ precisions.T - 2.0 * x @ (means * precisions).T + (means.square() * precisions).sum(1)
        scale = self.variances.log().sum(1) + self.means.shape[1] * math.log(2 * math.pi)
        return self.weights.log() - 0.5 * (squares.clamp(min=0) + scale)


def start(blocks: Blocks, options: GmmOptions, seed: int) -> Mixture:
    """Return the mixture of a k-means partition of all workers' rows.

    Args:
        blocks: this worker's rows.
        options: settings.
        seed: of the first centres.

    Raises:
        ConfigError: there are fewer rows than components.
    """
    partition = KMeansOptions(clusters=options.clusters, metric="euclidean", restarts=options.restarts)
    centers = kmeans.fit(blocks, partition, seed=seed).centers
    sums = centers.new_zeros((len(centers), 1 + 2 * centers.shape[1]), dtype=torch.float64)
    for block in blocks():
        sums += _sums(block, functional.one_hot(kmeans.assign(block, centers)[0], options.clusters).double())
    ones = torch.ones_like(centers, dtype=torch.float64)
    return _maximize(distributed.all_reduce(sums), Mixture(ones[:, 0], centers.double(), ones), options)


def advance(blocks: Blocks, options: GmmOptions, mixture: Mixture, passes: int = 0) -> Iterator[Mixture]:
    """Yield the mixture after each pass over all workers' rows, until it no longer gets better.

    The log-likelihood of what is yielded never falls, but for rounding and the regularisation; the last one is the
    same for any sharding of the rows, but for rounding.

    Args:
        blocks: this worker's rows; the same blocks at every call.
        options: settings.
        mixture: the estimate so far.
        passes: made before, which count as well.
    """
    for _ in range(passes, options.max_iterations):
        K, D = mixture.means.shape
        sums, total = mixture.means.new_zeros((K, 1 + 2 * D), dtype=torch.float64), mixture.means.new_zeros(1)
        for block in blocks():
            # E-step: responsibilities.
            joint = mixture.log_joint(block)
            evidence = joint.logsumexp(1, keepdim=True)
            sums += _sums(block, (joint - evidence).exp())
            total += evidence.sum()
        # M-step.
        sums, total = distributed.all_reduce(sums), distributed.all_reduce(total)
        likelihood, before = float(total) / float(sums[:, 0].sum()), mixture.log_likelihood
        mixture = _maximize(sums, mixture, options, likelihood)
        yield mixture
        if likelihood - before < options.tolerance:
            return


def _sums(x: Tensor, shares: Tensor) -> Tensor:
    """Return Float64[K 1+2D]: sums over the rows of r, r x and r x²."""
    x = x.double()
    return torch.cat([shares.sum(0)[:, None], shares.T @ x, shares.T @ x.square()], dim=1)


def _maximize(sums: Tensor, before: Mixture, options: GmmOptions, likelihood: float = -math.inf) -> Mixture:
    """Return the mixture of the sums; a component that no row belongs to stays where it was."""
    mass, dimension = sums[:, :1], before.means.shape[1]
    alive = mass > SMALLEST_MASS
    safe = mass.clamp(min=SMALLEST_MASS)
    means = torch.where(alive, sums[:, 1 : 1 + dimension] / safe, before.means)
    variances = (sums[:, 1 + dimension :] / safe - means.square()).clamp(min=0)
    if options.covariance == "spherical":
        variances = variances.mean(1, keepdim=True).expand_as(means)
    variances = torch.where(alive, variances + options.regularization, before.variances)
    weights = safe[:, 0] / safe.sum()
    return Mixture(weights, means, variances, likelihood)
