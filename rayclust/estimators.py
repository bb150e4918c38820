"""Methods on arrays in memory with scikit-learn's contract: `fit`, `predict`, `labels_`; no Ray, no files.

`_Estimator.__init_subclass__` makes an estimator's constructor from the fields of its config.
"""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from rayclust.clustering import kmeans
from rayclust.errors import ConfigError
from rayclust.features import FeatureTransform
from rayclust.methods.cpp import CppConfig
from rayclust.methods.temi import TemiConfig
from rayclust.search.knn import top_k
from rayclust.settings import Config, format_error
from rayclust.training.loop import fit_arrays

__all__ = ["CPP", "TEMI", "KMeans"]

_SHARED = {"center": False, "standardize": False, "normalize": True, "device": "auto", "random_state": None}
"""Parameters of every estimator, and their defaults."""
_SHARED_ARGS = """\
        center: subtract the mean first.
        standardize: z-score each dimension first.
        normalize: scale rows to length 1.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        random_state: seed of everything random.
"""


class _Estimator(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Input checks, features, config, seed and device of every estimator.

    The mean of the fitted rows is subtracted (`center`), rows are z-scored by their statistics (`standardize`) and
    scaled to length 1 (`normalize`); every method works on these features. `fit` raises a ConfigError, a ValueError,
    where a parameter is impossible or there are more clusters than rows.
    """

    _config_class: ClassVar[type[Config]]
    _fields: ClassVar[dict[str, str]]
    method_: Any
    n_steps_: int

    def __init_subclass__(
        cls, config: type[Config] | None = None, fields: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        """Add the constructor, with the explicit signature that scikit-learn requires, and its shared documentation.

        Its parameters are `n_clusters`, those of `fields` and the shared ones. For a config with presets the default is
        None, which leaves a setting to the preset, and `settings` holds further keys; otherwise it is the field's
        default.

        Args:
            config: the settings of the method; None leaves the class as it is.
            fields: field of the config, by parameter.
            kwargs: of scikit-learn's classes.
        """
        super().__init_subclass__(**kwargs)
        if config is None:
            return
        cls._config_class, cls._fields = config, {"n_clusters": "clusters", **(fields or {})}
        has_presets = "preset" in config.model_fields
        defaults: dict[str, Any] = {}
        for name, field in cls._fields.items():
            defaults[name] = None if has_presets and field != "preset" else config.model_fields[field].default
        defaults |= {"n_clusters": 8} | ({"settings": None} if has_presets else {}) | _SHARED
        cls.__doc__ = (cls.__doc__ or "").replace("\n\n    Attributes:", f"\n{_SHARED_ARGS}\n    Attributes:")
        parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)]
        for name, default in defaults.items():
            kind = Parameter.POSITIONAL_OR_KEYWORD if name == "n_clusters" else Parameter.KEYWORD_ONLY
            parameters.append(Parameter(name, kind, default=default))
        signature = Signature(parameters)

        def construct(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            for name in defaults:
                setattr(self, name, bound.arguments[name])

        construct.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[method-assign]

    def _config(self, **overrides: Any) -> Any:
        """Build the config; an error names the estimator's parameter."""
        values = {field: getattr(self, name) for name, field in self._fields.items()}
        if "preset" in self._fields:  # None leaves a setting to the preset
            values = {field: value for field, value in values.items() if value is not None}
            overrides |= self.settings or {}
        try:
            return self._config_class(**(values | overrides))
        except ValidationError as error:
            names = {field: name for name, field in self._fields.items()}
            text = format_error(error, list(self._config_class.model_fields))
            field, separator, rest = text.partition(" = ")
            raise ConfigError(f"{names.get(field, field)}{separator}{rest}") from None

    def _fit_features(self, X: ArrayLike, *, normalize: bool) -> Tensor:
        x = validate_data(self, X, dtype=[np.float64, np.float32])
        if self.n_clusters > len(x):
            raise ConfigError(f"n_clusters = {self.n_clusters}: at most the number of rows, n_samples = {len(x)}")
        self.features_ = FeatureTransform.fitted(
            x, center=self.center, standardize=self.standardize, normalize=normalize
        )
        return torch.from_numpy(self.features_(x))

    def _features(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return torch.from_numpy(self.features_(x))

    def _train(self, x: Tensor, neighbors: Tensor | None, config: Any) -> None:
        """Fit `method_` and widen it to float64, so that a row's result does not depend on other rows of a call."""
        method = fit_arrays(x, neighbors, config, self._seed(), self._device())
        self.method_, self.n_steps_ = method.cpu().double(), method.plan.steps

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _device(self) -> torch.device:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)


class _Transformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Estimator):  # type: ignore[misc]
    """An estimator that also gives features; `fit` sets `_n_features_out`, their number."""

    _n_features_out: int


