"""Spectral clustering as a method: CPP's final step on the rows themselves, without a network.

The baseline beside CPP: what its membership finds in features that no rate reduction has shaped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rayclust.arrays import require_matrix
from rayclust.clustering import spectral
from rayclust.clustering.spectral import Spectral, SpectralOptions, unit
from rayclust.errors import ArtefactError
from rayclust.methods.base import BaseMethodConfig, Method, MethodState, Rows, Trainer


class SpectralConfig(SpectralOptions, BaseMethodConfig):
    """Spectral clustering of the rows by their doubly stochastic membership (arXiv 2306.05272's last step)."""

    name: Literal["spectral"] = "spectral"
    """K-means of the leading eigenvectors."""
    clusters: int = Field(ge=2)
    """K."""

    def options(self) -> SpectralOptions:
        """Return the settings of the partition."""
        return SpectralOptions.model_validate(self.model_dump(include=set(SpectralOptions.model_fields)))


class SpectralClustering(Method):
    """Spectral clustering of rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the k-means.
    """

    config_type = SpectralConfig
    config: SpectralConfig

    def __init__(self, config: SpectralConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.partition: Spectral | None = None

    def fit(self, rows: Rows, trainer: Trainer) -> None:
        """Solve one eigenproblem, on the trainer's device."""

        def blocks() -> Iterator[Tensor]:
            for block in rows.blocks():
                yield block.to(trainer.device)

        clusters = self.config.clusters
        self.partition = spectral.partition(blocks, clusters, self.config.options(), self.seed).cut(clusters)

    @torch.no_grad()
    def membership(self, x: Tensor) -> Tensor:
        """Return Π of these rows alone: Float[B D] to Float[B B], rows and columns sum to 1."""
        require_matrix(x, "x", self.dimension)
        return spectral.membership(unit(x), self.config.temperature, None)

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return Float[B K] for Float[B D], rows sum to 1; each row's depend on it alone."""
        require_matrix(x, "x", self.dimension)
        return self._fitted().assign(x, self.config.clusters)

    def recut(self, clusters: int, seed: int | None = None) -> SpectralClustering:
        """Return the same eigenvectors cut into another number of clusters, or from another seed."""
        other = copy.copy(self)
        other.partition = self._fitted().cut(clusters, seed)
        other.config = self.config.model_copy(update={"clusters": clusters})
        return other

    def state(self) -> MethodState:
        """Return sites, eigenvectors and centres."""
        fitted = self._fitted()
        return MethodState(self._settings(), fitted.tensors() | {"seed": torch.tensor(fitted.seed)})

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.seed = int(tensors.pop("seed"))
        self.partition = Spectral.from_tensors(tensors, self.config.options(), self.seed)

    def _fitted(self) -> Spectral:
        if self.partition is None:
            raise ArtefactError("method = spectral: has no clusters yet, fit it first")
        return self.partition
