"""Workers with some clusters each have the values and gradients of one with all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rayclust.collectives import everyone, stretches
from rayclust.kernels.divided_softmax import joined_agreement, joined_normalizer, log_softmax, logsumexp
from tests.workers import on_workers

ROWS, K = 5, 7
SPREADS = (0.0, 1.0, 30.0, 1e4)
"""Standard deviation of the logits, which says how far apart workers' largest ones are."""


def _logits(spread: float) -> Tensor:
    return spread * torch.randn(3, 2, ROWS, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _found(rank: int, world: int) -> list[list[Tensor]]:
    """For each spread: log-sum-exps, log-softmax of this worker's clusters, gradient of a loss that uses both."""
    stack, some = everyone(), stretches(K, world)[rank]
    slopes = torch.randn(3, 2, ROWS, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    told = []
    for spread in SPREADS:
        x = _logits(spread)[..., some].requires_grad_()
        whole, logs = logsumexp(x, stack), log_softmax(x, stack)
        loss = stack.total((slopes[..., some] * logs).sum()) + (whole * slopes[..., 0]).sum()
        loss.backward()
        assert x.grad is not None
        own = torch.logsumexp(x.detach(), dim=-1)
        among = (x.detach() - own[..., None]).exp()
        joined = joined_agreement(own, (among[:, 0] * among[:, 1]).sum(-1), stack)
        told.append([loss.detach(), whole.detach(), logs.detach(), x.grad, joined_normalizer(own, stack), *joined])
    return told


def test_three_workers_have_the_values_and_gradients_of_one():
    expected = _found(0, 1)
    workers = on_workers(3, _found)
    for place, wanted in enumerate(expected):
        parts = [worker[place] for worker in workers]
        for number, value in enumerate(wanted):
            if number in (2, 3):
                together = torch.cat([part[number] for part in parts], dim=-1)
                torch.testing.assert_close(together, value, rtol=1e-10, atol=1e-12)
            else:
                assert all(part[number].equal(parts[0][number]) for part in parts), "workers differ"
                torch.testing.assert_close(parts[0][number], value, rtol=1e-10, atol=1e-12)


def test_alone_they_are_torchs_own():
    x = _logits(1.0)
    assert logsumexp(x).equal(torch.logsumexp(x, dim=-1))
    assert log_softmax(x).equal(torch.log_softmax(x, dim=-1))
    assert logsumexp(torch.zeros(2, 4)).tolist() == pytest.approx([math.log(4)] * 2)