class KMeans(
    _Transformer,
    config=kmeans.KMeansOptions,
    fields={"metric": "metric", "n_init": "restarts", "max_iter": "max_iterations", "tol": "tolerance"},
):
    """k-means, spherical (default) or Euclidean, from greedy k-means++ seeds.

    Args:
        n_clusters: K.
        metric: `cosine`: rows and centres are unit vectors. `euclidean`: centres are means of the features, so
            `normalize=False` gives the k-means of the rows themselves; cosine scales rows to length 1 regardless.
        n_init: starts from different seeds, advanced together; the least inertia is kept.
        max_iter: most passes of one start.
        tol: shift of the centres at which a start stops, relative to the features' mean variance.

    Attributes:
        cluster_centers_: Float32[K D], in feature space.
        labels_: Int64[N].
        inertia_: sum of squared distances to the nearest centre; for cosine 2·(1 − cosine) of each row.
        n_iter_: passes of the best start.
        n_features_in_: D.
    """

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Find the centres of rows X, Float[N D]; `y` is not used."""
        config = self._config()
        x = self._fit_features(X, normalize=self.normalize or self.metric == "cosine").to(self._device())
        result = kmeans.fit(lambda: [x], config, seed=self._seed())
        self.cluster_centers_ = result.centers.cpu().numpy()
        self._n_features_out = len(self.cluster_centers_)
        self.labels_ = kmeans.assign(x, result.centers)[0].cpu().numpy()
        self.inertia_, self.n_iter_ = result.inertia, result.n_iter
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the nearest centre of each row: Int64[N]."""
        return np.asarray(kmeans.assign(self._features(X), torch.from_numpy(self.cluster_centers_))[0])

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return distances of features to centres: Float64[N K]."""
        # In float64 a row's distances do not depend on the other rows of the call.
        x = self._features(X).double()
        squares = kmeans.squared_distances(x, torch.from_numpy(self.cluster_centers_).double())
        return np.asarray(squares.sqrt())

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return minus the inertia of rows X; larger is better. `y` is not used."""
        x = self._features(X)
        return -float(kmeans.assign(x, torch.from_numpy(self.cluster_centers_))[1].sum(dtype=torch.float64))


