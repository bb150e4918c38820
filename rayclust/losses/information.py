"""Clustering losses on the information that one view of a row carries about another: TEMI, PMI, WMI and SCAN.

Axes are H V B K: heads, views of a row, rows of the batch, clusters. View 0 is the row, view 1 its neighbour (of more
views half belong to each); a student's view is only compared with the teacher's *other* views. Everything stays in log
space, so that a pair that confidently disagrees costs a large number and not an infinite one.

Losses start from unit rows and last layers, not from logits: where logits of a whole batch would be many, they are made
in chunks of some rows of some heads, used, and discarded (the teacher's are kept for the student where they fit). The
teacher goes first, because p̂ and the weights of pairs depend on all rows and heads. The student's gradient is computed
in the forward pass, while its logits exist: what is kept until backward is as large as rows and weights.

Source: arXiv 2303.17896 (TEMI, PMI, WMI), arXiv 2005.12320 (SCAN).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.distributed import all_reduce, differentiable_all_reduce, even_slices
from rayclust.kernels import pair_softmax
from rayclust.kernels.pair_softmax import PairLossInputs, TeacherStats, padded_columns
from rayclust.kernels.screening import accum_dtype
from rayclust.kernels.weight_norm import scaled_rows, scaled_rows_backward

LossName = Literal["temi", "pmi", "wmi", "scan"]
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
"""Size of a chunk's logits in their own dtype, by type of device. On a CPU several float32 copies of them are made."""
KEPT_BYTES = {"cpu": 1 << 31, "cuda": 1 << 33}
"""Size of the teacher's logits of a batch up to which they are kept for the student; above it they are made twice."""


@dataclass(frozen=True)
class InformationOptions:
    """Which loss, and its parameters."""

    loss: LossName = "temi"
    """temi: pairs weighted by the agreement of all heads. wmi: by each head's own. pmi: all alike. scan: SCAN's."""
    beta: float = 0.6
    """Power on the product of two views' probabilities, above 0. Above 0.5 confident assignments stay best, below 1 the
    uniform answer beats a collapse into one cluster. SCAN has none."""
    positive_pmi: bool = False
    """Whether a pair's information is cut off at 0 from below, so that disagreeing pairs cost nothing more."""
    entropy_weight: float = 0.0
    """α, the reward on entropy. WMI: the mean entropy of the rows. SCAN: the entropy of the mean student."""
    mean_agreement: Callable[[Tensor], Tensor] = lambda agreement: agreement.mean(0, keepdim=True)
    """The mean over all heads, Float[1 B], of agreement Float[H B]; another one where workers hold different heads."""


