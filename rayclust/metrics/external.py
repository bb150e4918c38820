"""Agreement of a clustering with true classes.

`labels_true` and `labels_pred` are arrays [N] of integers or strings; their names play no part. Other shapes are
ShapeErrors, no rows a DataError. The caller leaves out rows without a true label first: see `labelled`.

With many more clusters than classes, a map assigns each cluster to a class. Fitted on the rows that it scores, it
rewards small clusters as such (single rows would all be right): the honest map is fitted on other rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from sklearn import metrics

from rayclust.arrays import IntArray
from rayclust.errors import DataError, ShapeError

Labels = ArrayLike
"""One-dimensional: integers or strings."""


def labelled(labels: Labels) -> NDArray[np.bool_]:
    """Return which rows have a label, Bool[N]: not None, not NaN, and not below 0 where labels are integers."""
    values = np.asarray(labels)
    if values.dtype.kind in "iu":
        return np.asarray(values >= 0)
    return np.array([value is not None and value == value for value in values.tolist()], dtype=bool)


def contingency(labels_true: Labels, labels_pred: Labels) -> sparse.csr_array:
    """Count rows by true class and cluster: sparse Int64[C K], those that occur, each in sorted order."""
    rows, columns = _codes(labels_true, labels_pred)
    return sparse.coo_array((np.ones(len(rows), dtype=np.int64), (rows, columns))).tocsr()


def accuracy(labels_true: Labels, labels_pred: Labels) -> float:
    """Return the share of rows that are right when clusters are matched to classes one to one (Hungarian).

    Range 0 to 1, larger is better; about 1/C for random clusters as large as the classes. Symmetric. Rows of unmatched
    clusters count as wrong, so more clusters than classes lower it.
    """
    counts = contingency(labels_true, labels_pred).toarray()
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


def purity(labels_true: Labels, labels_pred: Labels) -> float:
    """Return the share of rows that belong to the most frequent class of their cluster.

    Range 0 to 1, larger is better; 1 for single-row clusters, so compare at one K only. By chance at least the share of
    the largest class. Not symmetric.
    """
    table = contingency(labels_true, labels_pred)
    return float(table.max(axis=0).sum() / table.sum())


def nmi(labels_true: Labels, labels_pred: Labels) -> float:
    """Return the mutual information divided by the arithmetic mean of the two entropies.

    Range 0 to 1, larger is better; independent labels give 0 only as N grows: above 0 by chance with many clusters (see
    `ami`). Symmetric. 1 when both have a single cluster.
    """
    return float(metrics.normalized_mutual_info_score(*_codes(labels_true, labels_pred)))


def ari(labels_true: Labels, labels_pred: Labels) -> float:
    """Return the Rand index above chance: agreement over pairs of rows.

    From −0.5 to 1, larger is better; 0 on average for random labels. Symmetric. 1 for equal partitions.

    Source: Hubert & Arabie 1985, in the form of pair counts.
    """
    return float(metrics.adjusted_rand_score(*_codes(labels_true, labels_pred)))


def fmi(labels_true: Labels, labels_pred: Labels) -> float:
    """Return the geometric mean of precision and recall over pairs of rows: the same cluster foretells the same class.

    Range 0 to 1, larger is better; by chance about the root of the product of the shares of pairs that are together in
    each. Symmetric. 1 for equal partitions, also those of single rows.

    Source: Fowlkes & Mallows 1983.
    """
    codes = _codes(labels_true, labels_pred)
    if all(len(np.unique(one)) == len(one) for one in codes):  # no pair is together in either
        return 1.0
    return float(metrics.fowlkes_mallows_score(*codes))


def ami(labels_true: Labels, labels_pred: Labels) -> float:
    """Return the mutual information above chance, divided by the arithmetic mean entropy above the same.

    At most 1, larger is better; 0 on average for random labels of any K, may fall below. Symmetric. 1 when both are the
    same partition, even a trivial one. The expectation is our own because scikit-learn's takes 70 times as long at
    1,000 classes and 5,000 clusters (29 s).

    Source: Vinh, Epps & Bailey 2010, equation 24a for the expectation.
    """
    table = contingency(labels_true, labels_pred)
    if table.shape == (1, 1) or table.shape == (table.sum(), table.sum()):
        return 1.0
    if 1 in table.shape:
        return 0.0
    sizes = table.sum(axis=1), table.sum(axis=0)
    entropies = [float(-(share * np.log(share)).sum()) for share in (size / size.sum() for size in sizes)]
    chance = expected_mutual_information(*sizes)
    above = 0.5 * sum(entropies) - chance
    information = metrics.mutual_info_score(None, None, contingency=sparse.csr_matrix(table))
    return float((information - chance) / above) if abs(above) >= 1e-15 else 0.0


def scores(labels_true: Labels, labels_pred: Labels) -> dict[str, float]:
    """Return the scores that need no map of clusters to classes but a matching, by name."""
    return {
        "accuracy": accuracy(labels_true, labels_pred),
        "nmi": nmi(labels_true, labels_pred),
        "ari": ari(labels_true, labels_pred),
        "ami": ami(labels_true, labels_pred),
        "fmi": fmi(labels_true, labels_pred),
        "purity": purity(labels_true, labels_pred),
    }


def expected_mutual_information(a: IntArray, b: IntArray) -> float:
    """Return the mean mutual information over all tables with the same row and column sums.

    Takes the sizes of the classes, Int[C], and of the clusters, Int[K], to nats. Equal sizes are summed once, which
    makes thousands of clusters cheap.

    Source: Vinh, Epps & Bailey 2010, equation 24a.
    """
    sizes_a, times_a = np.unique(a, return_counts=True)
    sizes_b, times_b = np.unique(b, return_counts=True)
    N = int(a.sum())
    log_factorial = gammaln(np.arange(N + 1) + 1.0)
    result = 0.0
    for size_a, time_a in zip(sizes_a.tolist(), times_a.tolist(), strict=True):
        for size_b, time_b in zip(sizes_b.tolist(), times_b.tolist(), strict=True):
            # The count n of a cell is hypergeometric, with the probability exp(fixed − free).
            n = np.arange(max(1, size_a + size_b - N), min(size_a, size_b) + 1)
            fixed = log_factorial[[size_a, size_b, N - size_a, N - size_b]].sum() - log_factorial[N]
            free = log_factorial[n] + log_factorial[size_a - n] + log_factorial[size_b - n]
            probability = np.exp(fixed - free - log_factorial[N - size_a - size_b + n])
            cell = n / N * np.log(n * (N / (size_a * size_b))) * probability
            result += time_a * time_b * float(cell.sum())
    return result


def majority_map(labels_true: Labels, labels_pred: Labels) -> dict[Any, Any]:
    """Return the most frequent class of every cluster; ties go to the class that sorts first.

    Fit it on one split and score another with `mapped_accuracy`: on the split it was fitted on that only repeats
    `purity`.
    """
    classes, clusters = np.unique(np.asarray(labels_true)), np.unique(np.asarray(labels_pred))
    commonest = classes[contingency(labels_true, labels_pred).argmax(axis=0)]
    return dict(zip(clusters.tolist(), commonest.tolist(), strict=True))


def mapped_accuracy(labels_true: Labels, labels_pred: Labels, mapping: dict[Any, Any]) -> float:
    """Return the share of rows whose cluster is mapped to their class; clusters that the map lacks count as wrong.

    Range 0 to 1, larger is better; the share of the largest class by chance. Not symmetric. The map is that of
    `majority_map` on another split.
    """
    true, pred = _paired(labels_true, labels_pred)
    unknown = object()  # equal to no label
    pairs = zip(true.tolist(), pred.tolist(), strict=True)
    return float(np.mean([mapping.get(cluster, unknown) == truth for truth, cluster in pairs]))


def in_sample_accuracy(labels_true: Labels, labels_pred: Labels) -> float:
    """Return the accuracy of the published map, fitted on the rows that it scores: inflated with many clusters.

    Classes and clusters are first matched one to one in the best way (Hungarian); every cluster that is left over is
    mapped to its most frequent class. Range 0 to 1, larger is better; 1 for single-row clusters. Never above `purity`.
    Not symmetric.

    Source: arXiv 2303.17896, its program's evaluation of over-clustering.
    """
    counts = contingency(labels_true, labels_pred).toarray()
    rows, columns = linear_sum_assignment(counts, maximize=True)
    best = counts.max(axis=0)
    best[columns] = counts[rows, columns]
    return float(best.sum() / counts.sum())


def halves_accuracy(labels_true: Labels, labels_pred: Labels, seed: int = 0) -> float:
    """Return the accuracy of `majority_map`, fitted on one random half and scored on the other, both ways, averaged.

    For data without a split of their own. Range 0 to 1, larger is better; the share of the largest class by chance.
    Clusters that a half lacks count as wrong in the other, so that finer clusters do not win by themselves. Not
    symmetric. N is at least 2, `seed` that of the halves.
    """
    true, pred = np.asarray(labels_true), np.asarray(labels_pred)
    order = np.random.default_rng(seed).permutation(len(true))
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    there = mapped_accuracy(true[other], pred[other], majority_map(true[one], pred[one]))
    back = mapped_accuracy(true[one], pred[one], majority_map(true[other], pred[other]))
    return (there + back) / 2


def _paired(labels_true: Labels, labels_pred: Labels) -> tuple[NDArray[Any], NDArray[Any]]:
    true, pred = np.asarray(labels_true), np.asarray(labels_pred)
    if true.ndim != 1 or true.shape != pred.shape:
        raise ShapeError(f"labels have shapes {true.shape} and {pred.shape}: one axis of one length is needed")
    if len(true) == 0:
        raise DataError("labels = 0 rows: a score needs at least one")
    return true, pred


def _codes(labels_true: Labels, labels_pred: Labels) -> tuple[IntArray, IntArray]:
    """Return both labelings as numbers from 0, which spares scikit-learn's guess at the kind of labels."""
    true, pred = _paired(labels_true, labels_pred)
    return np.unique(true, return_inverse=True)[1], np.unique(pred, return_inverse=True)[1]
