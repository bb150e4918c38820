"""TEMI: heads on frozen embeddings, taught by their own moving averages to agree on neighbours.

Source: arXiv 2303.17896. Departures from the published program are listed in docs/methods.md; the ones that change a
number are the log space, the kNN that never lists a row itself, and epochs below 30.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.losses.information import InformationOptions, Marginal, log_probabilities
from rayclust.methods import ema, temi_losses, temi_parts
from rayclust.methods.base import Batch, Export, Method, Pairing, Plan, Rows, Steps, Trainer
from rayclust.methods.heads import Heads
from rayclust.methods.temi_config import TemiConfig
from rayclust.methods.temi_health import Health
from rayclust.methods.temi_steps import FusedSteps, fits, pays
from rayclust.methods.warm_start import StartOptions, best_by_modularity, start_from_kmeans

__all__ = ["Temi", "TemiConfig"]

logger = logging.getLogger(__name__)

ASSIGN_ROWS = 8192
"""Rows whose hidden units are held at once when assigning."""


class Temi(Method):
    """TEMI on rows of width `dimension`.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights.
    """

    config: TemiConfig
    best_head: Tensor
    head_losses: Tensor

    def __init__(self, config: TemiConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__()
        self.config = config = config.settled(count, dimension)
        self.dimension, self.count, self.seed = dimension, count, seed
        self.plan = Plan.of(config, count)
        self.pairing = Pairing(config.neighbors, config.noise, config.repeats)
        _, layout = config.layout(count, dimension, collectives.world_size())
        self._hold(collectives.Grid.of(layout.head_parts, layout.cluster_parts))
        self._momentum = config.teacher_momentum
        self.register_buffer("best_head", torch.tensor(0))
        self.register_buffer("head_losses", torch.zeros(config.heads, dtype=torch.float64))

    def _hold(self, grid: collectives.Grid) -> None:
        """Makes the part of the heads that this worker trains in a grid."""
        config, self.grid = self.config, grid
        self.parts = temi_parts.Parts(grid, config.heads, config.clusters)
        heads, clusters = self.parts.own_heads, self.parts.own_clusters
        shape = replace(
            config.head_shape(self.dimension),
            heads=heads.stop - heads.start,
            first=heads.start,
            clusters=clusters.stop - clusters.start,
            first_cluster=clusters.start,
            all_clusters=config.clusters,
        )
        self.student = Heads(shape, self.seed, config.precision)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.marginal = Marginal(shape.heads, shape.clusters, config.marginal_momentum, config.clusters)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the heads and clusters of other workers behind or before this one's; a loss is the sum of all heads'."""
        return self.parts.whole(tensors, temi_parts.by_cluster(self, tensors))

    def part(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This worker's heads and their clusters."""
        return self.parts.part(tensors, temi_parts.by_cluster(self, tensors))

    def _join(self) -> None:
        """Every worker takes in the heads and clusters of the others; on the CPU where clusters were divided."""
        if self.grid.column.size * self.grid.stack.size > 1:
            state, like = self.whole(self.state_dict()), self.student.direction
            device = like.device if self.grid.stack.size == 1 else torch.device("cpu")
            self._hold(collectives.Grid(row=collectives.everyone()))
            self.to(device, like.dtype).load_state_dict(state)

    def fit(self, rows: Rows, trainer: Trainer) -> None:
        """Warm start, where asked for, the plan's steps, and the choice of a head."""
        with collectives.sharing_rows(self.grid.row):
            trainer.fit(self, rows, start=lambda: self._warm_start(rows))
            if self.config.selection == "modularity":
                teams = self.grid.column, self.grid.stack
                best, values = best_by_modularity(self.teacher, rows, self.config.start_neighbors, self.seed, *teams)
                self.best_head.fill_(best)
                logger.info("best head: %d, modularity %.3f", best, float(values[best]))
        self._join()

    def _warm_start(self, rows: Rows) -> None:
        c = self.config
        if c.warm_start == "kmeans":
            options = StartOptions(c.clusters, c.start_restarts, c.start_neighbors, c.start_rounds)
            start_from_kmeans(self.student, rows, options, self.seed, self.grid.stack)
            self.teacher.load_state_dict(self.student.state_dict())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The mean of all heads' losses, this worker's part of it; and of each head, Float[H], loss and agreement."""
        many = temi_losses.goes_in_chunks(self, batch)
        return self.told(*(temi_losses.in_chunks if many else temi_losses.whole)(self, batch))

    def told(self, losses: Tensor, trust: Tensor) -> dict[str, Tensor]:
        """What a step tells, from each head's loss, Float[H], and its trust in each pair, Float[H B]."""
        return {
            "loss": losses.sum() / self.config.heads,
            "head_loss": losses.detach(),
            "head_agreement": trust.detach().mean(1),
        }

    def loss_options(self) -> InformationOptions:
        """What the loss is told."""
        config = self.config
        alpha = config.entropy_weight
        if alpha is None:
            alpha = 5.0 if config.loss == "scan" else 0.0
        return InformationOptions(config.beta, config.positive_pmi, alpha, self.pool, self.grid.stack)

    def pool(self, trust: Tensor) -> Tensor:
        """The trust of all heads in each pair, Float[1 B], from that of this worker's, Float[H B]."""
        return self.grid.column.all_sum(trust.sum(0, keepdim=True)) / self.config.heads

    def teacher_temperature(self, epoch: int) -> float:
        """τ_t: linear over the first epochs, then constant."""
        start, end = self.config.warmup_teacher_temperature, self.config.teacher_temperature
        length = self.config.warmup_teacher_temperature_epochs
        return end if epoch >= length - 1 else start + (end - start) * epoch / (length - 1)

    def teacher_momentum(self, step: int) -> float:
        """The momentum m after step number `step`: a cosine over the whole training."""
        return ema.cosine(self.config.teacher_momentum, self.config.final_teacher_momentum, step, self.plan.steps)

    def own_steps(self) -> Steps | None:
        """Steps written out for the CPU, where the config is the usual one and heads are large enough."""
        return FusedSteps(self) if fits(self) and pays(self) else None

    def frozen(self, batch: Batch) -> list[nn.Parameter]:
        """The last layer, in the first epochs."""
        last = [self.student.direction, self.student.scale]
        return last if batch.epoch < self.config.freeze_last_layer else []

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Matrices and g; see `Heads.is_decayed`."""
        return self.student.is_decayed(name.removeprefix("student."))

    def is_stacked(self, name: str, parameter: nn.Parameter) -> bool:
        """All by heads, g among them: heads are trained as if each were alone."""
        return True

    def after_step(self, step: int) -> None:
        """The teacher follows the student."""
        self._momentum = self.teacher_momentum(step)
        ema.follow(self.teacher, self.student, self._momentum)

    def after_epoch(self, means: dict[str, Tensor]) -> dict[str, Any]:
        """Keeps the head with the lowest mean loss of this epoch; labels play no part."""
        self.head_losses.copy_(means["head_loss"])
        self.best_head.copy_(self.head_losses.argmin())
        best, told = int(self.best_head), self.parts.health(self.marginal)
        health = Health(**told, agreement=means["head_agreement"], clusters=self.config.clusters)
        self.parts.agree((self.student, self.teacher))
        self.finished_early = health.watch(best, self.config) and self.config.stop_on_collapse
        return {
            "teacher_momentum": self._momentum,
            "head_losses": self.head_losses.tolist(),
            "best_head": best,
            **health.row(best),
        }

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """The teacher's best head, in float32: Float[B D] to Float[B K], rows sum to 1."""
        return self._teacher_probabilities(x, int(self.best_head))[0]

    @torch.no_grad()
    def assign_all(self, x: Tensor) -> Tensor:
        """Every head of the teacher: Float[B D] to Float[H B K], rows sum to 1."""
        return self._teacher_probabilities(x, None)

    def _teacher_probabilities(self, x: Tensor, head: int | None) -> Tensor:
        require_matrix(x, "x", self.dimension)
        like = self.teacher.direction
        logits = [self.teacher(block.to(like), head=head) for block in torch.split(x, ASSIGN_ROWS)]
        return log_probabilities(torch.cat(logits, dim=1), self.config.teacher_temperature).exp()

    def prototypes(self) -> Tensor:
        """The teacher's best head: the directions of its last layer, with which unit rows are compared."""
        return functional.normalize(self.teacher.direction[int(self.best_head)].detach(), dim=1)

    def export(self, all_heads: bool = False) -> Export:
        """The teacher's best head alone, or all heads with the best one marked.

        Args:
            all_heads: keep every head, so that `assign_all` works after loading.
        """
        best = int(self.best_head)
        some = slice(None) if all_heads else slice(best, best + 1)
        tensors = {name: value[some].detach().cpu().clone() for name, value in self.teacher.state_dict().items()}
        tensors["best_head"] = torch.tensor(best if all_heads else 0)
        config = self.config.model_copy(update={} if all_heads else {"heads": 1})
        settings = {"config": config.model_dump(mode="json"), "dimension": self.dimension, "count": self.count}
        return Export(settings, tensors)

    def load_exported(self, tensors: dict[str, Tensor]) -> None:
        """Takes the heads of an `Export` as teacher and student."""
        tensors = dict(tensors)
        self.best_head.copy_(tensors.pop("best_head"))
        self.teacher.load_state_dict(tensors)
        self.student.load_state_dict(tensors)
