"""Methods on arrays in memory with scikit-learn's contract: `fit`, `predict`, `labels_`; no Ray, no files."""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from rayclust.clustering import kmeans
from rayclust.errors import ConfigError
from rayclust.features import FeatureTransform
from rayclust.methods.base import Method
from rayclust.methods.temi import TemiConfig
from rayclust.options import Config
from rayclust.refusals import one_line
from rayclust.search.knn import top_k
from rayclust.training.arrays import fit_arrays

Metric = Literal["cosine", "euclidean"]
_C = TypeVar("_C", bound=Config)


class _RowClusterer(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """What estimators share: checked input, features, seed, device.

    Rows are subtracted their mean (`center`), z-scored (`standardize`) and scaled to length 1 (`normalize`), by the
    statistics of the fitted rows; every method works on these features.
    """

    n_clusters: int
    center: bool
    standardize: bool
    normalize: bool
    random_state: Any
    device: str

    def _fitted_features(self, X: ArrayLike) -> torch.Tensor:
        x = validate_data(self, X, dtype=[np.float64, np.float32])
        if self.n_clusters > len(x):
            raise ConfigError(f"n_clusters = {self.n_clusters}: at most the number of rows, n_samples = {len(x)}")
        self.features_ = FeatureTransform.fitted(
            x, center=self.center, standardize=self.standardize, normalize=self._normalizes()
        )
        return torch.from_numpy(self.features_(x))

    def _features(self, X: ArrayLike) -> torch.Tensor:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return torch.from_numpy(self.features_(x))

    def _normalizes(self) -> bool:
        return self.normalize

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


def _checked(model: type[_C], parameters: dict[str, str], values: dict[str, Any]) -> _C:
    """Settings from values by field; a refusal names the estimator's parameter (`parameters`, by field)."""
    try:
        return model(**values)
    except ValidationError as error:
        text = one_line(error, list(model.model_fields), ())
        field, found, rest = text.partition(" = ")
        raise ConfigError(f"{parameters.get(field, field)}{found}{rest}") from None


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _RowClusterer):  # type: ignore[misc]
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
        options = _checked(kmeans.KMeansOptions, parameters, values)
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


class TEMI(_RowClusterer):
    """TEMI (arXiv 2303.17896): heads on the features, taught by their moving averages to agree on neighbours.

    None leaves a setting to the preset. Clusters that no row of the fit belongs to are numbered last.

    Args:
        n_clusters: K.
        preset: `auto` chooses from N, D and K; `readme` and `paper` are the published settings.
        n_heads: H; the one with the lowest training loss is kept.
        n_neighbors: neighbours of a row among which its partner is drawn; at most N − 1 are used.
        beta: β, balance of the clusters.
        max_steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: per 256 rows of batch.
        settings: more keys of `rayclust.methods.temi.TemiConfig` and their values.
        center: subtract the mean first.
        standardize: z-score each dimension first.
        normalize: scale rows to length 1.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        random_state: seed of everything random.

    Attributes:
        labels_: Int64[N].
        method_: the fitted `rayclust.methods.temi.Temi`; None for a single cluster, which needs none.
        n_steps_: optimiser steps taken.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        preset: Literal["auto", "readme", "paper"] = "auto",
        n_heads: int | None = None,
        n_neighbors: int | None = None,
        beta: float | None = None,
        max_steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        settings: dict[str, Any] | None = None,
        center: bool = False,
        standardize: bool = False,
        normalize: bool = True,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.preset = preset
        self.n_heads = n_heads
        self.n_neighbors = n_neighbors
        self.beta = beta
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.settings = settings
        self.center = center
        self.standardize = standardize
        self.normalize = normalize
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Trains the heads on rows X, Float[N D]; `y` is not used.

        Raises:
            ConfigError: a parameter is impossible, or there are more clusters than rows; a ValueError.
        """
        x = self._fitted_features(X)
        self.method_: Method | None = None
        self.n_steps_ = 0
        self._order = np.arange(self.n_clusters)
        if self.n_clusters > 1:
            self._train(x, self._config())
        probabilities = self._probabilities(x)
        occupied = np.bincount(probabilities.argmax(axis=1), minlength=self.n_clusters) > 0
        self._order = np.argsort(~occupied, kind="stable")
        self.labels_ = probabilities[:, self._order].argmax(axis=1)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """The most probable cluster of each row: Int64[N]."""
        labels: NDArray[np.int64] = self.predict_proba(X).argmax(axis=1)
        return labels

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of the clusters: Float64[N K], rows sum to 1."""
        return self._probabilities(self._features(X))[:, self._order]

    def _config(self) -> TemiConfig:
        parameters = {
            "clusters": "n_clusters",
            "preset": "preset",
            "heads": "n_heads",
            "neighbors": "n_neighbors",
            "beta": "beta",
            "steps": "max_steps",
            "batch_size": "batch_size",
            "learning_rate": "learning_rate",
        }
        values = {field: getattr(self, parameter) for field, parameter in parameters.items()}
        written = {field: value for field, value in values.items() if value is not None}
        return _checked(TemiConfig, parameters, written | (self.settings or {}))

    def _train(self, x: torch.Tensor, config: TemiConfig) -> None:
        device = self._device()
        wanted = config.settled(len(x), x.shape[1]).neighbors
        rows = torch.nn.functional.normalize(x, dim=1).to(device)
        ids = torch.arange(len(rows), device=device)
        neighbors, _ = top_k(rows, rows, min(wanted, len(x) - 1), query_ids=ids, database_ids=ids)
        self.method_ = fit_arrays(x, neighbors.cpu(), config, self._seed(), device)
        # In float64 a row's probabilities do not depend on what other rows come with it.
        self.method_.cpu().double()
        self.n_steps_ = self.method_.plan.steps

    def _probabilities(self, x: torch.Tensor) -> NDArray[np.float64]:
        if self.method_ is None:
            return np.ones((len(x), 1))
        probabilities: NDArray[np.float64] = self.method_.assign(x.double()).numpy()
        return probabilities