@dataclass(frozen=True)
class LastLayer:
    """Unit rows and weight-normalised last layers, from which the logits of H heads are made."""

    units: Tensor
    """Accum[H V B I], unit rows of each view."""
    direction: Tensor
    """Accum[H K I], of any length."""
    scale: Tensor
    """Accum[H K], g."""
    temperature: float
    """Divides the logits."""
    dtype: torch.dtype
    """Of matrix products and logits: bfloat16, float32 or float64."""

    @property
    def row_bytes(self) -> int:
        """Size of the logits of all views of a row under one head."""
        columns = padded_columns(self.direction.shape[1], self.direction.device.type)
        return self.units.shape[1] * columns * self.dtype.itemsize

    def weights(self, heads: slice) -> Tensor:
        """Return Compute[h P I], rows of length |g|/τ padded with zeros."""
        direction = self.direction[heads]
        columns = padded_columns(direction.shape[1], direction.device.type)
        out = direction.new_empty((len(direction), columns, direction.shape[2]), dtype=self.dtype)
        return scaled_rows(direction, self.scale[heads], 1.0 / self.temperature, out)

    def logits(self, weights: Tensor, heads: slice = slice(None), rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the logits of a chunk, Compute[h V b P], by weights Compute[h P I], and its rows, Compute[h V·b I]."""
        units = self.units[heads, :, rows].to(self.dtype).flatten(1, 2)
        return torch.bmm(units, weights.mT).view(len(units), self.units.shape[1], -1, weights.shape[1]), units

    def chunks(self, max_bytes: int) -> tuple[list[slice], list[slice]]:
        """Return slices of heads and of rows such that logits of one of each take at most `max_bytes` if possible."""
        heads, _, rows, _ = self.units.shape
        fitting = max(1, max_bytes // self.row_bytes)
        return even_slices(heads, -(-heads // max(1, fitting // rows))), even_slices(rows, -(-rows // fitting))


class Marginal(nn.Module):
    """p̂, the running share of each cluster under the teacher, for H heads.

    p̂ ← m·p̂ + (1−m)·mean of the teacher's probabilities over all rows and views of all workers; starts even; carries no
    gradient. A loss of a step uses p̂ *after* that step's update.

    Args:
        heads: H.
        clusters: K.
        momentum: m.

    Source: arXiv 2303.17896, section 3.2.
    """

    shares: Tensor

    def __init__(self, heads: int, clusters: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("shares", torch.full((heads, clusters), 1.0 / clusters))

    @torch.no_grad()
    def update(self, sums: Tensor, rows: int) -> Tensor:
        """Update the running shares with a batch and return ln p̂.

        Args:
            sums: Float[H K], the teacher's probabilities summed over this worker's rows and views.
            rows: how many were summed.

        Returns:
            Float[H K], ln p̂; the same bits on every worker. The share of a dead cluster counts as the smallest normal
            number.
        """
        total = all_reduce(torch.cat([sums.flatten(), sums.new_full((1,), float(rows))]))
        mean = (total[:-1] / total[-1]).view_as(sums)
        self.shares.lerp_(mean.to(self.shares.dtype), 1.0 - self.momentum)
        return self.shares.clamp(min=torch.finfo(self.shares.dtype).tiny).log()


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the logarithm of softmax(logits / temperature), in float32 or wider whatever came in.

    Args:
        logits: Float[... K].
        temperature: above 0.

    Returns:
        Float[... K]; float64 for float64 input, else float32.
    """
    return functional.log_softmax(logits.to(accum_dtype(logits.dtype)) / temperature, dim=-1)


def information_losses(
    student: LastLayer, teacher: LastLayer, marginal: Marginal, options: InformationOptions
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each head on a batch, and update p̂ with it.

    - TEMI, PMI, WMI: mean over rows of w·ℓ, ℓ the mean over ordered pairs of different views of
      −ln Σ_c (q_s q_t)^β / p̂. The mean is over rows, not divided by Σ w. WMI adds α·mean Σ_c q_s ln q_s.
    - SCAN: ℓ with β = 1 and without p̂, plus α·mean over views of Σ_c p̄(c) ln p̄(c), p̄ the mean student of the batch of
      *all* workers, through which the gradient goes: a sum over each worker's rows would be another loss for each
      number of workers.

    Args:
        student: with gradient.
        teacher: of the same rows and heads; no gradient goes into it.
        marginal: p̂ of these heads.
        options: which loss, and its parameters.

    Returns:
        Float[H], nats, differentiable in the student's rows, directions and scales; and the teacher's agreement
        Float[H B] in [0, 1].

    Source: arXiv 2303.17896, eq. 5 (PMI), 6 (WMI), 8 (TEMI); arXiv 2005.12320, eq. 2 (SCAN), with the teacher in place
    of the second student.
    """
    heads, views, rows, _ = student.units.shape
    with torch.no_grad():
        teacher_outputs = _teacher_forward(teacher)
        log_marginal = marginal.update(teacher_outputs.stats.sums, views * rows).to(teacher_outputs.stats.sums)
        agreement = teacher_outputs.stats.agreement.clamp(max=1.0)
        weights, beta = torch.ones_like(agreement), options.beta
        if options.loss == "temi":
            weights = options.mean_agreement(agreement).expand(heads, -1)
        elif options.loss == "wmi":
            weights = agreement
        elif options.loss == "scan":  # −ln Σ_c q_s q_t is −PMI with β = 1 and p̂ = 1
            beta, log_marginal = 1.0, torch.zeros_like(log_marginal)
    positive = options.positive_pmi and options.loss != "scan"
    scale = 1.0 / (views * (views - 1) * rows)
    inputs = PairLossInputs(teacher_outputs.stats.normalizer, log_marginal, weights, beta, scale, positive)
    losses: Tensor = _PairLosses.apply(
        student.units, student.direction, student.scale, student, teacher_outputs, inputs
    )
    if options.entropy_weight and options.loss in ("wmi", "scan"):
        # Of the whole batch at once, Accum[H V B K], with gradient in rows and layers.
        lengths = (student.scale / student.temperature)[..., None]
        whole = functional.normalize(student.direction, dim=-1) * lengths
        log_q = log_probabilities(student.logits(whole.to(student.dtype))[0], 1.0)
        if options.loss == "wmi":
            negative_entropy = (log_q.exp() * log_q).sum(-1).mean((1, 2))
        else:
            count = all_reduce(torch.tensor(float(rows), dtype=log_q.dtype, device=log_q.device))
            mean = differentiable_all_reduce(log_q.exp().sum(2)) / count
            negative_entropy = (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum(-1).mean(1)
        losses = losses + options.entropy_weight * negative_entropy
    return losses, agreement


@dataclass(frozen=True)
class _TeacherPass:
    """A teacher's forward pass over a batch."""

    layer: LastLayer
    stats: TeacherStats
    logits: list[Tensor] | None
    """By chunk, in the order in which they were made; None where they are too large to keep."""
    chunk_bytes: int


def _teacher_forward(teacher: LastLayer) -> _TeacherPass:
    device = teacher.units.device.type
    chunk_bytes, kept_bytes = (sizes.get(device, sizes["cuda"]) for sizes in (CHUNK_BYTES, KEPT_BYTES))
    heads, views, rows, _ = teacher.units.shape
    clusters, new = teacher.direction.shape[1], teacher.units.new_zeros
    stats = TeacherStats(new((heads, views, rows)), new((heads, rows)), new((heads, clusters)))
    kept: list[Tensor] | None = [] if heads * rows * teacher.row_bytes <= kept_bytes else None
    head_slices, row_slices = teacher.chunks(chunk_bytes)
    for some_heads in head_slices:
        weights = teacher.weights(some_heads)
        for some_rows in row_slices:
            logits, _ = teacher.logits(weights, some_heads, some_rows)
            part = pair_softmax.teacher_forward(logits, clusters)
            stats.normalizer[some_heads, :, some_rows] = part.normalizer
            stats.agreement[some_heads, some_rows] = part.agreement
            stats.sums[some_heads] += part.sums
            if kept is not None:
                kept.append(logits)
    return _TeacherPass(teacher, stats, kept, chunk_bytes)


class _PairLosses(torch.autograd.Function):
    """Weighted −PMI of each head, chunk by chunk, with the gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        units: Tensor,
        direction: Tensor,
        scale: Tensor,
        student: LastLayer,
        teacher_outputs: _TeacherPass,
        inputs: PairLossInputs,
    ) -> Tensor:
        losses, wants = units.new_zeros(len(units)), any(ctx.needs_input_grad)
        by_units, by_direction, by_scale = (torch.empty_like(x) if wants else x for x in (units, direction, scale))
        head_slices, row_slices = student.chunks(teacher_outputs.chunk_bytes)
        for heads in head_slices:
            weights = student.weights(heads)
            teacher_weights = teacher_outputs.layer.weights(heads) if teacher_outputs.logits is None else weights
            slopes: Tensor | None = None
            for some_rows in row_slices:
                logits, rows = student.logits(weights, heads, some_rows)
                if teacher_outputs.logits is None:
                    targets, _ = teacher_outputs.layer.logits(teacher_weights, heads, some_rows)
                else:
                    targets = teacher_outputs.logits.pop(0)
                part = replace(
                    inputs,
                    normalizer=inputs.normalizer[heads, :, some_rows].contiguous(),
                    log_marginal=inputs.log_marginal[heads],
                    weights=inputs.weights[heads, some_rows],
                )
                losses[heads] += pair_softmax.student_forward_backward(logits, targets, part, wants)
                if wants:  # the logits are now their gradient
                    gradient = logits.flatten(1, 2)
                    by_rows = torch.bmm(gradient, weights)
                    by_units[heads, :, some_rows] = by_rows.view(*logits.shape[:3], -1).to(losses.dtype)
                    slope = torch.bmm(gradient.mT, rows)
                    slopes = slope if slopes is None else slopes.to(losses.dtype).add_(slope)
            if slopes is not None:
                by_direction[heads], by_scale[heads] = scaled_rows_backward(
                    slopes, student.direction[heads], student.scale[heads], 1.0 / student.temperature
                )
        ctx.gradients = (by_units, by_direction, by_scale) if wants else None
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place below: a second backward would be wrong
        scaled = [
            gradient.mul_(grads[0].view(-1, *[1] * (gradient.dim() - 1))) if wanted else None
            for wanted, gradient in zip(ctx.needs_input_grad, gradients, strict=False)
        ]
        return (*scaled, None, None, None)
