"""What every estimator has: scikit-learn's contract over a method's config, features, fit and prediction.

`Estimator.__init_subclass__` makes an estimator's constructor from the fields of its config.
"""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, Signature
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from rayclust.errors import ConfigError, DataError
from rayclust.features import FeatureTransform
from rayclust.metrics import internal
from rayclust.search.knn import nearest_others
from rayclust.settings import Config, format_error
from rayclust.training.loop import fit_arrays

_SHARED = {"center": False, "standardize": False, "normalize": True, "device": "auto", "random_state": None}
_SHARED |= {"verbose": 0}
"""Parameters of every estimator, and their defaults."""
_SHARED_ARGS = """\
        center: subtract the mean first.
        standardize: z-score each dimension first.
        normalize: scale rows to length 1.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        random_state: seed of everything random.
        verbose: 1 shows passes, epochs and losses on standard error, in log lines of the logger `rayclust`.
"""
SCORED_NEIGHBORS = 20
"""Nearest neighbours of a row in the graph that a score is measured on."""
_NEAR_ONE = 2.0**30
"""Rows whose largest value is within this factor of 1 are taken as they are."""


def as_array(X: Any) -> Any:
    """Return a tensor of any device and type, with a gradient or not, as an array; anything else as it is."""
    if not isinstance(X, Tensor):
        return X
    found = X.detach().cpu()
    return (found.float() if found.dtype == torch.bfloat16 else found).numpy()


class Estimator(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Input checks, features, config, seed and device of every estimator.

    The mean of the fitted rows is subtracted (`center`), rows are z-scored by their statistics (`standardize`) and
    scaled to length 1 (`normalize`); every method works on these features. `fit` raises a ConfigError, a ValueError,
    where a parameter is impossible or there are more clusters than rows.
    """

    _config_class: ClassVar[type[Config]]
    _fields: ClassVar[dict[str, str]]
    method_: Any
    n_steps_: int
    _members: Sequence[Tensor] | None = None

    def __init_subclass__(
        cls,
        config: type[Config] | None = None,
        fields: dict[str, str] | None = None,
        defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the constructor, with the explicit signature that scikit-learn requires, and its shared documentation.

        Its parameters are `n_clusters`, those of `fields` and the shared ones. For a config with presets the default is
        None, which leaves a setting to the preset, and `settings` holds further keys; otherwise it is the field's
        default.

        Args:
            config: the settings of the method; None leaves the class as it is.
            fields: field of the config, by parameter.
            defaults: of parameters, where they are not those of the config.
            kwargs: of scikit-learn's classes.
        """
        super().__init_subclass__(**kwargs)
        if config is None:
            return
        cls._config_class, cls._fields = config, {"n_clusters": "clusters", **(fields or {})}
        has_presets = "preset" in config.model_fields
        values: dict[str, Any] = {}
        for name, field in cls._fields.items():
            values[name] = None if has_presets and field != "preset" else config.model_fields[field].default
        values |= {"n_clusters": 8} | ({"settings": None} if has_presets else {}) | _SHARED | (defaults or {})
        cls.__doc__ = (cls.__doc__ or "").replace("\n\n    Attributes:", f"\n{_SHARED_ARGS}\n    Attributes:")
        parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)]
        for name, default in values.items():
            kind = Parameter.POSITIONAL_OR_KEYWORD if name == "n_clusters" else Parameter.KEYWORD_ONLY
            parameters.append(Parameter(name, kind, default=default))
        signature = Signature(parameters)

        def construct(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            for name in values:
                setattr(self, name, bound.arguments[name])

        construct.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[method-assign]

    def _config(self, **overrides: Any) -> Any:
        """Build the config; an error names the estimator's parameter."""
        if self.n_clusters == "auto" and "clusters" not in overrides:
            raise ConfigError(f"n_clusters = auto: {type(self).__name__} takes a number; rayclust.Auto finds one")
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

    def _fit_features(
        self,
        X: ArrayLike,
        unsupported: Mapping[str, Any],
        *,
        normalize: bool,
        weights: NDArray[np.float64] | None = None,
    ) -> Tensor:
        x = self._fit_rows(X, unsupported)
        self.features_ = FeatureTransform.fitted(
            x, weights, center=self.center, standardize=self.standardize, normalize=normalize
        )
        return torch.from_numpy(self.features_(x))

    def _fit_rows(self, X: ArrayLike, unsupported: Mapping[str, Any]) -> NDArray[Any]:
        """Check what `fit` is given; return the rows, Float[N D], times a power of two where they are far from 1."""
        for name, value in unsupported.items():
            if name != "sample_weight":
                raise TypeError(f"fit() got an unexpected keyword argument {name!r}")
            if value is not None:
                kind = type(self).__name__
                raise ConfigError(f"sample_weight: {kind} counts all rows alike: leave it out, or repeat rows")
        x = validate_data(self, as_array(X), dtype=[np.float64, np.float32])
        if self.n_clusters != "auto" and not isinstance(self.n_clusters, Real):
            raise ConfigError(f"n_clusters = {self.n_clusters!r}: should be a whole number")
        if self.n_clusters != "auto" and self.n_clusters > len(x):
            raise ConfigError(f"n_clusters = {self.n_clusters}: at most the number of rows, n_samples = {len(x)}")
        # Squares of numbers far from 1 overflow or vanish in float32; a power of two costs no digits.
        largest = float(np.abs(x).max())
        is_near_one = largest == 0 or 1 / _NEAR_ONE < largest < _NEAR_ONE
        self._scale = 1.0 if is_near_one else 2.0 ** -float(np.clip(np.frexp(largest)[1], -1000, 1000))
        return x if is_near_one else np.asarray(x * self._scale)

    def _rows(self, X: ArrayLike) -> NDArray[Any]:
        """Check new rows and return them as `_fit_rows` does."""
        check_is_fitted(self)
        x = validate_data(self, as_array(X), dtype=[np.float64, np.float32], reset=False)
        rows = np.asarray(x if self._scale == 1 else x * self._scale)
        if np.abs(rows).max() > np.finfo(np.float32).max:
            raise DataError("X: values are too far above those of the fitted rows to be compared with them")
        return rows

    def _features(self, X: ArrayLike) -> Tensor:
        rows = self._rows(X)
        return torch.from_numpy(self.features_(rows))

    @contextmanager
    def _progress(self) -> Iterator[None]:
        """Show the package's log lines while the block runs, on standard error where nothing else takes them."""
        if not self.verbose:
            yield
            return
        package = logging.getLogger("rayclust")
        level, handler = package.level, None if package.hasHandlers() else logging.StreamHandler()
        package.setLevel(logging.DEBUG)
        if handler is not None:
            package.addHandler(handler)
        try:
            yield
        finally:
            package.setLevel(level)
            if handler is not None:
                package.removeHandler(handler)

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return the modularity of the clusters of rows X on the graph of their nearest neighbours by cosine.

        Below 1, larger is better; about 0 for random labels, 0 for one cluster or one row. `y` is not used.

        Source: Newman & Girvan 2004; see `rayclust.metrics.internal.modularity`.
        """
        x = self._features(X)
        if len(x) < 2:
            return 0.0
        neighbors = nearest_others(x, min(SCORED_NEIGHBORS, len(x) - 1))
        return internal.modularity(self.predict(X), neighbors.numpy())

    def _train(self, x: Tensor, neighbors: Tensor | None, config: Any) -> None:
        """Fit `method_` and widen it to float64, so that a row's result does not depend on other rows of a call."""
        with self._progress():
            method = fit_arrays(x, neighbors, config, self._seed(), self._device(), members=self._members)
        self.method_, self.n_steps_ = method.cpu().double(), method.plan.steps if hasattr(method, "plan") else 0

    def _seed(self) -> int:
        drawn = check_random_state(self.random_state)
        return int(self.random_state) if isinstance(self.random_state, Integral) else int(drawn.randint(2**31 - 1))

    def _device(self) -> torch.device:
        sees_gpu, name = torch.cuda.is_available(), str(self.device)
        if name not in ("auto", "cpu") and not name.startswith("cuda"):
            raise ConfigError(f"device = {self.device!r}: should be 'auto', 'cpu' or 'cuda'")
        if name.startswith("cuda") and not sees_gpu:
            raise ConfigError(f"device = {self.device!r}: torch sees no GPU; 'auto' takes one where there is one")
        return torch.device(("cuda" if sees_gpu else "cpu") if name == "auto" else self.device)


class Transformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):  # type: ignore[misc]
    """An estimator that also gives features; `fit` sets `_n_features_out`, their number."""

    _n_features_out: int


