"""How many directions rows take up: normalised singular values, of all rows and cluster by cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayclust.arrays import FloatArray, require_matrix
from rayclust.errors import ConfigError, DataError


def singular_values(x: FloatArray) -> NDArray[np.float64]:
    """Singular values over the largest, largest first.

    A group of rows in few directions has few values that are not small; rows spread out evenly have them all alike.
    They don't change when rows are turned, reordered or scaled together. Nothing is centred.

    Args:
        x: Float[N D].

    Returns:
        Float64[min(N, D)], the first 1; zeros where all rows are zero.

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
    """How many of the first directions hold a share of the energy, the sum of squared singular values.

    Range 1 to the number of values, 0 when all are zero.

    Args:
        values: Float[r], singular values, largest first, on any scale.
        share: above 0, at most 1.

    Raises:
        ConfigError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share = {share}: must be above 0 and at most 1")
    energy = np.cumsum(np.square(np.asarray(values, dtype=np.float64)))
    if not len(energy) or energy[-1] == 0:
        return 0
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)


def quantiles(spectra: Sequence[FloatArray], levels: Sequence[float]) -> NDArray[np.float64]:
    """Quantiles over several spectra, place by place, as far as nine in ten of them reach; the others count as zero.

    Args:
        spectra: Float[r]s of any lengths, at least one.
        levels: Q numbers in [0, 1].

    Returns:
        Float64[Q R].

    Raises:
        DataError: there is no spectrum.
    """
    if not spectra:
        raise DataError("quantiles: there is no spectrum")
    reach = int(np.quantile([len(values) for values in spectra], 0.1, method="lower"))
    filled = np.zeros((len(spectra), reach))
    for row, values in zip(filled, spectra, strict=True):
        row[: len(values)] = values[:reach]
    return np.asarray(np.quantile(filled, levels, axis=0))
