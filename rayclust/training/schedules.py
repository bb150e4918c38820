"""Learning rate and weight decay as functions of the step."""

from __future__ import annotations

from rayclust.methods.base import Plan, TrainedConfig
from rayclust.methods.ema import cosine

RATE_ROWS = 256
"""Rows of batch that a learning rate is given for."""


def learning_rate(config: TrainedConfig, plan: Plan, step: int) -> float:
    """Linear from 0 to the peak over the warm-up, which its last step reaches; then a cosine to the minimum.

    Args:
        config: peak and minimum, per 256 rows.
        plan: batch size, warm-up and length.
        step: from 0; the first step of a warm-up has rate 0.

    Source: arXiv 1706.02677 for the scaling by the batch and the warm-up.
    """
    scale = plan.batch_size / RATE_ROWS
    peak, end = config.learning_rate * scale, config.min_learning_rate * scale
    if step < plan.warmup_steps:
        return peak * step / max(plan.warmup_steps - 1, 1)
    return cosine(peak, end, step - plan.warmup_steps, plan.steps - plan.warmup_steps)


def weight_decay(config: TrainedConfig, plan: Plan, step: int) -> float:
    """A cosine from the decay at the start to the one at the end."""
    return cosine(config.weight_decay, config.final_weight_decay, step, plan.steps)
