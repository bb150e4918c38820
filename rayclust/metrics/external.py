"""Agreement of a clustering with true classes.

Labels are any one-dimensional arrays of integers or strings of one length; their names play no part. Rows without a
true label are the caller's to leave out first: see `labelled`. Everything comes from the sparse table of counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from rayclust.arrays import FloatArray, IntArray
from rayclust.errors import DataError, ShapeError
from rayclust.metrics.chance import expected_mutual_information

Labels = ArrayLike
"""One-dimensional: integers or strings."""


def labelled(labels: Labels) -> NDArray[np.bool_]:
    """Which rows have a label: not None, not NaN, and not below 0 where labels are integers.

    Args:
        labels: [N], may hold None.

    Returns:
        Bool[N].
    """
    values = np.asarray(labels)
    if values.dtype.kind in "iu":
        present = values >= 0
    elif values.dtype.kind == "f":
        present = ~np.isnan(values)
    else:
        present = np.array([value is not None and value == value for value in values.tolist()])
    return present.astype(bool)


def contingency(labels_true: Labels, labels_pred: Labels) -> sparse.csr_array:
    """Rows counted by true class and cluster.

    Args:
        labels_true: [N].
        labels_pred: [N].

    Returns:
        Sparse Int64[C K]; classes and clusters that occur, each in sorted order.

    Raises:
        ShapeError: the two differ in length or have more than one axis.
        DataError: there are no rows.
    """
    true, pred = _checked(labels_true, labels_pred)
    classes, rows = np.unique(true, return_inverse=True)
    clusters, columns = np.unique(pred, return_inverse=True)
    ones = np.ones(len(true), dtype=np.int64)
    table = sparse.coo_array((ones, (rows, columns)), shape=(len(classes), len(clusters)))
    return table.tocsr()


def accuracy(labels_true: Labels, labels_pred: Labels) -> float:
    """Share of rows that are right when each cluster is matched to at most one class in the best way (Hungarian).

    Range 0 to 1, larger is better; about 1/C for random clusters as large as the classes. Symmetric. Rows of unmatched
    clusters count as wrong, so more clusters than classes lower it.

    Args:
        labels_true: [N].
        labels_pred: [N].
    """
    table = contingency(labels_true, labels_pred)
    counts = table.toarray()
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / table.sum())


def purity(labels_true: Labels, labels_pred: Labels) -> float:
    """Share of rows that belong to the most frequent class of their cluster.

    Range 0 to 1, larger is better; 1 for single-row clusters, so compare at one K only. By chance at least the share of
    the largest class. Not symmetric.

    Args:
        labels_true: [N].
        labels_pred: [N].
    """
    table = contingency(labels_true, labels_pred)
    return float(table.max(axis=0).sum() / table.sum())


def nmi(labels_true: Labels, labels_pred: Labels) -> float:
    """Mutual information divided by the arithmetic mean of the two entropies.

    Range 0 to 1, larger is better; independent labels give 0 only as N grows: above 0 by chance with many clusters (see
    `ami`). Symmetric. 1 when both have a single cluster.

    Args:
        labels_true: [N].
        labels_pred: [N].
    """
    table = contingency(labels_true, labels_pred)
    if table.shape == (1, 1):
        return 1.0
    mean = 0.5 * (_entropy(table.sum(axis=1)) + _entropy(table.sum(axis=0)))
    return _clipped(_mutual_information(table) / mean)


def ami(labels_true: Labels, labels_pred: Labels) -> float:
    """Mutual information above what chance gives, divided by the arithmetic mean entropy above the same.

    At most 1, larger is better; 0 on average for random labels of any K, may fall below. Symmetric. 1 when both are the
    same partition, even a trivial one.

    Args:
        labels_true: [N].
        labels_pred: [N].

    Source: Vinh, Epps & Bailey 2010, equation 24a for the expectation.
    """
    table = contingency(labels_true, labels_pred)
    if table.shape == (1, 1) or table.shape == (table.sum(), table.sum()):
        return 1.0
    if 1 in table.shape:
        return 0.0
    a, b = table.sum(axis=1), table.sum(axis=0)
    chance = expected_mutual_information(a, b)
    above = 0.5 * (_entropy(a) + _entropy(b)) - chance
    if abs(above) < 1e-15:
        return 0.0
    return float((_mutual_information(table) - chance) / above)


def ari(labels_true: Labels, labels_pred: Labels) -> float:
    """Rand index above chance: agreement over pairs of rows.

    From −0.5 to 1, larger is better; 0 on average for random labels. Symmetric. 1 for equal partitions.

    Args:
        labels_true: [N].
        labels_pred: [N].

    Source: Hubert & Arabie 1985, in the form of pair counts.
    """
    table = contingency(labels_true, labels_pred)
    count = int(table.sum())
    both = _pairs(table.data)
    rows, columns, pairs = _pairs(table.sum(axis=1)), _pairs(table.sum(axis=0)), count * (count - 1) / 2
    if both == rows == columns:
        return 1.0
    chance = rows * columns / pairs
    return float((both - chance) / (0.5 * (rows + columns) - chance))


def majority_map(labels_true: Labels, labels_pred: Labels) -> dict[Any, Any]:
    """The most frequent class of every cluster; ties go to the class that sorts first.

    Fit it on one split and score another with `mapped_accuracy`: on the split it was fitted on that only repeats
    `purity`.

    Args:
        labels_true: [N].
        labels_pred: [N].

    Returns:
        Class by cluster.
    """
    classes, clusters = np.unique(np.asarray(labels_true)), np.unique(np.asarray(labels_pred))
    table = contingency(labels_true, labels_pred).tocsc()
    best: dict[Any, Any] = {}
    for k, cluster in enumerate(clusters.tolist()):
        low, high = table.indptr[k], table.indptr[k + 1]
        rows, counts = table.indices[low:high], table.data[low:high]
        best[cluster] = classes[rows[counts == counts.max()].min()].item()
    return best


def mapped_accuracy(labels_true: Labels, labels_pred: Labels, mapping: dict[Any, Any]) -> float:
    """Share of rows whose cluster is mapped to their class; clusters that the map lacks count as wrong.

    Range 0 to 1, larger is better; the share of the largest class by chance. Not symmetric.

    Args:
        labels_true: [N].
        labels_pred: [N].
        mapping: class by cluster, of `majority_map` on another split.
    """
    true, pred = _checked(labels_true, labels_pred)
    nothing = object()  # equal to no label
    right = [
        mapping.get(cluster, nothing) == truth for truth, cluster in zip(true.tolist(), pred.tolist(), strict=True)
    ]
    return float(np.mean(right))


def scores(labels_true: Labels, labels_pred: Labels) -> dict[str, float]:
    """All scores of this file that need no second split: accuracy, nmi, ari, ami, purity."""
    measures = {"accuracy": accuracy, "nmi": nmi, "ari": ari, "ami": ami, "purity": purity}
    return {name: measure(labels_true, labels_pred) for name, measure in measures.items()}


def _checked(labels_true: Labels, labels_pred: Labels) -> tuple[NDArray[Any], NDArray[Any]]:
    true, pred = np.asarray(labels_true), np.asarray(labels_pred)
    if true.ndim != 1 or true.shape != pred.shape:
        raise ShapeError(f"labels have shapes {true.shape} and {pred.shape}: one axis of one length is needed")
    if len(true) == 0:
        raise DataError("labels = 0 rows: a score needs at least one")
    return true, pred


def _clipped(value: float) -> float:
    return float(min(max(value, 0.0), 1.0))


def _pairs(counts: IntArray) -> float:
    wide = counts.astype(np.float64)
    return float((wide * (wide - 1)).sum() / 2)


def _entropy(counts: IntArray) -> float:
    """Nats."""
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _mutual_information(table: sparse.csr_array) -> float:
    """Nats."""
    cells, total = table.tocoo(), table.sum()
    a, b = table.sum(axis=1), table.sum(axis=0)
    rows, columns = cells.coords
    ratio = np.log(cells.data) + np.log(total) - np.log(a[rows]) - np.log(b[columns])
    return float((cells.data / total * ratio).sum())


def knn_accuracy(
    neighbors: IntArray,
    similarity: FloatArray,
    labels: Labels,
    labels_true: Labels | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of rows whose class wins the vote of their nearest other rows: how far an embedding separates the classes.

    A neighbour's vote weighs exp(similarity / temperature); a draw goes to the class that sorts first. Range 0 to 1,
    larger is better; the share of the largest class by chance.

    Args:
        neighbors: Int64[B M], positions in `labels`, nearest first, without the row itself; −1 where there are fewer.
        similarity: Float[B M].
        labels: [N], of all rows.
        labels_true: [B], of the rows that `neighbors` belongs to; None where those are all rows.
        k: neighbours that vote; at most M do.
        temperature: above 0; 0.02 in TEMI's probe.

    Raises:
        ShapeError: the shapes do not fit together.
    """
    known = np.asarray(labels)
    truth = known if labels_true is None else np.asarray(labels_true)
    if neighbors.shape != similarity.shape or truth.shape != neighbors.shape[:1]:
        shapes = f"{neighbors.shape}, {similarity.shape} and {truth.shape}"
        raise ShapeError(f"neighbors, similarity and labels have shapes {shapes}: one row for each label is needed")
    near, weights = neighbors[:, :k], similarity[:, :k].astype(np.float64) / temperature
    weights = np.where(near >= 0, np.exp(weights - weights.max(axis=1, keepdims=True, initial=-1e300)), 0.0)
    classes, codes = np.unique(known[near], return_inverse=True)
    votes = np.zeros((len(near), len(classes)))
    np.add.at(votes, (np.arange(len(near))[:, None], codes.reshape(near.shape)), weights)
    return float(np.mean(classes[votes.argmax(axis=1)] == truth))
