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
from rayclust.clustering import sinkhorn, spectral
from rayclust.clustering.affinity import unit
from rayclust.clustering.spectral import Spectral, SpectralOptions
from rayclust.errors import ArtefactError
from rayclust.methods.base import BaseMethodConfig, Export, Method, Rows, Trainer


class SpectralConfig(SpectralOptions, BaseMethodConfig):
    """Spectral clustering of the rows by their doubly stochastic membership (arXiv 2306.05272's last step)."""

    name: Literal["spectral"] = "spectral"
    """K-means of the leading eigenvectors."""
    clusters: int = Field(ge=2)
    """K."""

    def options(self) -> SpectralOptions:
        """What the partition is told."""
        return SpectralOptions.model_validate(self.model_dump(include=set(SpectralOptions.model_fields)))


class SpectralClustering(Method):
    """Spectral clustering of rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the k-means.
    """

    config: SpectralConfig
    refits_for_clusters = False

    def __init__(self, config: SpectralConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__()
        self.config, self.dimension, self.count, self.seed = config, dimension, count, seed
        self.partition: Spectral | None = None

    def fit(self, rows: Rows, trainer: Trainer) -> None:
        """One eigenproblem, on the trainer's device."""

        def blocks() -> Iterator[Tensor]:
            for block in rows.blocks():
                yield block.to(trainer.device)

        clusters = self.config.clusters
        self.partition = spectral.partition(blocks, clusters, self.config.options(), self.seed).cut(clusters)

    @torch.no_grad()
    def membership(self, x: Tensor) -> Tensor:
        """Π of these rows alone: Float[B D] to Float[B B], rows and columns sum to 1."""
        require_matrix(x, "x", self.dimension)
        return sinkhorn.membership(unit(x), self.config.temperature, None)

    def assign(self, x: Tensor) -> Tensor:
        """Float[B D] to Float[B K], rows sum to 1; each row's depend on it alone."""
        require_matrix(x, "x", self.dimension)
        return self._fitted().assign(x, self.config.clusters)

    def repartition(self, clusters: int, seed: int | None = None) -> SpectralClustering:
        """The same eigenvectors cut into another number of clusters, or from another seed."""
        other = copy.copy(self)
        other.partition = self._fitted().cut(clusters, seed)
        other.config = self.config.model_copy(update={"clusters": clusters})
        return other

    def _fitted(self) -> Spectral:
        if self.partition is None:
            raise ArtefactError("method = spectral: has no clusters yet, fit it first")
        return self.partition

    def export(self) -> Export:
        """Sites, eigenvectors and centres."""
        settings = {"config": self.config.model_dump(mode="json"), "dimension": self.dimension, "count": self.count}
        return Export(settings, self._fitted().tensors() | {"seed": torch.tensor(self._fitted().seed)})

    def load_exported(self, tensors: dict[str, Tensor]) -> None:
        """Takes the partition of an `Export`."""
        tensors = dict(tensors)
        self.seed = int(tensors.pop("seed"))
        self.partition = Spectral.from_tensors(tensors, self.config.options(), self.seed)
