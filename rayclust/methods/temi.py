"""TEMI: heads on frozen embeddings, trained to agree on neighbours with their own moving averages.

Settings, presets, division over workers, and the method, in this order. Source: arXiv 2303.17896. Departures from the
published program are listed in docs/methods.md; the ones that change a number are the log space, the kNN that never
lists a row itself, and epochs below 30.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.losses.information import InformationOptions, Marginal, information_losses, log_probabilities
from rayclust.methods.base import BaseTrainer, Batch, Method, MethodState, Pairing, Rows
from rayclust.methods.graph import ComponentRows
from rayclust.methods.layers import ema_update
from rayclust.methods.settings import Plan, cosine_schedule
from rayclust.methods.temi_heads import (
    Heads,
    Start,
    StartOptions,
    best_by_modularity,
    choose_start,
    may_replace_start,
    principal_axes,
    start_from_kmeans,
    start_from_partition,
)
from rayclust.methods.temi_settings import TemiConfig

logger = logging.getLogger(__name__)

PREDICT_ROWS = 8192
"""Rows whose hidden units are held at once in `predict_proba`."""
COLLAPSE_ENTROPY = 0.5
"""Part of ln K below which the entropy of a head's shares is a sign of collapse."""
BETA_STEP = 0.1
"""Difference between β and the lower one that a warning of collapse proposes."""
WHOLE_STATE = ("best_head", "head_losses", "basis")
"""Tensors of the state that every worker holds whole, whatever heads it trains."""


def collapsed_heads(entropy: Tensor, live: Tensor, clusters: int) -> Tensor:
    """Return which heads have put most rows into few clusters: Bool[H].

    Low entropy alone is no collapse: classes may be of very different size. Half of the clusters must be dead as well.

    Args:
        entropy: Float[H], nats, of the clusters' shares.
        live: Int[H], clusters with more than a tenth of an even share.
        clusters: K.
    """
    return (entropy < COLLAPSE_ENTROPY * math.log(clusters)) & (2 * live <= clusters)