class TEMI(
    _Estimator,
    config=TemiConfig,
    fields={"preset": "preset", "n_heads": "heads", "n_neighbors": "neighbors", "beta": "beta", "max_steps": "steps"}
    | {"batch_size": "batch_size", "learning_rate": "learning_rate"},
):
    """TEMI (arXiv 2303.17896): heads trained to agree with their moving averages on pairs of neighbours.

    None leaves a setting to the preset. Clusters that no row of the fit belongs to are numbered last.

    Args:
        n_clusters: K.
        preset: `auto` chooses from N, D and K; `readme` and `paper` are the published settings.
        n_heads: H; the one with the highest modularity (`auto`) or the lowest training loss is kept.
        n_neighbors: neighbours of a row among which its partner is drawn; at most N − 1 are used.
        beta: β, balance of the clusters.
        max_steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: per 256 rows of batch.
        settings: more keys of `rayclust.methods.temi.TemiConfig` and their values.

    Attributes:
        labels_: Int64[N].
        method_: the fitted `rayclust.methods.temi.Temi`; None for a single cluster, which needs none.
        n_steps_: optimiser steps taken.
        n_features_in_: D.
    """

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train the heads on rows X, Float[N D]; `y` is not used."""
        x = self._fit_features(X, normalize=self.normalize)
        self.method_, self.n_steps_ = None, 0
        if self.n_clusters > 1:
            config = self._config()
            # Neighbours by cosine, without the row itself.
            rows = torch.nn.functional.normalize(x, dim=1).to(self._device())
            ids = torch.arange(len(rows), device=rows.device)
            count = min(config.resolved(len(x), x.shape[1]).neighbors, len(x) - 1)
            neighbors, _ = top_k(rows, rows, count, query_ids=ids, database_ids=ids)
            self._train(x, neighbors.cpu(), config)
        # Clusters without rows are numbered last.
        self._order = np.arange(self.n_clusters)
        probabilities = self._probabilities(x)
        occupied = np.bincount(probabilities.argmax(axis=1), minlength=self.n_clusters) > 0
        self._order = np.argsort(~occupied, kind="stable")
        self.labels_ = probabilities[:, self._order].argmax(axis=1)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the most probable cluster of each row: Int64[N]."""
        return np.asarray(self.predict_proba(X).argmax(axis=1))

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return probabilities of the clusters: Float64[N K], rows sum to 1."""
        return self._probabilities(self._features(X))

    def _probabilities(self, x: Tensor) -> NDArray[np.float64]:
        if self.method_ is None:
            return np.ones((len(x), 1))
        return np.asarray(self.method_.predict_proba(x.double()).cpu())[:, self._order]


class CPP(
    _Transformer,
    config=CppConfig,
    fields={"preset": "preset", "variant": "variant", "temperature": "temperature", "max_steps": "steps"}
    | {"batch_size": "batch_size", "learning_rate": "learning_rate"},
):
    """CPP (arXiv 2306.05272): features by rate reduction, then spectral clusters; K plays no part in training.

    None leaves a setting to the preset.

    Args:
        n_clusters: K.
        preset: `auto` counts steps and stops on the loss; the others are the paper's settings for that data set.
        variant: whether the membership comes from z (`single_head`) or from a head of its own (`two_head`).
        temperature: η of the membership.
        max_steps: optimiser steps.
        batch_size: rows per step.
        learning_rate: per 256 rows of batch.
        settings: more keys of `rayclust.methods.cpp.CppConfig` and their values.

    Attributes:
        labels_: Int64[N].
        method_: the fitted `rayclust.methods.cpp.Cpp`; None for a single row.
        n_steps_: optimiser steps planned.
        n_features_in_: D.
    """

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Train on rows X, Float[N D], and cut them into clusters; `y` is not used."""
        x = self._fit_features(X, normalize=self.normalize)
        self.method_, self.n_steps_ = None, 0
        # For a single cluster features are learned all the same; their partition, which needs two, is not used.
        config = self._config(**({"clusters": 2} if self.n_clusters == 1 else {}))
        if len(x) > 1:
            self._train(x, None, config)
        self._n_features_out = int(self.method_.width) if self.method_ is not None else 0
        self.labels_ = self.predict(X)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the cluster of each row: Int64[N]."""
        x = self._features(X)
        if self.method_ is None or self.n_clusters == 1:
            return np.zeros(len(x), dtype=np.int64)
        return np.asarray(self.method_.predict_proba(x.double()).argmax(dim=1).cpu())

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the learned features z, unit rows: Float64[N d].

        Raises:
            ConfigError: a single row was fitted, from which nothing is learned.
        """
        x = self._features(X)
        if self.method_ is None:
            raise ConfigError("n_samples = 1: at least 2 are needed to learn features")
        return np.asarray(self.method_.transform(x.double()).cpu())
