"""k-means with scikit-learn's contract."""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin

from rayclust.clustering import kmeans
from rayclust.estimators.base import RowClusterer, checked

Metric = Literal["cosine", "euclidean"]


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, RowClusterer):  # type: ignore[misc]
    """k-means, spherical (default) or Euclidean, from greedy k-means++ seeds.

    Args:
        n_clusters: K.
        metric: `cosine`: rows and centres are unit vectors. `euclidean`: centres are means of the features, so
            `normalize=False` gives the k-means of the rows themselves.
        n_init: starts from different seeds, advanced together; the least inertia is kept.
        max_iter: most passes of one start.
        tol: shift of the centres at which a start stops, relative to the features' mean variance.
        center: subtract the mean first.
        standardize: z-score each dimension first.
        normalize: scale rows to length 1 before clustering; always so for cosine.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        random_state: seed of the first centres.

    Attributes:
        cluster_centers_: Float32[K D], in feature space.
        labels_: Int64[N].
        inertia_: sum of squared distances to the nearest centre; for cosine 2·(1 − cosine) of each row.
        n_iter_: passes of the best start.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        metric: Metric = "cosine",
        n_init: int = 10,
        max_iter: int = 300,
        tol: float = 1e-4,
        center: bool = False,
        standardize: bool = False,
        normalize: bool = True,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.center = center
        self.standardize = standardize
        self.normalize = normalize
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Finds the centres of rows X, Float[N D]; `y` is not used.

        Raises:
            ConfigError: a parameter is impossible, or there are more clusters than rows; a ValueError.
        """
        parameters = {
            "clusters": "n_clusters",
            "metric": "metric",
            "restarts": "n_init",
            "max_iterations": "max_iter",
            "tolerance": "tol",
        }
        values = {field: getattr(self, parameter) for field, parameter in parameters.items()}
        options = checked(kmeans.KMeansOptions, parameters, values)
        x = self._fitted_features(X).to(self._device())
        result = kmeans.fit(lambda: [x], options, seed=self._seed())
        self.cluster_centers_ = result.centers.cpu().numpy()
        self.labels_ = kmeans.assign(x, result.centers)[0].cpu().numpy()
        self.inertia_, self.n_iter_ = result.inertia, result.n_iter
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """The nearest centre of each row: Int64[N]."""
        x = self._features(X)
        labels: NDArray[np.int64] = kmeans.assign(x, torch.from_numpy(self.cluster_centers_))[0].numpy()
        return labels

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Distances of features to centres: Float64[N K]."""
        # In float64 a row's distances do not depend on what other rows come with it.
        x = self._features(X).double()
        squares = kmeans.squared_distances(x, torch.from_numpy(self.cluster_centers_).double())
        distances: NDArray[np.float64] = squares.sqrt().numpy()
        return distances

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Minus the inertia of rows X; larger is better. `y` is not used."""
        x = self._features(X)
        return -float(kmeans.assign(x, torch.from_numpy(self.cluster_centers_))[1].sum(dtype=torch.float64))

    def _normalizes(self) -> bool:
        return self.normalize or self.metric == "cosine"

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)
