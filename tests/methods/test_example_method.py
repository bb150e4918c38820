"""A whole method in 60 lines: docs/adding_a_method.md walks through it."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rayclust import distributed, methods
from rayclust.arrays import require_matrix
from rayclust.clustering import kmeans
from rayclust.methods.base import BaseTrainer, Batch, Method, Rows
from rayclust.methods.settings import Plan, TrainedConfig
from rayclust.metrics.external import accuracy
from rayclust.settings import KMeansOptions
from rayclust.training.loop import fit_arrays
from tests.workers import on_two_workers


class RimConfig(TrainedConfig):
    """RIM: a linear classifier of maximal mutual information (Krause et al., NIPS 2010)."""

    name: Literal["rim"] = "rim"
    """Softmax of a linear map."""
    learning_rate: float = Field(0.25, gt=0)
    """Peak learning rate per 256 rows of batch."""
    min_learning_rate: float = Field(0.25, ge=0)
    """Learning rate at the end of the cosine, per 256 rows of batch as well."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs in which the learning rate rises."""


class Rim(Method):
    """RIM on rows of width `dimension`: no pairs, no teacher; weight decay is the optimiser's."""

    config_type = RimConfig
    config: RimConfig

    def __init__(self, config: RimConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.plan = Plan.of(config, count)
        self.head = nn.Linear(dimension, config.clusters)

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Start at the centres of k-means, as the paper does, then take the plan's steps."""

        @torch.no_grad()
        def start() -> None:
            options = KMeansOptions(clusters=self.config.clusters)
            self.head.weight.copy_(kmeans.fit(rows.blocks, options, seed=self.seed).centers)
            self.head.bias.zero_()

        trainer.fit(self, rows, start)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the mean entropy of the rows' probabilities minus the entropy of their mean over all workers."""
        logs = self.head(batch.x[0]).log_softmax(dim=1)
        conditional = -(logs.exp() * logs).sum(1).mean()
        share = logs.exp().mean(0) * batch.weight  # of this worker in the mean over the batch
        mean = distributed.differentiable_all_reduce(share) / distributed.data_group().size
        marginal = -torch.xlogy(mean, mean).sum()
        return {"loss": conditional - marginal, "conditional": conditional, "marginal": marginal}

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return probabilities of the clusters: Float[B D] to Float[B K], rows sum to 1."""
        require_matrix(x, "x", self.dimension)
        return self.head(x.to(self.head.weight)).softmax(dim=1)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "rim", f"{__name__}:Rim")  # the line in methods/__init__.py


def planted(seed: int = 0, clusters: int = 4, count: int = 200) -> tuple[Tensor, Tensor]:
    """Unit rows around orthogonal directions, and the direction of each."""
    labels = torch.arange(count) % clusters
    noise = 0.15 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(torch.eye(8)[labels] + noise, dim=1), labels


@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_found(seed: int):
    x, labels = planted(seed)
    method = fit_arrays(x, None, RimConfig(clusters=4, batch_size=50, epochs=20), seed)
    assert accuracy(labels, method.predict_proba(x).argmax(1)) > 0.97


def test_a_fitted_method_survives_its_state():
    x, _ = planted()
    method = fit_arrays(x, None, RimConfig(clusters=4, epochs=2))
    assert methods.load(method.state()).predict_proba(x).equal(method.predict_proba(x))


def test_two_workers_take_the_step_of_one():
    found = on_two_workers(_loss_and_gradient)
    loss, gradient = _loss_and_gradient(0, 1)
    for other_loss, other_gradient in found:
        assert other_loss == pytest.approx(loss, rel=1e-9)
        assert other_gradient.allclose(gradient, rtol=0, atol=1e-12)


def _loss_and_gradient(rank: int, workers: int) -> tuple[float, Tensor]:
    """Take every W-th of 33 rows, so that the parts are of two sizes."""
    rows = torch.arange(rank, 33, workers)
    torch.manual_seed(0)
    method = Rim(RimConfig(clusters=4), 8, 33, seed=0).double()
    batch = Batch({"embeddings": planted()[0].double()[rows][None]}, rows, 0, 0, workers * len(rows) / 33)
    loss = method.training_step(batch)["loss"] * batch.weight
    loss.backward()
    distributed.average_gradients(method.parameters())
    return float(distributed.all_reduce(loss.detach()) / workers), method.head.weight.grad.clone()