class Temi(Method):
    """TEMI on rows of width `dimension`.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights.
    """

    config_type = TemiConfig
    config: TemiConfig
    best_head: Tensor
    head_losses: Tensor
    basis: Tensor | None
    start: Start | None = None
    """What heads start from with `warm_start: auto`, on the sample of that seed; None: what `auto` chooses."""

    def __init__(self, config: TemiConfig, dimension: int, count: int, seed: int) -> None:
        config = config.resolved(count, dimension)
        super().__init__(config, dimension, count, seed)
        self.plan = Plan.of(config, count)
        self.pairing = Pairing(config.neighbors, config.noise, config.repeats)
        layout = config.layout(count, dimension, distributed.data_group().size)
        self.register_buffer("basis", None)
        self._build_heads(distributed.DeviceMesh.of(layout.head_parts))
        self._momentum, self._warned_of_collapse = config.teacher_momentum, False
        self.register_buffer("best_head", torch.tensor(0))
        self.register_buffer("head_losses", torch.zeros(config.heads, dtype=torch.float64))

    def _build_heads(self, mesh: distributed.DeviceMesh) -> None:
        """Build the part of the heads that this worker trains in a mesh, anew where there are some."""
        before = getattr(self, "student", None)
        config, self.mesh = self.config, mesh
        self._own_heads = distributed.even_slices(config.heads, mesh.heads.size)[mesh.heads.rank]
        first, last = self._own_heads.start, self._own_heads.stop
        width = self.dimension if self.basis is None else self.basis.shape[1]
        shape = replace(config.head_shape(width), heads=last - first, first=first)
        self.student = Heads(shape, self.seed, config.precision)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.marginal = Marginal(shape.heads, shape.clusters, config.marginal_momentum)
        if before is not None:
            self.to(before.direction.device, before.direction.dtype)

    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Start warm, where asked for, take the plan's steps, and choose a head; then every worker holds all heads.

        A start from `auto` comes back where the neighbour graph speaks against what training has made of it.
        """
        c = self.config
        if c.trained_width(self.dimension) < self.dimension:
            rows = self._on_components(rows, trainer)

        @cache  # what the heads start from is also what the guard compares with
        def start() -> Start:
            return self.start or choose_start(rows, c.clusters, c.start_neighbors, self.seed, self.student.direction)

        def warm_start() -> None:
            if c.warm_start == "auto":
                start_from_partition(self.student, rows, start(), self.seed)
            elif c.warm_start == "kmeans":
                options = StartOptions(c.clusters, c.start_restarts, c.start_neighbors, c.start_rounds)
                start_from_kmeans(self.student, rows, options, self.seed)
            self.teacher.load_state_dict(self.student.state_dict())

        with distributed.data_parallel(self.mesh.data):
            trainer.fit(self, rows, start=warm_start)
            if c.selection == "modularity":
                best, values = best_by_modularity(self.teacher, rows, c.start_neighbors, self.seed, self.mesh.heads)
                self.best_head.fill_(best)
                logger.info("best head: %d, modularity %.3f", best, float(values[best]))
        if self.mesh.heads.size > 1:
            state = self.gather_state(self.state_dict())
            self._build_heads(distributed.DeviceMesh(data=distributed.world()))
            self.load_state_dict(state)
        best = int(self.best_head)
        if c.warm_start == "auto" and not may_replace_start(self.teacher, best, rows, start(), self.seed):
            logger.warning("temi: training has left the neighbour graph's clusters; the start is kept")
            self._build_heads(self.mesh)
            warm_start()
            self.best_head.zero_()
        if self.basis is not None:
            self._on_rows(self.basis)

    def _on_components(self, rows: Rows, trainer: BaseTrainer) -> Rows:
        """Build heads for the leading components alone, and return the rows on them.

        The first layer's products are most of a step's. A resumed training keeps its checkpoint's axes.
        """
        checkpoint, like = trainer.restore(), self.student.direction
        if checkpoint is None:
            self.basis = principal_axes(rows, self.config.components, self.config.clusters, self.seed, like)
        else:
            self.basis = checkpoint[0]["method.basis"].to(like)
        self._build_heads(self.mesh)
        return ComponentRows(rows, self.basis)

    def _on_rows(self, basis: Tensor) -> None:
        """Fold the axes V into the first layers: ⟨w, Vᵀx⟩ = ⟨Vw, x⟩, the same heads on rows."""
        for heads in (self.student, self.teacher):
            weight = heads.weights[0]
            heads.weights[0] = nn.Parameter((weight @ basis.T).detach(), weight.requires_grad)
            heads.shape = replace(heads.shape, dimension=self.dimension)
        self.basis = None

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the mean of all heads' losses, this worker's part of it; and of each head loss and agreement.

        Returns:
            "loss": Float[], nats; "head_loss" and "head_agreement": Float[H].
        """
        c, views = self.config, batch.x
        alpha = c.entropy_weight if c.entropy_weight is not None else 5.0 if c.loss == "scan" else 0.0
        options = InformationOptions(c.loss, c.beta, c.positive_pmi, alpha, self.mean_agreement)
        with torch.no_grad():
            teacher = self.teacher.last_layer(views, self.teacher_temperature(batch.epoch))
        student = self.student.last_layer(views, c.student_temperature)
        losses, agreements = information_losses(student, teacher, self.marginal, options)
        return {
            "loss": losses.sum() / c.heads,
            "head_loss": losses.detach(),
            "head_agreement": agreements.detach().mean(1),
        }

    def mean_agreement(self, agreements: Tensor) -> Tensor:
        """Return the mean over all workers' heads, Float[1 B], from those of this worker's, Float[H B]."""
        return self.mesh.heads.all_reduce(agreements.sum(0, keepdim=True)) / self.config.heads

    def teacher_temperature(self, epoch: int) -> float:
        """Return τ_t: linear over the first epochs, then constant."""
        start, end = self.config.warmup_teacher_temperature, self.config.teacher_temperature
        length = self.config.warmup_teacher_temperature_epochs
        return end if epoch >= length - 1 else start + (end - start) * epoch / (length - 1)

    def teacher_momentum(self, step: int) -> float:
        """Return the momentum m after step number `step`: a cosine over the whole training."""
        c = self.config
        return cosine_schedule(c.teacher_momentum, c.final_teacher_momentum, step, self.plan.steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the last layer, frozen in the first epochs; the other matrices; and biases and norms without decay.

        The last layer's scale g decays with its directions, as published.
        All are stacked: heads are trained as if each were alone.
        """
        student, others = self.student, [*self.student.biases, *self.student.norms.parameters()]
        last = [parameter for parameter in (student.direction, student.scale) if parameter.requires_grad]
        return [
            {"params": last, "stacked": True, "frozen_epochs": self.config.freeze_last_layer},
            {"params": list(student.weights), "stacked": True},
            {"params": others, "stacked": True, "weight_decay": 0.0},
        ]

    def on_step_end(self, step: int) -> None:
        """Move the teacher towards the student."""
        self._momentum = self.teacher_momentum(step)
        ema_update(self.teacher, self.student, self._momentum)

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Keep the head with the lowest mean loss of this epoch, without labels; warn once if its clusters collapse."""
        c = self.config
        self.head_losses.copy_(metrics["head_loss"])
        self.best_head.copy_(self.head_losses.argmin())
        best = int(self.best_head)
        health = {"entropy": self.marginal.entropy(), "live": self.marginal.live()}
        health = self.gather_state({**health, "largest": self.marginal.shares.amax(1)})
        entropy, live, largest = health["entropy"], health["live"], health["largest"]
        collapsed = collapsed_heads(entropy, live, c.clusters)
        if bool(collapsed[best]) and not self._warned_of_collapse:
            self._warned_of_collapse = True
            lower = max(0.51, round(c.beta - BETA_STEP, 2))
            advice = (
                f"set method.beta below {c.beta:g}, such as {lower:g}: a lower β keeps clusters more even"
                if c.beta > lower and c.loss != "scan"
                else "lower method.learning_rate, or ask for fewer clusters"
            )
            logger.warning(
                "clusters collapse: head %d has %d live clusters of %d, entropy %.2f of %.2f, largest share %.0f %%; "
                "%s", best, int(live[best]), c.clusters, float(entropy[best]), math.log(c.clusters),
                100 * float(largest[best]), advice,
            )  # fmt: skip
        self.stop = self.stop or (bool(collapsed[best]) and c.stop_on_collapse)
        return {
            "teacher_momentum": self._momentum,
            "head_losses": self.head_losses.tolist(),
            "best_head": best,
            "head_entropies": entropy.tolist(),
            "head_live_clusters": live.tolist(),
            "head_largest_shares": largest.tolist(),
            "head_agreements": metrics["head_agreement"].tolist(),
            "collapsed_heads": int(collapsed.sum()),
            "collapsed": int(collapsed[best]),
            "marginal_entropy": float(entropy[best]),
            "live_clusters": int(live[best]),
            "largest_share": float(largest[best]),
            "agreement": float(metrics["head_agreement"][best]),
        }

    def gather_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of all heads; see `HeadParallel`. A loss is the sum of all heads'."""
        group, gathered = self.mesh.heads, {}
        for name, x in tensors.items():
            is_by_head = x.dim() > 0 and name not in WHOLE_STATE
            gathered[name] = group.all_gather_cat(x, self.config.heads) if is_by_head else x
            if name == "loss":
                gathered[name] = group.all_reduce(x)
        return gathered

    def shard_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this worker's heads of what `gather_state` gave; a loss stays with the first worker along `heads`."""
        if self.mesh.heads.size == 1:
            return tensors
        shards = {}
        for name, x in tensors.items():
            shards[name] = x[self._own_heads] if x.dim() and name not in WHOLE_STATE else x
            if name == "loss" and self.mesh.heads.rank:
                shards[name] = torch.zeros_like(x)
        return shards

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Return the teacher's best head's probabilities, in float32: Float[B D] to Float[B K], rows sum to 1."""
        require_matrix(x, "x", self.dimension)
        like = self.teacher.direction
        blocks = torch.split(x, PREDICT_ROWS)
        logits = [self.teacher(block.to(like), head=int(self.best_head))[0] for block in blocks]
        return log_probabilities(torch.cat(logits), self.config.teacher_temperature).exp()

    @torch.no_grad()
    def predict_heads(self, x: Tensor) -> Tensor:
        """Return the most probable cluster by each of the teacher's heads: Float[B D] to Int64[H B]."""
        require_matrix(x, "x", self.dimension)
        blocks, heads = torch.split(x.to(self.teacher.direction), PREDICT_ROWS), range(len(self.teacher.direction))
        return torch.stack([torch.cat([self.teacher(b, head=h)[0].argmax(1) for b in blocks]) for h in heads])

    def prototypes(self) -> Tensor:
        """Return the directions of the best head's last layer, with which the bottleneck's unit rows are compared."""
        return functional.normalize(self.teacher.direction[int(self.best_head)].detach(), dim=1)

    def state(self) -> MethodState:
        """Return the teacher's best head alone, or all of them with `keep_heads`."""
        settings = self._settings()
        del settings["config"]["components"]  # heads take rows again
        if self.config.keep_heads:
            kept = {name: x.detach().cpu().clone() for name, x in self.teacher.state_dict().items()}
            return MethodState(settings, kept | {"best_head": self.best_head.cpu().clone()})
        best = int(self.best_head)
        tensors = {name: x[best : best + 1].detach().cpu().clone() for name, x in self.teacher.state_dict().items()}
        tensors["best_head"] = torch.tensor(0)
        del settings["config"]["keep_heads"]  # a model of one head has the bytes that it had without this setting
        return MethodState({**settings, "config": {**settings["config"], "heads": 1}}, tensors)

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.best_head.copy_(tensors.pop("best_head"))
        self.teacher.load_state_dict(tensors)
        self.student.load_state_dict(tensors)
