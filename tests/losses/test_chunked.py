from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayclust.collectives import Team, everyone, sharing_rows, stretches
from rayclust.losses import chunked, information
from rayclust.losses.chunked import LastLayer, information_losses, teach
from rayclust.losses.information import InformationOptions, Marginal, agreement, log_probabilities
from rayclust.methods.heads import Heads, HeadShape
from tests.workers import on_two_workers

H, B, D, K, BETA = 3, 11, 6, 70, 0.6
SMALL = 4 * 2 * 128 * 8  # four pairs of one head in float64


def _heads(seed: int, dtype: torch.dtype) -> Heads:
    precision = "bf16" if dtype == torch.bfloat16 else "auto"
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    shape = HeadShape(heads=H, dimension=D, clusters=K, hidden=8, bottleneck=5)
    heads = Heads(shape, seed=0, precision=precision if dtype == torch.bfloat16 else "fp32").to(wide)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return heads


def _views(dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(2, B, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return drawn.to(torch.float32 if dtype == torch.bfloat16 else dtype)


def _plain(student: Heads, teacher: Heads, views: Tensor) -> Tensor:
    taught, learnt = (
        log_probabilities(heads(views.flatten(0, 1), training=True), 0.4).view(H, 2, B, K)
        for heads in (teacher, student)
    )
    log_marginal = Marginal(H, K).to(taught.dtype).update(taught.detach())
    return information.temi(learnt, taught.detach(), log_marginal, InformationOptions(BETA))


def _chunked(student: Heads, teacher: Heads, views: Tensor, chunk: int, kept: int) -> Tensor:
    asked = teach(teacher.last_layer(views, 0.4), chunk, kept)
    log_marginal = Marginal(H, K).to(asked.taught.sums.dtype).take_in(asked.taught.sums, 2 * B)
    weights = asked.taught.agreement.mean(0, keepdim=True)
    return information_losses(student.last_layer(views, 0.4), asked, log_marginal, weights, BETA)


@pytest.mark.parametrize(("chunk", "kept"), [(1 << 30, 1 << 30), (1 << 30, 0), (SMALL, 1 << 30), (SMALL, 0), (1, 0)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)]
)
def test_chunks_have_the_losses_and_gradients_of_the_whole(dtype: torch.dtype, tolerance: float, chunk: int, kept: int):
    student, teacher, views = _heads(1, dtype), _heads(2, dtype), _views(dtype)
    upstream = torch.tensor([0.5, -1.0, 2.0], dtype=views.dtype)
    expected = _plain(student, teacher, views)
    (upstream * expected).sum().backward()
    wanted = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    found = _chunked(student, teacher, views, chunk, kept)
    (upstream * found).sum().backward()
    assert found.allclose(expected, rtol=tolerance, atol=tolerance)
    for name, parameter in student.named_parameters():
        gradient, other = parameter.grad, wanted[name]
        assert gradient is not None
        assert other is not None
        assert float((gradient - other).norm()) <= tolerance * float(other.norm()), name
    assert all(p.grad is None or not p.grad.any() for p in teacher.parameters())


WIDE = 129
"""Clusters whose halves, of 64 and 65, fill up to rows of different length."""


def _divided(rank: int, world: int) -> list[list[Tensor]]:
    """For each size of a chunk: losses, sums of the teacher, and gradients in rows and this worker's clusters."""
    stack, some = everyone(), stretches(WIDE, world)[rank]
    generator, found = torch.Generator().manual_seed(3), []
    drawn = [torch.randn(H, 2, B, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    last = [torch.randn(H, WIDE, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    for chunk, kept in ((1 << 30, 1 << 30), (SMALL, 1 << 30), (SMALL, 0), (1, 0)):
        units = drawn[0].clone().requires_grad_()
        own = [x[:, some].clone().requires_grad_() for x in (last[0][..., :5], last[0][..., 5])]
        most = -(-WIDE // world)
        layer = LastLayer(stack.spread(units), own[0], own[1], 0.4, torch.float64, stack, most)
        theirs = LastLayer(drawn[1], last[1][:, some, :5], last[1][:, some, 5], 0.3, torch.float64, stack, most)
        asked = teach(theirs, chunk, kept)
        marginal = Marginal(H, len(own[1][0]), all_clusters=WIDE).double()
        with sharing_rows(Team()):
            log_marginal = marginal.take_in(asked.taught.sums, 2 * B)
        losses = information_losses(layer, asked, log_marginal, asked.taught.agreement.mean(0, keepdim=True), BETA)
        (losses * torch.arange(1, H + 1)).sum().backward()
        gradients = [x.grad for x in (units, *own) if x.grad is not None]
        found.append([losses.detach(), asked.taught.agreement, asked.taught.sums, *gradients])
    return found


def test_workers_with_some_clusters_each_take_the_same_chunks_to_the_losses_and_gradients_of_one():
    alone, together = _divided(0, 1), on_two_workers(_divided)
    for size, wanted in enumerate(alone):
        for number, value in enumerate(wanted):
            each = [worker[size][number] for worker in together]
            if each[0].shape == value.shape:
                assert each[0].equal(each[1]), "workers differ"
                assert each[0].allclose(value, rtol=1e-11, atol=1e-13)
            else:
                assert torch.cat(each, dim=1).allclose(value, rtol=1e-11, atol=1e-13)


def test_agreement_is_that_of_the_whole():
    teacher, views = _heads(2, torch.float64), _views(torch.float64)
    whole = log_probabilities(teacher(views.flatten(0, 1)), 0.4).view(H, 2, B, K)
    assert teach(teacher.last_layer(views, 0.4), SMALL, 0).taught.agreement.allclose(agreement(whole))


def test_nothing_is_kept_for_a_student_without_gradient():
    student, teacher, views = _heads(1, torch.float64), _heads(2, torch.float64), _views(torch.float64)
    with torch.no_grad():
        found = _chunked(student, teacher, views, SMALL, 0)
    assert not found.requires_grad
    assert found.allclose(_plain(student, teacher, views))


def test_chunks_are_as_few_and_as_even_as_can_be():
    layer = LastLayer(torch.zeros(5, 2, 10, 4), torch.zeros(5, 70, 4), torch.zeros(5, 70), 1.0, torch.float32)
    one = layer.pair_bytes
    assert one == 2 * 128 * 4
    assert layer.chunks(100 * one) == ([slice(0, 5)], [slice(0, 10)])
    assert layer.chunks(25 * one) == ([slice(0, 1), slice(1, 3), slice(3, 5)], [slice(0, 10)])
    assert layer.chunks(4 * one) == ([slice(h, h + 1) for h in range(5)], [slice(0, 3), slice(3, 6), slice(6, 10)])
    assert len(layer.chunks(0)[1]) == 10
    assert set(chunked.CHUNK_BYTES) == set(chunked.KEPT_BYTES)
