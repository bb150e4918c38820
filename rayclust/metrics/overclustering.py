"""Agreement of a partition with many more clusters than classes, where each class owns several clusters.

A cluster then stands for a class by a map, and what the map was fitted on decides what its score means: fitted on the
rows that it scores, it rewards small clusters by themselves (single rows would be all right). The honest one is fitted
on other rows. All comes from sparse tables of counts: nothing is K × K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from rayclust.metrics.external import Labels, contingency, majority_map, mapped_accuracy, nmi, purity


def in_sample_accuracy(labels_true: Labels, labels_pred: Labels) -> float:
    """Accuracy of the published map, fitted on the very rows that it scores: inflated with many clusters.

    Classes and clusters are first matched one to one in the best way (Hungarian); every cluster that is left over is
    mapped to its most frequent class. Range 0 to 1, larger is better; 1 for single-row clusters. Never above `purity`.
    Not symmetric.

    Args:
        labels_true: [N].
        labels_pred: [N].

    Source: arXiv 2303.17896, its program's evaluation of over-clustering.
    """
    table = contingency(labels_true, labels_pred)
    counts = table.toarray()  # classes × clusters that occur
    rows, columns = linear_sum_assignment(counts, maximize=True)
    best = counts.max(axis=0)
    best[columns] = counts[rows, columns]
    return float(best.sum() / counts.sum())


def held_out_accuracy(labels_true: Labels, labels_pred: Labels, other_true: Labels, other_pred: Labels) -> float:
    """Accuracy of each cluster's most frequent class, fitted on one set of rows and scored on another.

    Range 0 to 1, larger is better; the share of the largest class by chance. Clusters that the first set lacks count as
    wrong, so that finer clusters do not win by themselves. Not symmetric.

    Args:
        labels_true: [N], where the map is fitted.
        labels_pred: [N].
        other_true: [M], where it is scored.
        other_pred: [M].
    """
    return mapped_accuracy(other_true, other_pred, majority_map(labels_true, labels_pred))


def halves_accuracy(labels_true: Labels, labels_pred: Labels, seed: int = 0) -> float:
    """`held_out_accuracy` of two random halves of the rows, fitted on one and scored on the other, both ways, averaged.

    For data without a split of their own; range and chance as there.

    Args:
        labels_true: [N], N at least 2.
        labels_pred: [N].
        seed: of the halves.
    """
    true, pred = np.asarray(labels_true), np.asarray(labels_pred)
    order = np.random.default_rng(seed).permutation(len(true))
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    there = held_out_accuracy(true[one], pred[one], true[other], pred[other])
    back = held_out_accuracy(true[other], pred[other], true[one], pred[one])
    return (there + back) / 2


def scores(labels_true: Labels, labels_pred: Labels, seed: int = 0) -> dict[str, Any]:
    """What tells about a fine partition.

    Returns:
        `accuracy_held_out`: `halves_accuracy`; `accuracy_in_sample`, `purity`, `nmi`; `occupied`: clusters with a row.
    """
    return {
        "accuracy_held_out": halves_accuracy(labels_true, labels_pred, seed),
        "accuracy_in_sample": in_sample_accuracy(labels_true, labels_pred),
        "purity": purity(labels_true, labels_pred),
        "nmi": nmi(labels_true, labels_pred),
        "occupied": len(np.unique(np.asarray(labels_pred))),
    }
