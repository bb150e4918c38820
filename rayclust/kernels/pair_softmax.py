"""Softmaxes of pairs and the information between them, over logits alone: no probability of a whole batch is stored.

Logits are Narrow[H 2 B P]: heads, the two views of a pair, pairs, and K clusters filled up to P columns, divided by
the temperature. *Narrow* is BFloat16, Float32 or Float64; *wide*, the dtype of all sums, Float32 or Float64. On a GPU
triton_softmax.py takes the place of the passes here, which are its plain twin. Whoever wants little memory hands over
few pairs or heads at a time: everything but `Taught.sums` belongs to single pairs, and those add up.

Where a stack of workers divides the clusters, K is this worker's, and what is summed over clusters is summed over all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from rayclust.collectives import Team
from rayclust.kernels.divided_softmax import ALONE, joined_agreement, joined_normalizer

ALIGNED = 64
"""Logits stand in rows of a multiple of this many columns, so that each row starts on a whole line of memory."""


@dataclass(frozen=True)
class Taught:
    """What the loss needs to know of a teacher's logits."""

    normalizer: Tensor
    """Wide[H 2 B], their log-sum-exp."""
    agreement: Tensor
    """Wide[H B], the probability that both views of a pair fall into one cluster."""
    sums: Tensor
    """Wide[H K], probabilities summed over views and pairs."""


@dataclass(frozen=True)
class Lesson:
    """What a student's logits are compared with."""

    normalizer: Tensor
    """Wide[H 2 B], of the teacher."""
    log_marginal: Tensor
    """Wide[H K], ln p̂."""
    weights: Tensor
    """Wide[H B], of the pairs; may be expanded over heads."""
    beta: float
    """Power on the product of probabilities."""
    scale: float
    """Of each view's part in the loss."""


@dataclass(frozen=True)
class Normalizers:
    """What the way forward leaves for the way back."""

    own: Tensor
    """Wide[H 2 B], log-sum-exp of the student's logits."""
    both: Tensor
    """Wide[H 2 B], log-sum-exp over clusters of β·(student + the teacher's other view) − ln p̂."""


def padded(clusters: int) -> int:
    """The columns in which logits of K clusters stand."""
    return -(-clusters // ALIGNED) * ALIGNED


def teach(logits: Tensor, clusters: int, stack: Team = ALONE) -> Taught:
    """One sweep over a teacher's logits for its softmax and the pairs' agreement, and one for the clusters' shares.

    Args:
        logits: Narrow[H 2 B P].
        clusters: K, at most P.
        stack: those who divide the clusters; all call this together.
    """
    fused = _fused(logits)
    if fused is not None:
        own, among = fused.normalize(logits, clusters)
        normalizer, agreement = joined_agreement(own, among, stack)
        return Taught(normalizer, agreement, fused.sum_shares(logits, normalizer, clusters))
    wide = _wide(logits[..., :clusters])
    own = torch.logsumexp(wide, dim=-1)
    probabilities = (wide - own[..., None]).exp_()
    normalizer, agreement = joined_agreement(own, (probabilities[:, 0] * probabilities[:, 1]).sum(-1), stack)
    if stack.size > 1:
        probabilities *= (own - normalizer).exp()[..., None]
    return Taught(normalizer, agreement, probabilities.sum((1, 2)))


def compare(student: Tensor, teacher: Tensor, lesson: Lesson, stack: Team = ALONE) -> tuple[Tensor, Normalizers]:
    """The way forward: weighted −PMI of each student's view with the teacher's other view.

    Args:
        student: Narrow[H 2 B P].
        teacher: Narrow[H 2 B P].
        lesson: what goes with them; K is that of its ln p̂.
        stack: those who divide the clusters; all call this together.

    Returns:
        Wide[H], scale·Σ over views and pairs of w·ℓ with ℓ = −ln Σ_c (q_s q_t)^β / p̂, and what `give_way` needs.

    Source: arXiv 2303.17896, eq. 5 and 8.
    """
    fused = _fused(student)
    if fused is not None:
        found: Normalizers = fused.compare(student, teacher, lesson)
    else:
        own = torch.logsumexp(_wide(student[..., : lesson.log_marginal.shape[1]]), dim=-1)
        found = Normalizers(own, torch.logsumexp(_joint(student, teacher, lesson), dim=-1))
    if stack.size > 1:
        found = Normalizers(*joined_normalizer(torch.stack([found.own, found.both]), stack))
    losses = lesson.beta * (found.own + lesson.normalizer.flip(1)) - found.both
    return lesson.scale * (lesson.weights[:, None] * losses).sum((1, 2)), found


def give_way(student: Tensor, teacher: Tensor, lesson: Lesson, found: Normalizers) -> None:
    """The way back: the student's logits give way to the gradient that `compare`'s result has in them.

    Args:
        student: Narrow[H 2 B P], overwritten; its filling becomes 0.
        teacher: Narrow[H 2 B P].
        lesson: as given to `compare`.
        found: what `compare` gave.

    Source: d(−PMI)/dz = β·(softmax(z) − softmax(β(z + z_t) − ln p̂)).
    """
    fused = _fused(student)
    if fused is not None:
        fused.give_way(student, teacher, lesson, found)
        return
    clusters = lesson.log_marginal.shape[1]
    own = (_wide(student[..., :clusters]) - found.own[..., None]).exp_()
    own -= (_joint(student, teacher, lesson) - found.both[..., None]).exp_()
    student[..., :clusters] = own.mul_((lesson.scale * lesson.beta) * lesson.weights[:, None, :, None])
    student[..., clusters:] = 0


def _joint(student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
    clusters = lesson.log_marginal.shape[1]
    joint = _wide(student[..., :clusters]) + teacher[..., :clusters].flip(1)
    return joint.mul_(lesson.beta).sub_(lesson.log_marginal[:, None, None])


def _wide(x: Tensor) -> Tensor:
    """A copy, Float32 or Float64."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)


def _fused(logits: Tensor) -> ModuleType | None:
    """The kernels, for logits on a GPU that they can take."""
    return _kernels() if logits.is_cuda and logits.dtype != torch.float64 else None


@lru_cache
def _kernels() -> ModuleType | None:
    try:
        from rayclust.kernels import triton_softmax
    except ImportError:  # torch without Triton
        return None
    return triton_softmax
