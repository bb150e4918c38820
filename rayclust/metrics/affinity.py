"""How alike rows are, two by two: for drawings and checks on some hundred rows, not for N."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ConfigError, ShapeError


def absolute_gram(x: FloatArray) -> NDArray[np.float64]:
    """|ZᵀZ|: absolute cosines between all rows; in [0, 1], symmetric, 1 on the diagonal but for zero rows.

    Args:
        x: Float[N D], of any length.

    Returns:
        Float64[N N].

    Source: arXiv 2306.05272, figure 2; its Z has samples as columns.
    """
    rows = unit_rows(x)
    return np.minimum(np.abs(rows @ rows.T), 1.0)


def kernel_membership(x: FloatArray, temperature: float) -> NDArray[np.float64]:
    """Row softmax of cosine / temperature, each row without itself: a stand-in for Π where a method has none.

    Args:
        x: Float[N D], of any length.
        temperature: above 0.

    Returns:
        Float64[N N], rows sum to 1 (0 for a single row), the diagonal 0.

    Raises:
        ConfigError: `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0")
    rows = unit_rows(x)
    logits = rows @ rows.T / temperature
    np.fill_diagonal(logits, -np.inf)
    if len(rows) < 2:
        return np.zeros_like(logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def similar_order(centers: FloatArray) -> list[int]:
    """An order in which alike rows stand side by side: leaves of average linkage by cosine, best turned.

    Args:
        centers: Float[K D], of any length.

    Returns:
        The K places, in order.
    """
    require_matrix(centers, "centers")
    if len(centers) < 3:
        return list(range(len(centers)))
    distances = np.maximum(pdist(unit_rows(centers), "sqeuclidean"), 0.0)
    tree = optimal_leaf_ordering(linkage(distances, "average"), distances)
    return [int(leaf) for leaf in leaves_list(tree)]


def neighbor_precision(x: FloatArray, labels: IntArray, k: int) -> float:
    """Mean share of each row's k nearest others by cosine that have its label.

    Range 0 to 1, larger is better; the sum of squared shares of the labels by chance. What retrieval calls precision@k.

    Args:
        x: Float[N D], N at least 2.
        labels: Int[N].
        k: at least 1; at most N − 1 count.

    Raises:
        ConfigError: `k` is below 1.
        ShapeError: `labels` has another length, or there is but one row.
    """
    require_matrix(x, "x")
    if k < 1:
        raise ConfigError(f"k = {k}: must be at least 1")
    if len(labels) != len(x) or len(x) < 2:
        raise ShapeError(f"{len(labels)} labels for {len(x)} rows: as many are needed, at least 2")
    rows, k = unit_rows(x), min(k, len(x) - 1)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return float((labels[near] == labels[:, None]).mean())


def unit_rows(x: FloatArray) -> NDArray[np.float64]:
    """Float64[N D], rows of length 1; a zero row stays zero."""
    require_matrix(x, "x")
    rows = np.asarray(x, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))
