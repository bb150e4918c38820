"""TEMI: heads on frozen embeddings, trained to agree on neighbours with their own moving averages.

Head h is Linear → GELU → … → Linear(bottleneck) → unit rows → a weight-normalised linear layer without bias, so that
logit_c = g_c · ⟨ŵ_c, x̂⟩ and |logit_c| ≤ |g_c|. The parameters of all heads are stacked along axis H: H small networks
side by side, in one set of matrix products.

Settings, presets and the division over workers are in `temi_settings.py`; where heads start, which is not the paper's,
in `temi_start.py`. Source: arXiv 2303.17896; the layout of the heads, its section 3.3, is arXiv 2104.14294's (DINO).
Departures from the published program are listed in docs/methods.md; the ones that change a number are the log space,
the kNN that never lists a row itself, and epochs below 30.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.kernels.screening import accum_dtype
from rayclust.losses.information import (
    InformationOptions,
    LastLayer,
    Marginal,
    information_losses,
    log_probabilities,
)
from rayclust.methods.base import BaseTrainer, Batch, Method, MethodState, Pairing, Rows
from rayclust.methods.layers import StackedNorm, ema_update, matmul_dtype, stacked_affine
from rayclust.methods.settings import Plan, Precision, cosine_schedule
from rayclust.methods.temi_settings import HeadShape, TemiConfig

logger = logging.getLogger(__name__)

PREDICT_ROWS = 8192
"""Rows whose hidden units are held at once in `predict_proba`."""
COLLAPSE_ENTROPY = 0.5
"""Part of ln K below which the entropy of a head's shares is a sign of collapse."""
BETA_STEP = 0.1
"""Difference between β and the lower one that a warning of collapse proposes."""
WHOLE_STATE = ("best_head", "head_losses", "basis")
"""Tensors of the state that every worker holds whole, whatever heads it trains."""


