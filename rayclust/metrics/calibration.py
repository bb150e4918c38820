"""Confidence that says how often rows are right, estimated without labels.

A method's probability says how sure the method is, not how often it is right: 99 % may stand beside an accuracy of
50 %. Two measures that need no labels follow accuracy. Of as many nearest rows as a cluster has on average, the share
in a row's own cluster is large where a cluster is all that lies there; and k-means of parts of the rows finds the
clusters again where they are those of the data. How their product becomes a probability was fitted on labelled sets, by
logistic regression; benchmarks/confidence.py shows the error on each set where it is fitted on the others alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import FloatArray, require_matrix
from rayclust.clustering import kmeans
from rayclust.clustering.settings import KMeansOptions
from rayclust.errors import ShapeError
from rayclust.search.knn import top_k

LEAST_ROWS, MOST_ROWS, ROWS_PER_CLUSTER = 8192, 65_536, 8
"""Rows of the sample: 8 per cluster, at least 8,192 and at most 65,536."""
MOST_CLUSTERS = 512
"""Of more clusters, one and those nearest to it are measured."""
QUERIES, KNOTS = 4096, 33
STARTS, PASSES = 2, 30
"""Of k-means of each half."""
INTERCEPT, LEVEL, SLOPE = 1.24, 1.72, 0.93
"""Of the log odds: constant, slope of both measures' product over all rows, slope of a row's deviation."""
MOST = 4.0
"""Largest log odds either way: from 2 to 98 %, beyond which no labelled set shows what is right."""
_RAMP = 0.05
"""Rise of the log odds over all knots where the measure is level, so that no two probabilities become one."""


@dataclass(frozen=True)
class Calibration:
    """A rising map from a method's probability to the expected share of right rows, linear between knots."""

    probabilities: tuple[float, ...]
    """Of the method, rising from 0 to 1."""
    shares: tuple[float, ...]
    """Expected to be right at these, rising, in [0, 1]."""

    def __call__(self, probability: FloatArray) -> FloatArray:
        """Return Float32[B] for Float[B]; larger stays larger."""
        return np.interp(probability.astype(np.float64), self.probabilities, self.shares).astype(np.float32)


def sample_size(count: int, clusters: int) -> int:
    """Return how many of N rows `calibrate` needs to see for K clusters."""
    return min(count, MOST_ROWS, max(LEAST_ROWS, ROWS_PER_CLUSTER * clusters))


def calibrate(x: Tensor, clusters: Tensor, probability: Tensor, count: int, seed: int = 0) -> Calibration:
    """Fit the map on a sample of rows; a single row or cluster is left as it is.

    Args:
        x: Float[n D], rows in random order, compared by cosine.
        clusters: Int64[n], 0 to K − 1.
        probability: Float[n], the method's of these clusters.
        count: K.
        seed: of k-means.

    Raises:
        ShapeError: lengths differ.
    """
    if count < 2 or len(x) < 2:
        return Calibration((0.0, 1.0), (0.0, 1.0))
    share, again = measure(x, clusters, count, seed)
    certain = probability[: len(share)].double().numpy()
    knots = np.unique([0.0, *np.quantile(certain, np.linspace(0, 1, KNOTS)), 1.0])
    odds = INTERCEPT + link_inputs(share, again, certain, knots) @ [LEVEL, SLOPE]
    ramp = np.linspace(-_RAMP / 2, _RAMP / 2, len(knots))
    shares = 1 / (1 + np.exp(-odds.clip(-MOST, MOST) - ramp))
    return Calibration(tuple(knots.tolist()), tuple(shares.round(6).tolist()))


def link_inputs(share: FloatArray, again: float, certain: FloatArray, asked: FloatArray) -> FloatArray:
    """Return what the log odds are linear in, for some probabilities: Float64[m 2].

    Args:
        share: Float64[q] of `measure`.
        again: of `measure`.
        certain: Float64[q], the method's probabilities of the same rows.
        asked: Float64[m], probabilities.
    """
    from sklearn.isotonic import IsotonicRegression  # `status` and a run with nothing to do go without it

    curve = IsotonicRegression(out_of_bounds="clip").fit(certain, share)
    level, deviation = _log_odds(share.mean() * again), _log_odds(curve.predict(asked)) - _log_odds(share.mean())
    return np.stack([np.broadcast_to(level, deviation.shape), deviation], axis=1)


def measure(x: Tensor, clusters: Tensor, count: int, seed: int = 0) -> tuple[FloatArray, float]:
    """Measure how far clusters are those of the data.

    Args:
        x: Float[n D], at least two rows in random order, compared by cosine.
        clusters: Int64[n], 0 to K − 1.
        count: K, at least 2.
        seed: of k-means.

    Returns:
        For the first of the rows the share of their n/K nearest in their own cluster beyond that of chance, Float64[q]
        in [0, 1]; and the share of rows that k-means of halves of them puts into the same clusters, in [0, 1].

    Raises:
        ShapeError: fewer than two rows, or lengths differ.
    """
    from scipy.optimize import linear_sum_assignment

    require_matrix(x, "x")
    if len(x) < 2 or len(clusters) != len(x):
        raise ShapeError(f"{len(x)} rows and {len(clusters)} clusters: as many of each are needed, two at least")
    x = functional.normalize(x.float(), dim=1)
    if count > MOST_CLUSTERS:
        sums = functional.normalize(x.new_zeros(count, x.shape[1]).index_add_(0, clusters, x), dim=1)
        near = torch.isin(clusters, (sums @ sums[clusters[0]]).topk(MOST_CLUSTERS)[1])
        x, clusters, count = x[near], torch.unique(clusters[near], return_inverse=True)[1], MOST_CLUSTERS
    # 1. The nearest rows, as many as a cluster has on average.
    queries = min(QUERIES, len(x))
    nearest, _ = top_k(x[:queries], x, min(max(1, round(len(x) / count)), len(x) - 1), query_ids=torch.arange(queries))
    share = (clusters[nearest] == clusters[:queries, None]).double().mean(1)
    share = ((share - 1 / count) / (1 - 1 / count)).clamp(min=0)
    # 2. k-means of each half of the rows; its clusters are matched so that most rows agree.
    agreeing = []
    for half, own in ((x[::2], clusters[::2]), (x[1::2], clusters[1::2])):
        options = KMeansOptions(clusters=min(count, len(half)), restarts=STARTS, max_iterations=PASSES)
        for found in kmeans.fit_all(half, options, seed)[0]:
            joint = torch.bincount(own * count + found, minlength=count**2).view(count, count).numpy()
            agreeing.append(joint[linear_sum_assignment(joint, maximize=True)].sum() / len(half))
    return share.numpy(), float(np.mean(agreeing))


def _log_odds(share: FloatArray | float) -> FloatArray:
    share = np.clip(share, 0.02, 0.98)
    return np.asarray(np.log(share / (1 - share)))
