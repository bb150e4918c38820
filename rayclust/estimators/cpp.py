"""CPP with scikit-learn's contract."""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin

from rayclust.errors import ConfigError
from rayclust.estimators.base import RowClusterer, checked
from rayclust.methods.base import Method
from rayclust.methods.cpp import CppConfig
from rayclust.training.arrays import fit_arrays


class CPP(ClassNamePrefixFeaturesOutMixin, TransformerMixin, RowClusterer):  # type: ignore[misc]
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
        center: subtract the mean first.
        standardize: z-score each dimension first.
        normalize: scale rows to length 1.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        random_state: seed of everything random.

    Attributes:
        labels_: Int64[N].
        method_: the fitted `rayclust.methods.cpp.Cpp`; None for a single row.
        n_steps_: optimiser steps planned.
        n_features_in_: D.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        preset: Literal["auto", "cifar10", "cifar20", "cifar100", "imagenet"] = "auto",
        variant: Literal["single_head", "two_head"] | None = None,
        temperature: float | None = None,
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
        self.variant = variant
        self.temperature = temperature
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
        """Trains on rows X, Float[N D], and cuts them into clusters; `y` is not used.

        Raises:
            ConfigError: a parameter is impossible, or there are more clusters than rows; a ValueError.
        """
        x = self._fitted_features(X)
        self.method_: Method | None = None
        self.n_steps_ = 0
        config = self._config()
        if len(x) > 1:
            self.method_ = fit_arrays(x, None, config, self._seed(), self._device())
            # In float64 a row's place does not depend on what other rows come with it.
            self.method_.cpu().double()
            self.n_steps_ = self.method_.plan.steps
        self.labels_ = self._labels(x)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """The cluster of each row: Int64[N]."""
        return self._labels(self._features(X))

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """The learned features z, unit rows: Float64[N d].

        Raises:
            ConfigError: a single row was fitted, from which nothing is learned.
        """
        x = self._features(X)
        if self.method_ is None:
            raise ConfigError("n_samples = 1: at least 2 are needed to learn features")
        z: NDArray[np.float64] = self.method_.represent(x.double()).numpy()
        return z

    @property
    def _n_features_out(self) -> int:
        return int(self.method_.own_space or 0) if self.method_ is not None else 0

    def _config(self) -> CppConfig:
        parameters = {
            "clusters": "n_clusters",
            "preset": "preset",
            "variant": "variant",
            "temperature": "temperature",
            "steps": "max_steps",
            "batch_size": "batch_size",
            "learning_rate": "learning_rate",
        }
        values = {field: getattr(self, parameter) for field, parameter in parameters.items()}
        written = {field: value for field, value in values.items() if value is not None}
        if self.n_clusters == 1:  # features are learned all the same, and cut into two for nothing
            written["clusters"] = 2
        return checked(CppConfig, parameters, written | (self.settings or {}))

    def _labels(self, x: torch.Tensor) -> NDArray[np.int64]:
        if self.method_ is None or self.n_clusters == 1:
            return np.zeros(len(x), dtype=np.int64)
        labels: NDArray[np.int64] = self.method_.assign(x.double()).argmax(dim=1).numpy()
        return labels
