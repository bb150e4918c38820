"""Rows on a plane, for the eye."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from rayclust.arrays import FloatArray, require_matrix

FEW = 8
"""Up to so many rows are shown by their principal components: too few to have neighbourhoods."""
_COMPONENTS, _PERPLEXITY, _STEPS = 50, 30.0, 750


def planar_map(x: FloatArray, seed: int = 0) -> NDArray[np.float32]:
    """Rows on a plane so that neighbours stay neighbours: t-SNE of up to 50 principal components.

    It starts from the first two components and computes on one thread, so that equal rows and seeds give equal maps on
    equal machines. Distances between far groups mean little.

    Args:
        x: Float[N D]; thousands of rows, not more.
        seed: of what is random.

    Returns:
        Float32[N 2] within [−1, 1], centred, both axes to one scale.

    Source: van der Maaten and Hinton 2008, by the Barnes-Hut form of scikit-learn.
    """
    require_matrix(x, "x")
    rows = np.asarray(x, dtype=np.float64)
    if len(rows) < 2:
        return np.zeros((len(rows), 2), np.float32)
    with threadpool_limits(1):
        rows = _principal(rows, min(_COMPONENTS, *rows.shape))
        if len(rows) > FEW:
            rows = _neighbourly(rows, seed)
    rows = np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1]))))[:, :2]
    rows = rows - (rows.min(axis=0) + rows.max(axis=0)) / 2
    return np.asarray(rows / (np.abs(rows).max() or 1.0), dtype=np.float32)


def _principal(rows: FloatArray, components: int) -> NDArray[np.float64]:
    if not np.ptp(rows, axis=0).any():
        return np.zeros((len(rows), components))
    solver = "covariance_eigh" if rows.shape[1] <= 4 * len(rows) else "full"
    return np.asarray(PCA(components, svd_solver=solver).fit_transform(rows))


def _neighbourly(rows: FloatArray, seed: int) -> NDArray[np.float64]:
    if rows.shape[1] < 2 or not np.ptp(rows, axis=0).any():
        return np.asarray(rows)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    start = rows[:, :2] / (rows[:, 0].std() or 1.0) * 1e-4  # as small as the authors' start, in principal components
    method = TSNE(2, init=start, perplexity=perplexity, max_iter=_STEPS, random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are equal
        return np.asarray(method.fit_transform(rows), dtype=np.float64)
