"""The losses of TEMI's heads on a batch: from all logits at once, or chunk by chunk where they would be too many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rayclust.losses import chunked
from rayclust.losses.information import LOSSES, agreement, log_probabilities
from rayclust.methods.base import Batch
from rayclust.methods.heads import Heads

if TYPE_CHECKING:
    from rayclust.methods.temi import Temi

LEAST_LOGITS = 1 << 26
"""Logits of a batch, all heads and views together, from which they are made in chunks."""


def goes_in_chunks(method: Temi, batch: Batch) -> bool:
    """Whether a batch has so many logits, and the loss is one that adds up over chunks."""
    config, (views, rows, _) = method.config, batch.views.shape
    adds_up = config.loss in ("temi", "pmi") or (config.loss == "wmi" and not config.entropy_weight)
    clusters = -(-config.clusters // method.grid.stack.size)  # of the largest part, so that all take the same way
    logits = method.student.shape.heads * views * rows * clusters
    return adds_up and not config.positive_pmi and views == 2 and logits >= LEAST_LOGITS


def whole(method: Temi, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each head's loss, Float[H], and how far each trusts each pair, Float[H B]."""
    config, stack, stacked = method.config, method.grid.stack, batch.views.flatten(0, 1)

    def answers(heads: Heads, temperature: float) -> Tensor:
        """Log-probabilities Float[H V B K]."""
        found = log_probabilities(heads(stacked, training=True, stack=stack), temperature, stack)
        return found.view(len(found), len(batch.views), -1, found.shape[2])

    with torch.no_grad():
        teacher = answers(method.teacher, method.teacher_temperature(batch.epoch))
        log_marginal, trust = method.marginal.update(teacher), agreement(teacher, stack)
    student = answers(method.student, config.student_temperature)
    return LOSSES[config.loss](student, teacher, log_marginal, method.loss_options(), trust), trust


def in_chunks(method: Temi, batch: Batch) -> tuple[Tensor, Tensor]:
    """As `whole`, without all logits at once."""
    config, options, stack = method.config, method.loss_options(), method.grid.stack
    with torch.no_grad():
        layer = method.teacher.last_layer(batch.views, method.teacher_temperature(batch.epoch), stack)
        teacher = chunked.teach(layer)
        taught = teacher.taught
        log_marginal = method.marginal.take_in(taught.sums, 2 * batch.views.shape[1]).to(taught.sums)
        trust = taught.agreement.clamp(max=1.0)
        weights = options.pool(trust) if config.loss == "temi" else trust
        if config.loss == "pmi":
            weights = torch.ones_like(trust)
    student = method.student.last_layer(batch.views, config.student_temperature, stack)
    return chunked.information_losses(student, teacher, log_marginal, weights, options.beta), trust
