"""Softmax of one head's teacher, and loss and gradient of its student, from logits of Narrow[K R].

The two views of B rows stand side by side: row i in the columns i and R/2 + i, with padding behind the last row of
each view. Losses and formulas are those of losses/information.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayclust.kernels.heads import BLOCK
from rayclust.kernels.native import call


@dataclass(frozen=True)
class Logits:
    """Logits of one head over its temperature."""

    values: Tensor
    """Narrow[K R]; see kernels/heads.py."""
    bound: float
    """What no logit exceeds in size."""


def scratch(clusters: int) -> Tensor:
    """Room that the compiled functions below work in, one for each thread."""
    return torch.empty(2, clusters, BLOCK, dtype=torch.bfloat16)


def teacher_softmax(logits: Logits, room: Tensor, rows: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """What the loss needs to know of the teacher.

    Args:
        logits: of the teacher.
        room: from `scratch`.
        rows: B, without padding.
        out: written: log-sum-exp of each column, Wide[R]; Σ of the probabilities over rows and views, Wide[K];
            the probability that a row's views fall into one cluster, Wide[R/2], of padding undefined.
    """
    normalizer, sums, agreement = out
    values = logits.values
    narrow = values.dtype == torch.bfloat16
    if narrow and call("teacher_softmax", values, room, *out, float(logits.bound), rows, *values.shape):
        return
    wide = values.to(normalizer.dtype)
    torch.logsumexp(wide, dim=0, out=normalizer)
    probabilities = (wide - normalizer).exp_().view(len(wide), 2, -1)[..., :rows]
    torch.sum(probabilities, dim=(1, 2), out=sums)
    torch.sum(probabilities.prod(1), dim=0, out=agreement[:rows])


def information(
    student: Logits,
    teacher: Logits,
    room: Tensor,
    known: tuple[Tensor, Tensor, Tensor],
    beta: float,
    scale: float,
    loss: Tensor,
) -> None:
    """−scale·Σ over columns of weight·PMI into `loss`, Wide[1], and its gradient in place of the student's logits.

    Args:
        student: overwritten by the gradient.
        teacher: each student's column meets the teacher's column of the other view.
        room: from `scratch`.
        known: the teacher's log-sum-exp, Wide[R]; ln p̂, Wide[K]; weights, Wide[R/2], 0 for padding.
        beta: the power on the product of probabilities.
        scale: 1/(2B) for a mean over rows and views.
        loss: written.

    Source: arXiv 2303.17896, eq. 8; d(−PMI)/dz = β·(softmax(z) − softmax(β(z + z_t) − ln p̂)).
    """
    values, other = student.values, teacher.values
    normalizer, log_marginal, weights = known
    bounds = float(student.bound), float(teacher.bound)
    numbers = (float(scale), float(beta), *bounds)
    if values.dtype == torch.bfloat16 and call(
        "information", values, other, room, *known, loss, *numbers, *values.shape
    ):
        return
    wide = values.to(normalizer.dtype)
    half = wide.shape[1] // 2
    joint = beta * (wide + other.to(wide.dtype).roll(half, 1)) - log_marginal[:, None]
    own, both = torch.logsumexp(wide, 0), torch.logsumexp(joint, 0)
    doubled = weights.repeat(2) * scale
    torch.sum(doubled * (beta * (own + normalizer.roll(half)) - both), dim=0, keepdim=True, out=loss)
    values.copy_(doubled * beta * ((wide - own).exp_() - (joint - both).exp_()))
