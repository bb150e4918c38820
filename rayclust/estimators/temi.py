"""TEMI with scikit-learn's contract."""
# ruff: noqa: N803 - scikit-learn's contract calls the rows X

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rayclust.estimators.base import RowClusterer, checked
from rayclust.methods.base import Method
from rayclust.methods.temi import TemiConfig
from rayclust.search.knn import top_k
from rayclust.training.arrays import fit_arrays


class TEMI(RowClusterer):
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
        return checked(TemiConfig, parameters, written | (self.settings or {}))

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
