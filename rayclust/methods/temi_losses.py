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
    logits = method.student.shape.heads * views * rows * config.clusters
    return adds_up and not config.positive_pmi and views == 2 and logits >= LEAST_LOGITS


def whole(method: Temi, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each head's loss, Float[H], and how far each trusts each pair, Float[H B]."""
    views = len(batch.views)
    stacked = batch.views.flatten(0, 1)
    with torch.no_grad():
        temperature = method.teacher_temperature(batch.epoch)
        teacher = _log_probabilities(method.teacher, stacked, temperature, views)
        log_marginal, trust = method.marginal.update(teacher), agreement(teacher)
    student = _log_probabilities(method.student, stacked, method.config.student_temperature, views)
    return LOSSES[method.config.loss](student, teacher, log_marginal, method.loss_options(), trust), trust


def _log_probabilities(heads: Heads, x: Tensor, temperature: float, views: int) -> Tensor:
    """Float[H V B K] of stacked views, Float[V·B D]."""
    stacked = log_probabilities(heads(x, training=True), temperature)
    return stacked.view(len(stacked), views, -1, stacked.shape[2])


def in_chunks(method: Temi, batch: Batch) -> tuple[Tensor, Tensor]:
    """As `whole`, without all logits at once."""
    config, options = method.config, method.loss_options()
    with torch.no_grad():
        layer = method.teacher.last_layer(batch.views, method.teacher_temperature(batch.epoch))
        teacher = chunked.teach(layer)
        taught = teacher.taught
        log_marginal = method.marginal.take_in(taught.sums, 2 * batch.views.shape[1]).to(taught.sums)
        trust = taught.agreement.clamp(max=1.0)
        weights = options.pool(trust) if config.loss == "temi" else trust
        if config.loss == "pmi":
            weights = torch.ones_like(trust)
    student = method.student.last_layer(batch.views, config.student_temperature)
    return chunked.information_losses(student, teacher, log_marginal, weights, options.beta), trust
