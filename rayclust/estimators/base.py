"""What estimators share: checked input, features, seed, device."""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import ValidationError
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from rayclust.errors import ConfigError
from rayclust.features import FeatureTransform
from rayclust.options import Config
from rayclust.refusals import one_line

_C = TypeVar("_C", bound=Config)


class RowClusterer(ClusterMixin, BaseEstimator):  # type: ignore[misc]
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


def checked(model: type[_C], parameters: dict[str, str], values: dict[str, Any]) -> _C:
    """Settings from values by field; a refusal names the estimator's parameter (`parameters`, by field)."""
    try:
        return model(**values)
    except ValidationError as error:
        text = one_line(error, list(model.model_fields), ())
        field, found, rest = text.partition(" = ")
        raise ConfigError(f"{parameters.get(field, field)}{found}{rest}") from None
