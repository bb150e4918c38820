"""k-means as a method: nearest centres, without gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.clustering import kmeans
from rayclust.clustering.row_stats import compute
from rayclust.errors import ArtefactError
from rayclust.methods.base import BaseTrainer, Method, Rows, blocks_on
from rayclust.methods.settings import KMeansConfig


class KMeans(Method):
    """k-means of rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the first centres.
    """

    config_type = KMeansConfig
    config: KMeansConfig
    centers: Tensor
    inertia: Tensor

    def __init__(self, config: KMeansConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.register_buffer("centers", torch.zeros(config.clusters, dimension))
        self.register_buffer("inertia", torch.zeros((), dtype=torch.float64))

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Run Lloyd's passes over all workers' rows, from the newest checkpoint if there is one.

        Reports a row of metrics after each pass, of the restart that is best so far.

        Raises:
            ArtefactError: the checkpoint is of other centres.
        """

        def report(inertia: float, running: int) -> None:
            passes = len(trainer.history)
            row = {"epoch": passes, "step": passes + 1, "loss": inertia / self.count, "inertia": inertia}
            trainer.report({**row, "running_restarts": running, "seconds": trainer.seconds()})

        population = compute(partial(blocks_on, rows, trainer.device), self.config.metric)
        checkpoint = trainer.restore()
        if checkpoint is None:
            state = kmeans.start(population, self.config, self.seed)
        else:
            tensors, wanted = checkpoint[0], (self.config.clusters, self.dimension)
            if "centers" not in tensors or tuple(tensors["centers"].shape[1:]) != wanted:
                raise ArtefactError(f"checkpoint does not hold {wanted} centres: remove it or restore the config")
            state = kmeans.KMeansState(**{name: value.to(trainer.device) for name, value in tensors.items()})
        for reached in kmeans.advance(population, self.config, state):
            state = reached
            report(float(state.inertia.min()), int(state.running.sum()))
            if trainer.is_due(len(trainer.history)):
                trainer.save(len(trainer.history), vars(state))
        result = kmeans.finish(population, state)
        self.to(trainer.device)
        self.centers.copy_(result.centers)
        self.inertia.fill_(result.inertia)
        report(result.inertia, 0)

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return Float[B K] for Float[B D], rows sum to 1; the largest is that of the nearest centre."""
        require_matrix(x, "x", self.dimension)
        x = x.to(self.centers)
        x = functional.normalize(x, dim=1) if self.config.metric == "cosine" else x
        mean = float(self.inertia) / self.count or 1.0
        distances = kmeans.squared_distances(x, self.centers)
        return (distances / (-self.config.temperature * mean)).softmax(dim=1)

    def prototypes(self) -> Tensor:
        """Return the centres as unit rows, Float[K D]."""
        return functional.normalize(self.centers, dim=1)
