"""TEMI: heads on frozen embeddings, taught by their own moving averages to agree on neighbours.

Source: arXiv 2303.17896. Departures from the published program are listed in docs/methods.md; the ones that change a
number are the log space, the kNN that never lists a row itself, and epochs below 30.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rayclust.arrays import require_matrix
from rayclust.losses.information import LOSSES, InformationOptions, Marginal, log_probabilities
from rayclust.methods import ema
from rayclust.methods.base import Batch, Export, Method, Pairing, Plan, Rows, Steps, TrainedConfig, Trainer
from rayclust.methods.heads import Heads, HeadShape, Precision
from rayclust.methods.temi_presets import preset_values
from rayclust.methods.temi_steps import FusedSteps, fits, pays
from rayclust.methods.warm_start import StartOptions, best_by_modularity, start_from_kmeans

logger = logging.getLogger(__name__)

ASSIGN_ROWS = 8192
"""Rows whose hidden units are held at once when assigning."""


class TemiConfig(TrainedConfig):
    """TEMI (arXiv 2303.17896). A key that is written wins over the preset."""

    name: Literal["temi"] = "temi"
    """Teacher ensemble-weighted pointwise mutual information."""
    preset: Literal["auto", "readme", "paper", "none"] = "auto"
    """auto: chosen from N, D and K without labels. readme, paper: the published settings. none: the defaults below."""
    heads: int = Field(16, ge=1)
    """H, heads trained side by side; the one with the lowest training loss is kept."""
    neighbors: int = Field(50, ge=1)
    """Nearest neighbours of a row among which its partner is drawn."""
    loss: Literal["temi", "pmi", "wmi", "scan"] = "temi"
    """What is minimised; see losses/information.py."""
    beta: float = Field(0.6, gt=0)
    """β, above 0.5. Lower keeps clusters more even; 1 for many more clusters than classes."""
    positive_pmi: bool = False
    """Whether a pair's information is cut off at 0 from below."""
    entropy_weight: float | None = None
    """α of WMI's and SCAN's entropy. None: 5 for SCAN, 0 for WMI."""
    student_temperature: float = Field(0.1, gt=0)
    """Divides the student's logits."""
    teacher_temperature: float = Field(0.1, gt=0)
    """Divides the teacher's logits after its warm-up, and when assigning."""
    warmup_teacher_temperature: float = Field(0.1, gt=0)
    """The teacher's temperature in the first epoch."""
    warmup_teacher_temperature_epochs: int = Field(30, ge=0)
    """Epochs in which the teacher's temperature moves linearly; longer than the training is allowed."""
    teacher_momentum: float = Field(0.996, ge=0, le=1)
    """Momentum of the teacher at the first step."""
    final_teacher_momentum: float = Field(0.996, ge=0, le=1)
    """Momentum of the teacher at the end of a cosine."""
    marginal_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the clusters' running shares p̂."""
    freeze_last_layer: int = Field(1, ge=0)
    """Epochs at the start in which the last layer is not trained."""
    hidden: int = Field(512, ge=1)
    """Width of the hidden layers of a head."""
    bottleneck: int = Field(256, ge=1)
    """Width of the unit rows before the last layer."""
    layers: int = Field(2, ge=1)
    """Linear layers of a head before the last one."""
    batch_norm: bool = False
    """Whether hidden layers are batch-normalised, over all workers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of hidden units dropped in training."""
    final_gelu: bool = False
    """Whether a GELU follows the bottleneck."""
    learn_scale: bool = True
    """Whether the length of the last layer's rows is learnt; otherwise it stays 1."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise added to each value of a view; the published option adds 0.1."""
    repeats: int = Field(1, ge=1)
    """Views drawn of a row and of its neighbour, each with its own noise."""
    warm_start: Literal["none", "kmeans"] = "none"
    """kmeans: heads start at the best of several k-means partitions of rows averaged with their neighbours."""
    start_restarts: int = Field(16, ge=1)
    """k-means partitions from which a warm start chooses by modularity."""
    start_neighbors: int = Field(10, ge=1)
    """Nearest neighbours that a warm start averages and that modularity counts."""
    start_rounds: int = Field(2, ge=0)
    """How often a warm start averages rows with their neighbours."""
    selection: Literal["loss", "modularity"] = "loss"
    """Head that is kept. loss: least training loss in the last epoch, as published. modularity: keeps most neighbours
    together, by its clusters of all rows; less drawn to even sizes. Neither sees labels."""
    precision: Precision = "auto"
    """Matrix products in training. auto: bf16 where the processor multiplies it fast, else float32."""

    def settled(self, count: int, dimension: int) -> TemiConfig:
        """This config with its preset written out for N = `count`, D = `dimension`; `preset` is then `none`."""
        chosen = preset_values(self, count, dimension)
        written = {key: getattr(self, key) for key in self.model_fields_set}
        return TemiConfig.model_validate({**chosen, **written, "preset": "none"})

    def head_shape(self, dimension: int) -> HeadShape:
        """The sizes and parts of the heads on rows of width `dimension`."""
        return HeadShape(
            heads=self.heads,
            dimension=dimension,
            clusters=self.clusters,
            hidden=self.hidden,
            bottleneck=self.bottleneck,
            layers=self.layers,
            batch_norm=self.batch_norm,
            dropout=self.dropout,
            final_gelu=self.final_gelu,
            learn_scale=self.learn_scale,
        )

    def loss_options(self) -> InformationOptions:
        """What the loss is told."""
        alpha = self.entropy_weight
        if alpha is None:
            alpha = 5.0 if self.loss == "scan" else 0.0
        return InformationOptions(self.beta, self.positive_pmi, alpha)


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
        self.student = Heads(config.head_shape(dimension), seed, config.precision)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.marginal = Marginal(config.heads, config.clusters, config.marginal_momentum)
        self._momentum = config.teacher_momentum
        self.register_buffer("best_head", torch.tensor(0))
        self.register_buffer("head_losses", torch.zeros(config.heads, dtype=torch.float64))

    def fit(self, rows: Rows, trainer: Trainer) -> None:
        """Warm start, where asked for, the plan's steps, and the choice of a head."""
        trainer.fit(self, rows, start=lambda: self._warm_start(rows))
        if self.config.selection == "modularity":
            best, values = best_by_modularity(self.teacher, rows, self.config.start_neighbors, self.seed)
            self.best_head.fill_(best)
            logger.info("best head: %d, modularity %.3f", best, float(values[best]))

    def _warm_start(self, rows: Rows) -> None:
        c = self.config
        if c.warm_start == "kmeans":
            options = StartOptions(c.clusters, c.start_restarts, c.start_neighbors, c.start_rounds)
            start_from_kmeans(self.student, rows, options, self.seed)
            self.teacher.load_state_dict(self.student.state_dict())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The mean of the heads' losses, and each head's, Float[H]."""
        views = len(batch.views)
        stacked = batch.views.flatten(0, 1)
        with torch.no_grad():
            teacher = self._log_probabilities(self.teacher, stacked, self.teacher_temperature(batch.epoch), views)
            log_marginal = self.marginal.update(teacher)
        student = self._log_probabilities(self.student, stacked, self.config.student_temperature, views)
        losses = LOSSES[self.config.loss](student, teacher, log_marginal, self.config.loss_options())
        return {"loss": losses.mean(), "head_loss": losses.detach()}

    def _log_probabilities(self, heads: Heads, x: Tensor, temperature: float, views: int) -> Tensor:
        """Float[H V B K] of stacked views, Float[V·B D]."""
        stacked = log_probabilities(heads(x, training=True), temperature)
        return stacked.view(len(stacked), views, -1, stacked.shape[2])

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

    def after_step(self, step: int) -> None:
        """The teacher follows the student."""
        self._momentum = self.teacher_momentum(step)
        ema.follow(self.teacher, self.student, self._momentum)

    def after_epoch(self, means: dict[str, Tensor]) -> dict[str, Any]:
        """Keeps the head with the lowest mean loss of this epoch; labels play no part."""
        self.head_losses.copy_(means["head_loss"])
        self.best_head.copy_(self.head_losses.argmin())
        best = int(self.best_head)
        return {
            "teacher_momentum": self._momentum,
            "head_losses": self.head_losses.tolist(),
            "best_head": best,
            "marginal_entropy": float(self.marginal.entropy()[best]),
            "live_clusters": int(self.marginal.live()[best]),
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
