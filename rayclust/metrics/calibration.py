"""Confidence that says how often rows are right, estimated without labels.

A method's probability says how sure the method is, not how often it is right: 99 % may stand beside an accuracy of
50 %. What needs no labels and follows accuracy: nearest rows are in a row's own cluster where clusters are what the
rows form; and other ways to cluster, k-means of parts of the rows and the spectrum of their neighbour graph, find the
same clusters again. Both hold as well where rows come in small groups of near-copies (frames of one scene, views of
one thing), which any clusters keep together, so that there they support these less. How they become the share of right
rows was fitted on labelled sets, by linear regression of log odds; benchmarks/confidence.py shows the error on each set
where it is fitted on the others alone. The method's own probabilities, their log odds brought to one mean and spread,
say which rows are above that share and which below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import FloatArray, require_matrix
from rayclust.clustering import kmeans
from rayclust.clustering.neighborhood import graph_eigenpairs, mean_of_neighbors
from rayclust.errors import ShapeError
from rayclust.search.knn import top_k
from rayclust.settings import KMeansOptions

MEASURED_ROWS, MOST_ROWS, ROWS_PER_CLUSTER = 4096, 65_536, 8
"""Rows that `calibrate` needs to see: 8 per cluster, at least 4,096 and at most 65,536; 4,096 at most are measured."""
MOST_CLUSTERS = 64
"""Of more clusters, one and those nearest to it are measured."""
NEAREST, MIN_GRAPH_NEIGHBORS = 10, 5
"""Rows that count as nearest; least neighbours in the graph, which has √(n/K) for each row."""
STARTS, PASSES = 2, 30
"""Of each k-means."""
INTERCEPT, SUPPORT, CROWDING = -0.70, 1.42, -1.84
"""Log odds of a right row, on average: constant, slopes of the two of `Evidence.inputs`."""
MOST_CROWDING = 0.6
"""Bound of `Evidence.crowding` either way; labelled sets lie within it."""
SPREAD = 1.0
"""Standard deviation of the log odds of the rows of a set, over the share that is right: where few rows are, the
method's own probabilities tell less which."""
MOST = 4.0
"""Largest log odds either way: from 2 to 98 %, beyond which no labelled set shows what is right."""
KNOTS = 33
_COPY = 1e-6
"""Difference of squared distances between unit rows up to which they are one, as computed in float32."""
_CERTAIN = 0.999
"""The method's probabilities above it and below its complement are one."""
_RAMP = 0.05
"""Rise of the log odds over all knots where the map is level, so that no two probabilities become one."""


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


@dataclass(frozen=True)
class Evidence:
    """How far clusters are those of the data; shares are beyond those of chance, 1 at most."""

    nearest: float
    """Share of a row's ten nearest rows that are in its cluster."""
    around: float
    """The same of as many rows as a cluster has on average."""
    again: float
    """Share of the rows that k-means of halves of them puts into the same clusters."""
    spectral: float
    """The same of spectral clusters of the neighbour graph."""
    crowding: float
    """How far rows come in near-copies; see `crowding`."""

    def inputs(self) -> FloatArray:
        """Return what the log odds of a right row are linear in: mean log odds of the shares, bounded crowding."""
        shares = np.array([self.nearest, self.around, self.again, self.spectral])
        return np.array([_log_odds(shares).mean(), np.clip(self.crowding, -MOST_CROWDING, MOST_CROWDING)])

    def level(self) -> float:
        """Return the share of rows that is expected to be right."""
        return float(1 / (1 + np.exp(-(INTERCEPT + self.inputs() @ [SUPPORT, CROWDING]))))


def calibrate(x: Tensor, clusters: Tensor, probability: Tensor, count: int, seed: int = 0) -> Calibration:
    """Fit the map on a sample of rows; a single row or cluster is left as it is.

    Args:
        x: Float[n D], rows in random order, compared by cosine.
        clusters: Int64[n], 0 to K − 1.
        probability: Float[n], the method's of these clusters.
        count: K.
        seed: of k-means and of the eigenvectors' start.

    Raises:
        ShapeError: lengths differ.
    """
    if count < 2 or len(x) < 2:
        return Calibration((0.0, 1.0), (0.0, 1.0))
    return rising_map(probability.double().numpy(), measure(x, clusters, count, seed).level())


def rising_map(probability: FloatArray, level: float, spread: float = SPREAD) -> Calibration:
    """Return the map that is a share on average over some rows and keeps their order.

    Args:
        probability: Float[n], the method's.
        level: share of the rows that are right, in [0, 1].
        spread: standard deviation of the rows' log odds, over `level`.
    """
    from scipy.optimize import brentq  # `status` and a run with nothing to do go without it

    own = _log_odds(probability, _CERTAIN)
    knots = np.unique([0.0, *np.quantile(probability, np.linspace(0, 1, KNOTS)), 1.0])
    odds = spread * level * (_log_odds(knots, _CERTAIN) - own.mean()) / max(own.std(), 1e-3)
    ramp = np.linspace(-_RAMP / 2, _RAMP / 2, len(knots))

    def shares(offset: float) -> FloatArray:
        return np.asarray(1 / (1 + np.exp(-(odds + offset).clip(-MOST, MOST) - ramp)))

    def excess(offset: float) -> float:
        return float(np.interp(probability, knots, shares(offset)).mean()) - float(np.clip(level, 0.02, 0.98))

    limit = MOST + float(np.abs(odds).max())
    found = shares(float(brentq(excess, -limit, limit, xtol=1e-4)))
    return Calibration(tuple(knots.tolist()), tuple(found.round(6).tolist()))


