"""TEMI, PMI and WMI for very many clusters: from unit rows and last layers, without the logits of a whole batch.

A *chunk* is some pairs of some heads. Its logits are made, used and forgotten or, for the teacher, kept where they fit.
The teacher goes first, because p̂ and the pairs' weights belong to all pairs and all heads. The student follows, and its
gradient is taken on the way forward, when its logits are there: what is kept until backward is as large as the weights.

A stack of workers may divide the clusters: each makes the logits of its own, in the same chunks as all others, whose
sums over clusters then go through all of them.

Source: arXiv 2303.17896, eq. 5, 6 and 8; the same values as losses/information.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rayclust.collectives import Team
from rayclust.kernels import pair_softmax
from rayclust.kernels.divided_softmax import ALONE
from rayclust.kernels.pair_softmax import Lesson, Taught, padded
from rayclust.kernels.weight_norm import scaled_rows, scaled_rows_backward

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 31}
"""Size of a chunk's logits, in their own dtype. A processor's passes make several float32 copies of them."""
KEPT_BYTES = {"cpu": 1 << 31, "cuda": 1 << 33}
"""Size of all chunks' logits of the teacher up to which they are kept for the student; above it they are made twice."""


@dataclass(frozen=True)
class LastLayer:
    """Where the logits of H heads come from: unit rows and weight-normalised last layers."""

    units: Tensor
    """Wide[H 2 B I], unit rows of both views of each pair."""
    direction: Tensor
    """Wide[H K I], of any length."""
    scale: Tensor
    """Wide[H K], g."""
    temperature: float
    """Divides the logits."""
    dtype: torch.dtype
    """Of matrix products and logits: BFloat16 or wide."""
    stack: Team = ALONE
    """Those who divide the clusters."""
    most_clusters: int = 0
    """The largest K of those workers, by which all of them cut their chunks; 0 where this one holds all clusters."""

    def weights(self, heads: slice) -> Tensor:
        """Narrow[h P I]: rows of length |g|/τ, filled up with zeros."""
        direction = self.direction[heads]
        room = direction.new_empty((len(direction), padded(direction.shape[1]), direction.shape[2]), dtype=self.dtype)
        return scaled_rows(direction, self.scale[heads], 1.0 / self.temperature, room)

    def rows(self, heads: slice, pairs: slice) -> Tensor:
        """Narrow[h 2·b I]."""
        return self.units[heads, :, pairs].to(self.dtype).flatten(1, 2)

    def logits(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Narrow[h 2 b P] of weights Narrow[h P I] and rows Narrow[h 2·b I]."""
        return torch.bmm(rows, weights.mT).view(len(rows), 2, -1, weights.shape[1])

    @property
    def pair_bytes(self) -> int:
        """Of a pair's logits under one head."""
        return 2 * padded(max(self.most_clusters, self.direction.shape[1])) * self.dtype.itemsize

    def chunks(self, most: int) -> tuple[list[slice], list[slice]]:
        """Heads and pairs such that no chunk's logits take more than `most` bytes, if that is possible."""
        heads, pairs = len(self.units), self.units.shape[2]
        fitting = max(1, most // self.pair_bytes)
        return _slices(heads, max(1, fitting // pairs)), _slices(pairs, fitting)


@dataclass(frozen=True)
class Teacher:
    """A teacher that has been asked about a batch."""

    layer: LastLayer
    taught: Taught
    kept: list[Tensor] | None
    """Its logits, chunk by chunk; None where they are to be made again."""
    most: int
    """Bytes of a chunk."""


@torch.no_grad()
def teach(layer: LastLayer, chunk_bytes: int | None = None, kept_bytes: int | None = None) -> Teacher:
    """Asks a teacher for what p̂, the pairs' weights and the student need to know.

    Args:
        layer: the teacher's.
        chunk_bytes: None takes `CHUNK_BYTES`.
        kept_bytes: None takes `KEPT_BYTES`.
    """
    device = layer.units.device.type
    most = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
    room = KEPT_BYTES.get(device, KEPT_BYTES["cuda"]) if kept_bytes is None else kept_bytes
    heads, _, pairs, _ = layer.units.shape
    clusters, new = layer.direction.shape[1], layer.units.new_zeros
    taught = Taught(new((heads, 2, pairs)), new((heads, pairs)), new((heads, clusters)))
    kept: list[Tensor] | None = [] if heads * pairs * layer.pair_bytes <= room else None
    every_head, every_pair = layer.chunks(most)
    for some in every_head:
        weights = layer.weights(some)
        for few in every_pair:
            logits = layer.logits(weights, layer.rows(some, few))
            part = pair_softmax.teach(logits, clusters, layer.stack)
            taught.normalizer[some, :, few] = part.normalizer
            taught.agreement[some, few] = part.agreement
            taught.sums[some] += part.sums
            if kept is not None:
                kept.append(logits)
    return Teacher(layer, taught, kept, most)


def information_losses(
    student: LastLayer, teacher: Teacher, log_marginal: Tensor, weights: Tensor, beta: float
) -> Tensor:
    """½·mean over pairs of w·(ℓ(b→a) + ℓ(a→b)) of each head, with gradient in the student's rows and last layers.

    Args:
        student: with gradient; its heads are the teacher's.
        teacher: what `teach` gave; its logits are used up.
        log_marginal: Wide[H K], ln p̂.
        weights: Wide[H B] or Wide[1 B], of the pairs.
        beta: the power on the product of probabilities.

    Returns:
        Wide[H], nats.

    Source: arXiv 2303.17896, eq. 8.
    """
    heads, _, pairs, _ = student.units.shape
    lesson = Lesson(teacher.taught.normalizer, log_marginal, weights.expand(heads, -1), beta, 1.0 / (2 * pairs))
    losses: Tensor = _ChunkedLosses.apply(student.units, student.direction, student.scale, student, teacher, lesson)
    return losses


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, units: Tensor, direction: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        student, teacher, lesson = rest
        losses = units.new_zeros(len(units))
        gradients = [torch.empty_like(x) for x in (units, direction, scale)] if any(ctx.needs_input_grad) else None
        ctx.gradients = gradients
        every_head, every_pair = student.chunks(teacher.most)
        for some in every_head:
            _learn(student, teacher, lesson, (some, every_pair), (losses, gradients))
        return losses

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        found = []
        for wanted, gradient in zip(ctx.needs_input_grad, ctx.gradients, strict=False):
            by_head = slopes[0].view(-1, *[1] * (gradient.dim() - 1))
            found.append(gradient.mul_(by_head) if wanted else None)
        ctx.gradients = None  # the factor is in them: a second time would be wrong
        return (*found, None, None, None)


def _learn(
    student: LastLayer,
    teacher: Teacher,
    lesson: Lesson,
    where: tuple[slice, list[slice]],
    out: tuple[Tensor, list[Tensor] | None],
) -> None:
    """Some heads' student forward and, where gradients are wanted, back."""
    (some, every_pair), (losses, gradients) = where, out
    weights = student.weights(some)
    taught_weights = weights if teacher.kept is not None else teacher.layer.weights(some)
    slopes: Tensor | None = None
    for few in every_pair:
        rows = student.rows(some, few)
        logits = student.logits(weights, rows)
        taught = _taught(teacher, taught_weights, some, few)
        own = Lesson(
            lesson.normalizer[some, :, few].contiguous(),
            lesson.log_marginal[some],
            lesson.weights[some, few],
            lesson.beta,
            lesson.scale,
        )
        part, found = pair_softmax.compare(logits, taught, own, student.stack)
        losses[some] += part
        if gradients is not None:
            pair_softmax.give_way(logits, taught, own, found)
            gradient = logits.flatten(1, 2)
            gradients[0][some, :, few] = torch.bmm(gradient, weights).view(len(rows), 2, -1, rows.shape[2]).to(losses)
            slope = torch.bmm(gradient.mT, rows)
            slopes = slope if slopes is None else slopes.to(losses).add_(slope)
    if gradients is not None and slopes is not None:
        last = student.direction[some], student.scale[some], 1.0 / student.temperature
        gradients[1][some], gradients[2][some] = scaled_rows_backward(slopes, *last)


def _taught(teacher: Teacher, weights: Tensor, some: slice, few: slice) -> Tensor:
    """The teacher's logits of a chunk, in the order in which it made them."""
    if teacher.kept is not None:
        return teacher.kept.pop(0)
    return teacher.layer.logits(weights, teacher.layer.rows(some, few))


def _slices(count: int, most: int) -> list[slice]:
    """As few stretches of at most `most` as there must be, of nearly one length."""
    parts = -(-count // most)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(low, high) for low, high in pairwise(bounds)]
