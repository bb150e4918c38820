"""Softmaxes over clusters that a stack of workers divides: sums over clusters go through all of them, logits never.

A worker's logits are those of its own clusters. What is sent is one number for each row: the log-sum-exp over the
clusters of each, from which every worker makes the one over all, in one order and to the same bits. Losses are then
held by every worker, and each takes the gradient in its own logits. With a team of one all of this is torch's own.

Source: arXiv 1909.08053, section 3, the parallel cross entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.collectives import Team

ALONE = Team()
"""One worker that holds all clusters."""


def joined_normalizer(own: Tensor, stack: Team) -> Tensor:
    """Log-sum-exp over all clusters, without gradient.

    Args:
        own: Wide[...], that over this worker's clusters; of one shape on all workers.
        stack: those who divide the clusters.

    Returns:
        Wide[...], the same bits on every worker.
    """
    return own if stack.size == 1 else torch.logsumexp(stack.gathered(own), dim=0)


def joined_agreement(normalizers: Tensor, agreement: Tensor, stack: Team) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and the pairs' agreement over all clusters, in one exchange; without gradient.

    Args:
        normalizers: Wide[H 2 B], log-sum-exps over this worker's clusters.
        agreement: Wide[H B], Σ_c of the products of both views' probabilities *among this worker's clusters*.
        stack: those who divide the clusters.

    Returns:
        Wide[H 2 B] and Wide[H B], the same bits on every worker.
    """
    if stack.size == 1:
        return normalizers, agreement
    told = stack.gathered(torch.cat([normalizers, agreement[:, None]], dim=1))
    whole = torch.logsumexp(told[:, :, :2], dim=0)
    shares = (told[:, :, :2] - whole).sum(2).exp()  # of each worker's clusters in both views, multiplied
    return whole, (told[:, :, 2] * shares).sum(0)


def logsumexp(x: Tensor, stack: Team = ALONE) -> Tensor:
    """Log-sum-exp over the last axis and over all workers' clusters, with gradient in this worker's.

    Args:
        x: Wide[... K], K this worker's clusters; the other axes are the same on all workers.
        stack: those who divide the clusters.

    Returns:
        Wide[...], the same bits on every worker; each must make the same use of it.
    """
    if stack.size == 1:
        return torch.logsumexp(x, dim=-1)
    result: Tensor = _LogSumExp.apply(x, stack)
    return result


def log_softmax(x: Tensor, stack: Team = ALONE) -> Tensor:
    """The logarithm of the softmax over the last axis and over all workers' clusters, with gradient.

    Args:
        x: Wide[... K], as in `logsumexp`.
        stack: those who divide the clusters.

    Returns:
        Wide[... K], of this worker's clusters.
    """
    if stack.size == 1:
        return functional.log_softmax(x, dim=-1)
    return x - stack.spread(logsumexp(x, stack))[..., None]


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Team) -> Tensor:
        whole = joined_normalizer(torch.logsumexp(x, dim=-1), stack)
        ctx.save_for_backward(x, whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, whole = ctx.saved_tensors
        return (x - whole[..., None]).exp() * grads[0][..., None], None
