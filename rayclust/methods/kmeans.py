"""k-means as a method: nearest centres, without gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.clustering import kmeans
from rayclust.clustering.population import survey
from rayclust.errors import ArtefactError
from rayclust.methods.base import BaseMethodConfig, Export, Method, Rows, Trainer


class KMeansConfig(kmeans.KMeansOptions, BaseMethodConfig):
    """k-means (Lloyd) from greedy k-means++ seeds."""

    name: Literal["kmeans"] = "kmeans"
    """Nearest of K centres."""
    clusters: int = Field(ge=2)
    """K."""
    temperature: float = Field(0.1, gt=0)
    """Of the probabilities when assigning: a cluster's is ∝ exp(−d² / (temperature · mean d²)), d the distance to its
    centre and mean d² that of the fitted rows to theirs. Does not change which is largest."""


class KMeans(Method):
    """k-means of rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the first centres.
    """

    config: KMeansConfig
    centers: Tensor
    inertia: Tensor

    def __init__(self, config: KMeansConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__()
        self.config, self.dimension, self.count, self.seed = config, dimension, count, seed
        self.register_buffer("centers", torch.zeros(config.clusters, dimension))
        self.register_buffer("inertia", torch.zeros((), dtype=torch.float64))

    def fit(self, rows: Rows, trainer: Trainer) -> None:
        """Lloyd's passes over all workers' rows, from the newest checkpoint if there is one.

        Reports a row of metrics after each pass, of the restart that is best so far.
        """
        _Fit(self, rows, trainer).run()

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """Float[B D] to Float[B K], rows sum to 1; the largest is that of the nearest centre."""
        require_matrix(x, "x", self.dimension)
        x = x.to(self.centers)
        x = torch.nn.functional.normalize(x, dim=1) if self.config.metric == "cosine" else x
        mean = float(self.inertia) / self.count or 1.0
        distances = kmeans.squared_distances(x, self.centers)
        return (distances / (-self.config.temperature * mean)).softmax(dim=1)

    def prototypes(self) -> Tensor:
        """The centres."""
        return torch.nn.functional.normalize(self.centers, dim=1)

    def export(self) -> Export:
        """The centres."""
        settings = {"config": self.config.model_dump(mode="json"), "dimension": self.dimension, "count": self.count}
        return Export(settings, {name: value.cpu().clone() for name, value in self.state_dict().items()})


class _Fit:
    """One fit from its first or a later pass to its last."""

    def __init__(self, method: KMeans, rows: Rows, trainer: Trainer) -> None:
        self.method, self.rows, self.trainer = method, rows, trainer
        self.device, self.store, self.every = trainer.device, trainer.store, trainer.every
        self.history: list[dict[str, Any]] = []
        self.seconds, self.started = 0.0, time.monotonic()
        self.saved = self.started

    def run(self) -> None:
        population = survey(self._blocks, self.method.config.metric)
        state = self._restored()
        if state is None:
            state = kmeans.start(population, self.method.config, self.method.seed)
        for reached in kmeans.advance(population, self.method.config, state):
            state = reached
            self._report(float(state.inertia.min()), int(state.running.sum()))
            if self._is_due():
                self._save(state)
        result = kmeans.finish(population, state)
        self.method.to(self.device)
        self.method.centers.copy_(result.centers)
        self.method.inertia.fill_(result.inertia)
        self._report(result.inertia, 0)

    def _blocks(self) -> Iterator[Tensor]:
        empty = True
        for block in self.rows.blocks():
            yield block.to(self.device)
            empty = False
        if empty:  # more workers than rows: the others still wait for this one's sums
            yield torch.zeros((0, self.rows.dimension), device=self.device)

    def _report(self, inertia: float, running: int) -> None:
        passes = len(self.history)
        row = {"epoch": passes, "step": passes + 1, "loss": inertia / self.method.count, "inertia": inertia}
        row |= {"running_restarts": running, "seconds": self.seconds + time.monotonic() - self.started}
        self.history.append(row)
        self.trainer.report(row)

    def _is_due(self) -> bool:
        """By the trainer's count of epochs (passes), or its clock as the first worker reads it."""
        if self.store is None:
            return False
        if self.every.epochs is not None and len(self.history) % self.every.epochs == 0:
            return True
        if self.every.seconds is None:
            return False
        due = collectives.rank() == 0 and time.monotonic() - self.saved >= self.every.seconds
        return bool(collectives.all_sum(torch.tensor(int(due), device=self.device)))

    def _save(self, state: kmeans.KMeansState) -> None:
        if self.store is None:
            return
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.tensors().items()}
        seconds = self.seconds + time.monotonic() - self.started
        self.store.save(len(self.history), tensors, {"history": self.history, "seconds": seconds})
        self.saved = time.monotonic()

    def _restored(self) -> kmeans.KMeansState | None:
        found = self.store.latest() if self.store is not None else None
        if found is None:
            return None
        tensors, kept = found
        wanted = (self.method.config.clusters, self.method.dimension)
        if "centers" not in tensors or tuple(tensors["centers"].shape[1:]) != wanted:
            raise ArtefactError(f"checkpoint does not hold {wanted} centres: remove it or restore the config")
        self.seconds = float(kept["seconds"])
        for row in kept["history"]:
            self.history.append(row)
            self.trainer.report(row)
        return kmeans.KMeansState(**{name: value.to(self.device) for name, value in tensors.items()})