class Heads(nn.Module):
    """H heads with stacked parameters.

    Args:
        shape: sizes and parts.
        seed: of the initial weights; head h gets the same ones whatever H is.
        precision: of the matrix products in training; see `matmul_dtype`.
    """

    def __init__(self, shape: HeadShape, seed: int, precision: Precision = "auto") -> None:
        super().__init__()
        self.shape, self.precision = shape, precision
        pairs = list(zip(shape.widths, shape.widths[1:], strict=False))
        self.weights = nn.ParameterList(torch.empty(shape.heads, o, i) for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(shape.heads, o) for _, o in pairs)
        norms = [StackedNorm(shape.heads, shape.hidden) for _ in pairs[1:]] if shape.batch_norm else []
        self.norms = nn.ModuleList(norms)
        self.direction = nn.Parameter(torch.empty(shape.heads, shape.clusters, shape.bottleneck))
        self.scale = nn.Parameter(torch.ones(shape.heads, shape.clusters), requires_grad=shape.learn_scale)
        bound = 1.0 / math.sqrt(shape.bottleneck)
        with torch.no_grad():
            for head in range(shape.heads):
                generator = torch.Generator().manual_seed((seed * 1_000_003 + shape.first + head) % 2**63)
                for weight in self.weights:
                    nn.init.trunc_normal_(weight[head], std=0.02, a=-2.0, b=2.0, generator=generator)
                nn.init.uniform_(self.direction[head], -bound, bound, generator=generator)

    def forward(self, x: Tensor, training: bool = False, head: int | None = None) -> Tensor:
        """Return logits, before any temperature.

        Args:
            x: Float[R D].
            training: whether dropout drops and batch norm looks at the batch.
            head: the only head to evaluate; None evaluates all.

        Returns:
            Float[H R K], or Float[1 R K] for one head. Their dtype is that of the products.

        Raises:
            ShapeError: `x` is not a matrix of width D.
        """
        heads = slice(None) if head is None else slice(head, head + 1)
        bottleneck, dtype = self._bottleneck(x, training, heads)
        last = functional.normalize(self.direction[heads], dim=-1) * self.scale[heads, :, None]
        return stacked_affine(bottleneck, last, None, dtype)

    def last_layer(self, x: Tensor, temperature: float) -> LastLayer:
        """Return the inputs and weights of the training logits, which are not computed yet.

        Args:
            x: Float[V B D], all views.
            temperature: divides the logits.
        """
        bottleneck, dtype = self._bottleneck(x.flatten(0, 1), True, slice(None))
        units = bottleneck.view(len(bottleneck), len(x), -1, bottleneck.shape[2])
        return LastLayer(units, self.direction, self.scale, temperature, dtype)

    def _bottleneck(self, x: Tensor, training: bool, heads: slice) -> tuple[Tensor, torch.dtype]:
        """Return unit rows, Float[H R 256] in float32 or wider, and the dtype of the products."""
        require_matrix(x, "x", self.shape.dimension)
        dtype = matmul_dtype(self.precision, x) if training else x.dtype
        x = self.hidden(x, training, heads, dtype)
        x = stacked_affine(x, self.weights[-1][heads], self.biases[-1][heads], dtype)
        if self.shape.final_gelu:
            x = functional.gelu(x)
        return functional.normalize(x.to(accum_dtype(dtype)), dim=-1), dtype

    def hidden(
        self, x: Tensor, training: bool = False, heads: slice = slice(None), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Apply all layers before the bottleneck's: linear, batch norm if any, GELU, dropout if any.

        Returns:
            Float[H R 512] for Float[R D], in `dtype` or as the rows; where there are no such layers, the rows.
        """
        dtype = dtype or x.dtype
        for layer in range(len(self.weights) - 1):
            x = stacked_affine(x, self.weights[layer][heads], self.biases[layer][heads], dtype)
            if self.shape.batch_norm:
                x = self.norms[layer](x.to(accum_dtype(x.dtype)), training, heads).to(x.dtype)
            x = functional.gelu(x)
            if self.shape.dropout:
                x = functional.dropout(x, self.shape.dropout, training)
        return x


class Temi(Method):
    """TEMI on rows of width `dimension`.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights.

    `temi_start.StartedTemi`, for which the method's name stands, reads `warm_start`, `components` and `selection` too.
    """

    config_type = TemiConfig
    config: TemiConfig
    best_head: Tensor
    head_losses: Tensor
    basis: Tensor | None
    """Float[D P], axes along which heads are trained; None: the rows'."""

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
        """Take the plan's steps from random heads; then every worker holds all heads."""
        self.train_heads(rows, trainer)

    def train_heads(self, rows: Rows, trainer: BaseTrainer, start: Callable[[], None] | None = None) -> None:
        """Take the plan's steps, after `start` where they are the first; then every worker holds all heads."""
        with distributed.data_parallel(self.mesh.data):
            trainer.fit(self, rows, start=start)
        if self.mesh.heads.size > 1:
            state = self.gather_state(self.state_dict())
            self._build_heads(distributed.DeviceMesh(data=distributed.world()))
            self.load_state_dict(state)

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
        """Move the teacher towards the student, by a momentum m that follows a cosine over the whole training."""
        c = self.config
        self._momentum = cosine_schedule(c.teacher_momentum, c.final_teacher_momentum, step, self.plan.steps)
        ema_update(self.teacher, self.student, self._momentum)

    def on_epoch_end(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Keep the head with the lowest mean loss of this epoch, without labels; warn once if its clusters collapse."""
        c = self.config
        self.head_losses.copy_(metrics["head_loss"])
        self.best_head.copy_(self.head_losses.argmin())
        best = int(self.best_head)
        # 1. Of the clusters' shares: entropy, clusters with more than a tenth of an even share, and the largest.
        shares = self.marginal.shares
        health = {"entropy": torch.special.entr(shares).sum(1), "live": (shares > 0.1 / c.clusters).sum(1)}
        health = self.gather_state({**health, "largest": shares.amax(1)})
        entropy, live, largest = health["entropy"], health["live"], health["largest"]
        # 2. Heads that have put most rows into few clusters. Low entropy alone is no collapse, since classes may be of
        # very different size: half of the clusters must be dead as well.
        collapsed = (entropy < COLLAPSE_ENTROPY * math.log(c.clusters)) & (2 * live <= c.clusters)
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
        config, best, kept = self.config.model_dump(mode="json"), self.best_head.cpu().clone(), slice(None)
        del config["components"]  # heads take rows again
        if not self.config.keep_heads:
            kept, best = slice(int(best), int(best) + 1), torch.tensor(0)
            del config["keep_heads"]  # a model of one head has the bytes that it had without this setting
            config["heads"] = 1
        tensors = {name: x[kept].detach().cpu().clone() for name, x in self.teacher.state_dict().items()}
        settings = {"config": config, "dimension": self.dimension, "count": self.count}
        return MethodState(settings, tensors | {"best_head": best})

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load a state, whose heads are both teacher and student."""
        self.best_head.copy_(tensors.pop("best_head"))
        self.teacher.load_state_dict(tensors)
        self.student.load_state_dict(tensors)
