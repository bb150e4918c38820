"""Geometry of some hundred or thousand rows: similarities, memberships and spectra, for drawings and checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import FloatArray, IntArray, require_matrix, unit_rows
from rayclust.errors import ConfigError, DataError, ShapeError


def absolute_gram(x: FloatArray) -> NDArray[np.float64]:
    """Return |ZᵀZ|: absolute cosines between all rows; in [0, 1], symmetric, 1 on the diagonal but for zero rows.

    Takes Float[N D], of any length, to Float64[N N].

    Source: arXiv 2306.05272, figure 2; its Z has samples as columns.
    """
    rows = _unit(x)
    return np.minimum(np.abs(rows @ rows.T), 1.0)


def kernel_membership(x: FloatArray, temperature: float) -> NDArray[np.float64]:
    """Return the row softmax of cosine / temperature without the diagonal, for methods that have no Π.

    Takes Float[N D], of any length, to Float64[N N]; rows sum to 1 (0 for a single row), the diagonal is 0.

    Raises:
        ConfigError: `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be above 0")
    rows = _unit(x)
    logits = rows @ rows.T / temperature
    np.fill_diagonal(logits, -np.inf)
    if len(rows) < 2:
        return np.zeros_like(logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def similar_order(centers: FloatArray) -> list[int]:
    """Return an order in which similar rows are adjacent: leaves of average linkage by cosine, optimally ordered.

    Takes Float[K D], of any length, to the K positions.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import pdist

    require_matrix(centers, "centers")
    if len(centers) < 3:
        return list(range(len(centers)))
    distances = np.maximum(pdist(_unit(centers), "sqeuclidean"), 0.0)
    tree = optimal_leaf_ordering(linkage(distances, "average"), distances)
    return [int(leaf) for leaf in leaves_list(tree)]


def neighbor_precision(x: FloatArray, labels: IntArray, k: int) -> float:
    """Return the mean share of each row's k nearest others by cosine that have its label (precision@k).

    Range 0 to 1, larger is better; the sum of squared shares of the labels by chance. Of Float[N D] and Int[N].

    Raises:
        ConfigError: `k` is below 1.
        ShapeError: `labels` has another length, or there is but one row.
    """
    require_matrix(x, "x")
    if k < 1:
        raise ConfigError(f"k = {k}: must be at least 1")
    if len(labels) != len(x) or len(x) < 2:
        raise ShapeError(f"{len(labels)} labels for {len(x)} rows: as many are needed, at least 2")
    rows, k = _unit(x), min(k, len(x) - 1)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return float((labels[near] == labels[:, None]).mean())


def membership_scores(membership: FloatArray, labels: IntArray | None = None, least: float = 0.0) -> dict[str, float]:
    """Measure a membership by its entries, its graph and, where there are labels, the classes of the rows.

    Two rows share an edge where |½(Π + Πᵀ)| of them is above `least`; no row has an edge to itself. Rows' order and the
    names of classes play no part.

    Args:
        membership: Float[n n], Π.
        labels: Int[n]; None leaves out the last two.
        least: an entry counts where its absolute value is above it.

    Returns:
        `nonzeros`: mean number of entries of a row, the diagonal's included, 0 to n. `components`: connected components
        of the graph, 1 to n; above K, no K clusters hold them all. `detection_error`: the feature-detection error, the
        mean share of a row's L1 mass outside the row's class, the diagonal counted; 0 to 1, smaller is better, the mean
        share of rows of another class for an even Π, 0 for a row of zeros. `wrong_edges`: share of edges that join rows
        of two classes; 0 to 1, smaller is better, 0 without edges.

    Raises:
        ShapeError: `membership` is not square or empty, or `labels` has another length.

    Source: arXiv 1507.01238, for self-expressive coefficients, whose diagonal is 0; arXiv 2306.05272's program for Π.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    require_matrix(membership, "membership")
    rows, columns = membership.shape
    if rows != columns or not rows:
        raise ShapeError(f"membership is {rows} × {columns}: must be square, with at least 1 row")
    if labels is not None and len(labels) != rows:
        raise ShapeError(f"{len(labels)} labels for a membership of {rows} rows: as many are needed")
    edges = np.abs(membership + membership.T) > 2 * least
    np.fill_diagonal(edges, False)
    scores = {
        "nonzeros": float((np.abs(membership) > least).sum(axis=1).mean()),
        "components": float(connected_components(csr_array(edges), directed=False, return_labels=False)),
    }
    if labels is not None:
        differ = labels[:, None] != labels
        mass = np.abs(membership, dtype=np.float64)
        total = mass.sum(axis=1)
        scores["detection_error"] = float(((mass * differ).sum(axis=1) / np.where(total > 0, total, 1.0)).mean())
        scores["wrong_edges"] = float((edges & differ).sum() / max(edges.sum(), 1))
    return scores


def singular_values(x: FloatArray) -> NDArray[np.float64]:
    """Return the singular values over the largest, largest first.

    A group of rows in few directions has few values that are not small; rows spread out evenly have them all alike.
    They don't change when rows are turned, reordered or scaled together. Nothing is centred.

    Takes Float[N D] to Float64[min(N, D)], the first 1; zeros where all rows are zero.

    Source: arXiv 2306.05272, the spectra of its figure 3.
    """
    require_matrix(x, "x")
    rows = np.asarray(x, dtype=np.float64)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    if not len(gram):
        return np.zeros(0)
    squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    # Squares below rounding are no directions; their roots would look like some.
    squares[squares < squares[0] * len(gram) * np.finfo(np.float64).eps] = 0.0
    return np.asarray(np.sqrt(squares / (squares[0] or 1.0)))


def directions(values: FloatArray, share: float = 0.9) -> int:
    """Count the first directions that hold a share of the energy, the sum of squared singular values.

    Takes Float[r], largest first, on any scale. Range 1 to the number of values, 0 when all are zero.

    Raises:
        ConfigError: `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share = {share}: must be above 0 and at most 1")
    energy = np.cumsum(np.square(np.asarray(values, dtype=np.float64)))
    if not energy.any():
        return 0
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)


def quantiles(spectra: Sequence[FloatArray], levels: Sequence[float]) -> NDArray[np.float64]:
    """Compute quantiles over several spectra, position by position, as far as nine in ten of them reach.

    Takes Float[r]s of any lengths and Q levels in [0, 1] to Float64[Q R]; positions beyond a spectrum's end are zero.

    Raises:
        DataError: there is no spectrum.
    """
    if not spectra:
        raise DataError("quantiles: there is no spectrum")
    reach = int(np.quantile([len(values) for values in spectra], 0.1, method="lower"))
    padded = np.zeros((len(spectra), reach))
    for row, values in zip(padded, spectra, strict=True):
        row[: len(values)] = values[:reach]
    return np.asarray(np.quantile(padded, levels, axis=0))


def _unit(x: FloatArray) -> FloatArray:
    require_matrix(x, "x")
    return unit_rows(np.asarray(x, dtype=np.float64))