class ProbabilisticEstimator(Estimator):
    """An estimator whose method gives probabilities; clusters that no row of the fit belongs to are numbered last."""

    def _number_clusters(self, x: Tensor) -> None:
        """Set `labels_` of the fitted features and the clusters' order."""
        self._order = np.arange(self.n_clusters_)
        probabilities = self._probabilities(x)
        occupied = np.bincount(probabilities.argmax(axis=1), minlength=self.n_clusters_) > 0
        self._order = np.argsort(~occupied, kind="stable")
        self.labels_ = probabilities[:, self._order].argmax(axis=1)

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the most probable cluster of each row: Int64[N]."""
        return np.asarray(self.predict_proba(X).argmax(axis=1))

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return probabilities of the clusters: Float64[N K], rows sum to 1."""
        return self._probabilities(self._features(X))

    def _probabilities(self, x: Tensor) -> NDArray[np.float64]:
        if self.method_ is None:
            return np.ones((len(x), 1))
        return np.asarray(self.method_.predict_proba(self._method_inputs(x.double())).cpu())[:, self._order]

    def _method_inputs(self, x: Tensor) -> Any:
        """Return features as the method takes them."""
        return x


class PairEstimator(ProbabilisticEstimator):
    """An estimator that needs nearest neighbours."""

    def fit(self, X: ArrayLike, y: Any = None, **unsupported: Any) -> Self:
        """Fit the method to rows X, Float[N D]; `y` is not used, and a `sample_weight` is refused."""
        x = self._fit_features(X, unsupported, normalize=self.normalize)
        self.method_, self.n_steps_, self.n_clusters_ = None, 0, 1
        if self.n_clusters != 1 and len(x) > 1:
            config = self._config(**({"clusters": 2} if self.n_clusters == "auto" else {}))
            resolved = config.resolved(len(x), x.shape[1]) if hasattr(config, "resolved") else config
            columns = min(max(resolved.neighbors, self._columns), len(x) - 1)
            neighbors = nearest_others(x.to(self._device()), columns).cpu()
            if self.n_clusters == "auto":
                config = self._config(clusters=self._choose(x, neighbors))
            self.n_clusters_ = config.clusters
            self._train(x, neighbors[:, : resolved.neighbors], config)
        self._number_clusters(x)
        return self

    _columns: ClassVar[int] = 0
    """Nearest neighbours that are wanted, at least."""

    def _choose(self, x: Tensor, neighbors: Tensor) -> int:
        """Return the number of clusters for features Float[N D] with neighbours Int64[N M]."""
        return int(self._config().clusters)