def measure(x: Tensor, clusters: Tensor, count: int, seed: int = 0) -> Evidence:
    """Measure how far clusters are those of the data.

    Args:
        x: Float[n D], at least two rows in random order, compared by cosine.
        clusters: Int64[n], 0 to K − 1.
        count: K, at least 2.
        seed: of k-means and of the eigenvectors' start.

    Raises:
        ShapeError: fewer than two rows, or lengths differ.
    """
    from rayclust.metrics.external import accuracy  # brings scikit-learn's metrics

    require_matrix(x, "x")
    if len(x) < 2 or len(clusters) != len(x):
        raise ShapeError(f"{len(x)} rows and {len(clusters)} clusters: as many of each are needed, two at least")
    x = functional.normalize(x.float(), dim=1)
    if count > MOST_CLUSTERS:
        sums = functional.normalize(x.new_zeros(count, x.shape[1]).index_add_(0, clusters, x), dim=1)
        is_empty = torch.bincount(clusters, minlength=count) == 0
        closest = (sums @ sums[clusters[0]]).masked_fill(is_empty, -torch.inf).topk(MOST_CLUSTERS)[1]
        near = torch.isin(clusters, closest)
        x, clusters, count = x[near], torch.unique(clusters[near], return_inverse=True)[1], MOST_CLUSTERS
    x, clusters = x[:MEASURED_ROWS], clusters[:MEASURED_ROWS]
    # 1. The nearest rows: ten, and as many as a cluster has on average.
    graph_columns = max(MIN_GRAPH_NEIGHBORS, round((len(x) / count) ** 0.5))
    around = min(max(1, round(len(x) / count)), len(x) - 1)
    columns, ids = min(max(around, NEAREST, graph_columns), len(x) - 1), torch.arange(len(x))
    neighbors, similarity = top_k(x, x, columns, query_ids=ids, database_ids=ids)
    same = clusters[neighbors] == clusters[:, None]
    # 2. k-means of each half of the rows, from each start.
    halves = []
    for half, own in ((x[::2], clusters[::2]), (x[1::2], clusters[1::2])):
        options = KMeansOptions(clusters=min(count, len(half)), restarts=STARTS, max_iterations=PASSES)
        halves += [accuracy(own.numpy(), found.numpy()) for found in kmeans.fit_all(half, options, seed)[0]]
    # 3. Spectral clusters.
    pairs = graph_eigenpairs(mean_of_neighbors(neighbors[:, :graph_columns]), min(count, len(x)), seed)
    options = KMeansOptions(clusters=min(count, len(x)), metric="euclidean", restarts=STARTS, max_iterations=PASSES)
    found, inertia = kmeans.fit_all(functional.normalize(pairs.vectors, dim=1), options, seed)
    shares = [float(same[:, :columns].double().mean()) for columns in (NEAREST, around)]
    shares += [float(np.mean(halves)), accuracy(clusters.numpy(), found[int(inertia.argmin())].numpy())]
    nearest, by_size, again, spectral = (max(0.0, (share - 1 / count) / (1 - 1 / count)) for share in shares)
    return Evidence(nearest, by_size, again, spectral, crowding(similarity))


def crowding(similarity: Tensor) -> float:
    """Return how far rows come in small groups of near-copies: the dimension that ten neighbours show over that of two.

    As the logarithm of the ratio: 0 for rows that fill their space evenly, above 0 where the nearest row is nearer than
    the others tell. Exact copies do not count. The dimension is 1 over the mean of ln(d_m / d_j), j < m, where d_j is
    the distance to the j-th nearest row.

    Takes cosines, Float[n M], nearest first, of unit rows.

    Source: Levina and Bickel, Maximum likelihood estimation of intrinsic dimension, 2004, eq. 8, with m = 10 and m = 2.
    """
    squares = 2 - 2 * similarity.double()
    # 1. Distances that differ, so that copies of a row or of a neighbour count once; of fewer than ten the last again.
    rank = (squares.diff(dim=1, prepend=squares.new_zeros(len(squares), 1)) > _COPY).cumsum(1)
    places = torch.searchsorted(rank, torch.arange(1, NEAREST + 1).repeat(len(squares), 1))
    logs = 0.5 * squares.clamp(min=_COPY).gather(1, places.clamp(max=squares.shape[1] - 1)).log()
    # 2. The dimensions.
    ten, two = ((logs[:, m - 1 : m] - logs[:, : m - 1]).mean(1).clamp(min=1e-4).mean() for m in (NEAREST, 2))
    return float((two / ten).log())


def _log_odds(share: FloatArray, most: float = 0.98) -> FloatArray:
    share = np.clip(share, 1 - most, most)
    return np.asarray(np.log(share / (1 - share)))
