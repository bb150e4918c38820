"""How alike rows are, two by two: for drawings and checks on some hundred or thousand rows, not for N."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
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


def detection_error(membership: FloatArray, labels: IntArray) -> float:
    """Feature-detection error: mean over rows of the share of a row's L1 mass that lies outside the row's class.

    The diagonal counts: a row of Π sums to 1 with it. Range 0 to 1, smaller is better; an even Π has the mean share of
    rows of another class. A row of zeros has no error.

    Args:
        membership: Float[n n], Π.
        labels: Int[n].

    Raises:
        ShapeError: `membership` is not square or empty, or `labels` has another length.

    Source: arXiv 1507.01238, for self-expressive coefficients, whose diagonal is 0; arXiv 2306.05272's program for Π.
    """
    mass = np.abs(_square(membership, labels), dtype=np.float64)
    total = mass.sum(axis=1)
    outside = (mass * (labels[:, None] != labels)).sum(axis=1)
    return float((outside / np.where(total > 0, total, 1.0)).mean())


def wrong_edges(membership: FloatArray, labels: IntArray, least: float = 0.0) -> float:
    """Share of edges, each counted once, that join rows of two classes.

    Range 0 to 1, smaller is better; 0 where there are no edges.

    Args:
        membership: Float[n n], Π.
        labels: Int[n].
        least: two rows share an edge where |½(Π + Πᵀ)| of them is above it; no row has an edge to itself.

    Raises:
        ShapeError: `membership` is not square or empty, or `labels` has another length.
    """
    edges = _edges(_square(membership, labels), least)
    wrong = edges & (labels[:, None] != labels)
    return float(wrong.sum() / max(edges.sum(), 1))


def nonzeros(membership: FloatArray, least: float = 0.0) -> float:
    """Mean number of entries of a row that are not zero, the diagonal's included. Range 0 to n.

    Args:
        membership: Float[n n], Π.
        least: an entry counts where its absolute value is above it.

    Raises:
        ShapeError: `membership` is not square or empty.
    """
    return float((np.abs(_square(membership)) > least).sum(axis=1).mean())


def components(membership: FloatArray, least: float = 0.0) -> int:
    """Number of connected components of the graph of rows; above K, no K clusters hold them all. Range 1 to n.

    Args:
        membership: Float[n n], Π.
        least: two rows share an edge where |½(Π + Πᵀ)| of them is above it.

    Raises:
        ShapeError: `membership` is not square or empty.
    """
    edges = _edges(_square(membership), least)
    return int(connected_components(csr_array(edges), directed=False, return_labels=False))


def _edges(membership: FloatArray, least: float) -> NDArray[np.bool_]:
    edges = np.abs(membership + membership.T) > 2 * least
    np.fill_diagonal(edges, False)
    return np.asarray(edges)


def _square(membership: FloatArray, labels: IntArray | None = None) -> FloatArray:
    require_matrix(membership, "membership")
    rows, columns = membership.shape
    if rows != columns or not rows:
        raise ShapeError(f"membership is {rows} × {columns}: must be square, with at least 1 row")
    if labels is not None and len(labels) != rows:
        raise ShapeError(f"{len(labels)} labels for a membership of {rows} rows: as many are needed")
    return membership


def unit_rows(x: FloatArray) -> NDArray[np.float64]:
    """Float64[N D], rows of length 1; a zero row stays zero."""
    require_matrix(x, "x")
    rows = np.asarray(x, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))
