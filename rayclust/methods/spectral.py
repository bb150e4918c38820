"""Spectral clustering as a method: CPP's final step on the rows themselves, without a network.

The baseline beside CPP: what its membership finds in features that no rate reduction has shaped.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor

from rayclust.arrays import require_matrix
from rayclust.clustering import spectral
from rayclust.clustering.spectral import Spectral, unit
from rayclust.errors import ArtefactError
from rayclust.methods.base import BaseTrainer, Method, MethodState, Rows
from rayclust.methods.settings import SpectralConfig


class SpectralMethod(Method):
    """A method whose clusters are a spectral partition of its rows or of codes of them."""

    partition: Spectral | None = None
    """Set by a fit."""

    def fitted(self) -> Spectral:
        """Return the partition.

        Raises:
            ArtefactError: the method was not fitted.
        """
        if self.partition is None:
            raise ArtefactError(f"method = {self.config.name}: has no clusters yet, fit it first")
        return self.partition

    def recut(self, clusters: int, seed: int | None = None) -> Self:
        """Return the same eigenvectors cut into another number of clusters, or from another seed; see `Recuttable`."""
        other = copy.copy(self)
        other.partition = self.fitted().cut(clusters, seed)
        other.config = self.config.model_copy(update={"clusters": clusters})
        return other


class SpectralClustering(SpectralMethod):
    """Spectral clustering of rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the k-means.
    """

    config_type = SpectralConfig
    config: SpectralConfig

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Solve one eigenproblem, on the trainer's device."""
        clusters, device = self.config.clusters, trainer.device
        fitted = spectral.partition(
            lambda: (block.to(device) for block in rows.blocks()), clusters, self.config, self.seed
        )
        self.partition = fitted.cut(clusters)

    @torch.no_grad()
    def membership(self, x: Tensor) -> Tensor:
        """Return Π of these rows alone: Float[B D] to Float[B B], rows and columns sum to 1."""
        require_matrix(x, "x", self.dimension)
        return spectral.membership(unit(x), self.config.temperature, None)

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return Float[B K] for Float[B D], rows sum to 1; each row's depend on it alone."""
        require_matrix(x, "x", self.dimension)
        return self.fitted().assign(x, self.config.clusters)

    def state(self) -> MethodState:
        """Return sites, eigenvectors and centres."""
        fitted = self.fitted()
        return MethodState(super().state().settings, fitted.tensors() | {"seed": torch.tensor(fitted.seed)})

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load sites, eigenvectors and centres."""
        self.seed = int(tensors.pop("seed"))
        self.partition = Spectral.from_tensors(tensors, self.config, self.seed)
