from __future__ import annotations

import math

import pytest
import torch

from rayclust.kernels import pair_softmax
from rayclust.kernels.pair_softmax import Lesson, compare, give_way, padded, teach
from rayclust.losses import information

H, B, K, BETA = 3, 7, 5, 0.6


def _logits(seed: int, clusters: int = K, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Two heads' pairs, filled up with what must play no part."""
    drawn = torch.randn(H, 2, B, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    filling = torch.full((H, 2, B, padded(clusters) - clusters), 99.0, dtype=torch.float64)
    return torch.cat([3 * drawn, filling], dim=-1).to(dtype)


def _lesson(taught: pair_softmax.Taught, some: slice = slice(None)) -> Lesson:
    generator = torch.Generator().manual_seed(5)
    log_marginal = torch.randn(H, K, generator=generator, dtype=torch.float64).log_softmax(1)
    weights = torch.rand(1, B, generator=generator, dtype=torch.float64).expand(H, -1)
    dtype = taught.normalizer.dtype
    return Lesson(taught.normalizer, log_marginal.to(dtype), weights[:, some].to(dtype), BETA, 1 / (2 * B))


def test_hand_worked_pair():
    """Two clusters, one pair: the teacher halves, then is sure; the student is sure of the first."""
    logits = torch.zeros(1, 2, 1, padded(2), dtype=torch.float64)
    logits[0, 1, 0, 0] = math.log(3)
    taught = teach(logits, 2)
    assert taught.agreement.item() == pytest.approx(0.5 * 0.75 + 0.5 * 0.25)
    assert taught.sums[0].tolist() == pytest.approx([0.5 + 0.75, 0.5 + 0.25])
    assert taught.normalizer.flatten().tolist() == pytest.approx([math.log(2), math.log(4)])
    lesson = Lesson(taught.normalizer, torch.full((1, 2), 0.5).double().log(), torch.ones(1, 1).double(), 1.0, 0.5)
    losses, _ = compare(logits, logits, lesson)  # Σ q_a q_b / ½ = 1 both ways round
    assert losses.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_passes_are_the_losses_under_autograd(dtype: torch.dtype, tolerance: float):
    teacher, student = _logits(1, dtype=dtype), _logits(2, dtype=dtype)
    taught = teach(teacher, K)
    lesson = _lesson(taught)
    log_teacher = teacher[..., :K].double().log_softmax(-1)
    leaf = student[..., :K].double().requires_grad_()
    expected = lesson.weights.double() * information._information_losses(
        leaf.log_softmax(-1), log_teacher, lesson.log_marginal.double(), information.InformationOptions(BETA)
    )
    expected.mean(1).sum().backward()
    losses, found = compare(student, teacher, lesson)
    give_way(student, teacher, lesson, found)
    assert taught.agreement.double().allclose(information.agreement(log_teacher), rtol=tolerance, atol=tolerance)
    assert taught.sums.double().allclose(log_teacher.exp().sum((1, 2)), rtol=tolerance, atol=tolerance)
    assert losses.double().allclose(expected.mean(1), rtol=tolerance, atol=tolerance)
    assert leaf.grad is not None
    assert student[..., :K].double().allclose(leaf.grad, rtol=tolerance, atol=tolerance * float(leaf.grad.abs().max()))
    assert student[..., K:].abs().max() == 0


def test_pairs_may_come_in_parts():
    teacher, student = _logits(1), _logits(2)
    taught = teach(teacher, K)
    whole, _ = compare(student, teacher, _lesson(taught))
    total, sums = torch.zeros(H, dtype=torch.float64), torch.zeros(H, K, dtype=torch.float64)
    for some in (slice(0, 3), slice(3, B)):
        part = teach(teacher[:, :, some].contiguous(), K)
        sums += part.sums
        total += compare(student[:, :, some], teacher[:, :, some], _lesson(part, some))[0]
    assert total.allclose(whole)
    assert sums.allclose(taught.sums)


def test_logits_far_apart_cost_a_large_number_and_not_an_infinite_one():
    logits = torch.zeros(H, 2, B, padded(K), dtype=torch.float32)
    logits[:, 0, :, 0], logits[:, 1, :, 1] = 1e4, 1e4
    taught = teach(logits, K)
    lesson = _lesson(taught)
    losses, found = compare(logits.clone(), logits, lesson)
    student = logits.clone()
    give_way(student, logits, lesson, found)
    assert losses.isfinite().all()
    assert losses.min() > 100
    assert student.isfinite().all()


def test_rows_of_logits_start_on_lines_of_memory():
    assert [padded(k) for k in (1, 64, 65, 25_000)] == [64, 64, 128, 25_024]
