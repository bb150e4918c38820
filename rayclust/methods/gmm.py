"""A mixture of Gaussians as a method: soft clusters of unlike size and spread, without gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.clustering import gmm
from rayclust.errors import ArtefactError
from rayclust.methods.base import BaseTrainer, Method, Rows, blocks_on
from rayclust.methods.settings import GmmConfig


class Gmm(Method):
    """A mixture of Gaussians of rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the k-means that it starts from.
    """

    config_type = GmmConfig
    config: GmmConfig
    weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(self, config: GmmConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        shape = config.clusters, dimension
        self.register_buffer("weights", torch.full(shape[:1], 1.0 / shape[0], dtype=torch.float64))
        self.register_buffer("means", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variances", torch.ones(shape, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Run passes over all workers' rows, from the newest checkpoint if there is one; reports each.

        Raises:
            ArtefactError: the checkpoint is of other components.
        """
        blocks = partial(blocks_on, rows, trainer.device)
        checkpoint = trainer.restore()
        if checkpoint is None:
            mixture = gmm.start(blocks, self.config, self.seed)
        else:
            tensors, wanted = checkpoint[0], (self.config.clusters, self.dimension)
            if "means" not in tensors or tuple(tensors["means"].shape) != wanted:
                raise ArtefactError(f"checkpoint does not hold {wanted} means: remove it or restore the config")
            parts = {name: tensor.to(trainer.device) for name, tensor in tensors.items()}
            mixture = gmm.Mixture(**parts, log_likelihood=-float(trainer.history[-1]["loss"]))
        passes = len(trainer.history)
        for reached in gmm.advance(blocks, self.config, mixture, passes):
            mixture, passes = reached, passes + 1
            row = {"epoch": passes - 1, "step": passes, "loss": -mixture.log_likelihood}
            trainer.report(row | {"smallest_weight": float(mixture.weights.min()), "seconds": trainer.seconds()})
            if trainer.is_due(passes):
                trainer.save(passes, {name: getattr(mixture, name) for name, _ in self.named_buffers()})
        self.to(trainer.device)
        for name, buffer in self.named_buffers():
            buffer.copy_(getattr(mixture, name))

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return the responsibilities, Float[B K] for Float[B D]; rows sum to 1."""
        require_matrix(x, "x", self.dimension)
        joint = gmm.Mixture(self.weights, self.means, self.variances).log_joint(x.to(self.means))
        return joint.softmax(dim=1).to(x.dtype)

    def prototypes(self) -> Tensor:
        """Return the means as unit rows, Float[K D]."""
        return functional.normalize(self.means, dim=1)
