"""What methods share that end in a linear classifier of the rows: `auto` and `consensus`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.distributed import data_group
from rayclust.methods.base import Method, Pairing
from rayclust.methods.settings import AutoConfig, ConsensusConfig


class LinearMethod(Method):
    """A method whose clusters are those of a linear classifier.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of everything random in the method.
    """

    weight: Tensor
    bias: Tensor
    centers: Tensor
    temperature: Tensor

    def __init__(self, config: AutoConfig | ConsensusConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.pairing = Pairing(columns=config.neighbors)
        self.register_buffer("weight", torch.zeros(dimension, config.clusters))
        self.register_buffer("bias", torch.zeros(config.clusters))
        self.register_buffer("centers", torch.zeros(config.clusters, dimension))
        self.register_buffer("temperature", torch.ones(()))

    def keep(self, device: torch.device, weight: Tensor, bias: Tensor, centers: Tensor, temperature: Tensor) -> None:
        """Store the fitted classifier; called by all workers together.

        Args:
            device: where the method goes.
            weight: Float[D K].
            bias: Float[K].
            centers: Float[K D], the clusters' mean rows.
            temperature: Float[], divides the scores before the softmax.
        """
        self.to(device)
        fitted = {"weight": weight, "bias": bias, "centers": centers, "temperature": temperature}
        for name, value in fitted.items():
            # Broadcast rank 0's: rounding may differ between processors.
            buffer = self.get_buffer(name)
            buffer.copy_(data_group().broadcast(value.to(buffer).contiguous()))

    def scores(self, x: Tensor) -> Tensor:
        """Return the classifier's scores, Float[B K], for Float[B D]."""
        return x.to(self.weight) @ self.weight + self.bias

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return Float[B K] for Float[B D], rows sum to 1: the softmax of the classifier's scores."""
        require_matrix(x, "x", self.dimension)
        return (self.scores(x) / self.temperature).softmax(dim=1)

    def prototypes(self) -> Tensor:
        """Return the clusters' mean rows at length 1, Float[K D]."""
        return functional.normalize(self.centers, dim=1)
