from __future__ import annotations

import math

import pytest
import torch

from rayclust.kernels.information import Logits, information, scratch, teacher_softmax
from rayclust.losses import information as losses
from tests.kernels.twins import both_ways

K, HALF = 37, 128


def _passes(rows: int, size: float, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Both functions on logits of about `size`, with `rows` rows in HALF columns a view."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    teacher, student = (Logits((size * torch.randn(K, 2 * HALF)).to(dtype), 6 * size) for _ in range(2))
    sums, normalizer = torch.empty(K, dtype=wide), torch.empty(2 * HALF, dtype=wide)
    agreement, loss = torch.zeros(HALF, dtype=wide), torch.empty(1, dtype=wide)
    teacher_softmax(teacher, scratch(K), rows, (normalizer, sums, agreement))
    agreement[rows:] = 0.0
    log_marginal = torch.randn(K).to(wide).log_softmax(0)
    log_marginal[3] = -87.0  # a dead cluster
    inputs = teacher.values.clone(), student.values.clone(), log_marginal
    known = normalizer, log_marginal, agreement
    information(student, teacher, scratch(K), known, 0.6, 1 / (2 * rows), loss)
    return [sums, normalizer, agreement, loss, student.values, *inputs]


@pytest.mark.parametrize("size", [1.0, 3.0, 40.0])
@pytest.mark.parametrize("rows", [HALF, 100, 3])
def test_compiled_passes_are_their_twins_but_for_rounding(rows: int, size: float):
    """Size 40 makes logits so large that only the columns' own maxima keep exponentials in range."""
    compiled, twin = both_ways(lambda: _passes(rows, size))
    for a, b in zip(compiled, twin, strict=True):
        assert a.isfinite().all()
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 0.005


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_loss_and_gradient_are_those_of_the_losses_under_autograd(size: float):
    rows = 100
    sums, _, agreement, loss, gradient, teacher, student, log_marginal = _passes(rows, size, torch.float64)

    def views(x: torch.Tensor) -> torch.Tensor:
        return x.view(K, 2, HALF)[..., :rows].permute(1, 2, 0)[None].log_softmax(-1)

    taught, leaf = views(teacher), student.clone().requires_grad_()
    torch.testing.assert_close(sums, taught.exp().sum((0, 1, 2)))
    torch.testing.assert_close(agreement[:rows], losses.agreement(taught)[0])
    expected = losses.temi(views(leaf), taught, log_marginal[None], losses.InformationOptions(0.6))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_even_logits_by_hand():
    """Everything uniform: a row's views agree with 1/K, ℓ = (2β − 2)·ln K, and there is nothing to gain."""
    for dtype in (torch.bfloat16, torch.float64):
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        values = [torch.zeros(10, 2 * 64, dtype=dtype) for _ in range(2)]
        out = torch.empty(128, dtype=wide), torch.empty(10, dtype=wide), torch.empty(64, dtype=wide)
        teacher_softmax(Logits(values[0], 10.0), scratch(10), 64, out)
        assert out[1].tolist() == pytest.approx([12.8] * 10, rel=1e-5)
        assert out[2].tolist() == pytest.approx([0.1] * 64, rel=1e-5)
        loss = torch.empty(1, dtype=wide)
        known = out[0], torch.full((10,), -math.log(10), dtype=wide), torch.full((64,), 0.1, dtype=wide)
        information(Logits(values[1], 10.0), Logits(values[0], 10.0), scratch(10), known, 0.6, 1 / 128, loss)
        assert float(loss) == pytest.approx(-0.184207, abs=2e-6)
        assert float(values[1].abs().max()) < 1e-10


def test_a_sure_pair_has_agreement_one_and_no_gradient():
    for dtype in (torch.bfloat16, torch.float64):
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        values = [torch.full((4, 128), -30.0, dtype=dtype) for _ in range(2)]
        for value in values:
            value[1] = 7.7
        out = torch.empty(128, dtype=wide), torch.empty(4, dtype=wide), torch.empty(64, dtype=wide)
        teacher_softmax(Logits(values[0], 30.1), scratch(4), 64, out)
        assert out[2].tolist() == pytest.approx([1.0] * 64, rel=1e-6)
        loss, even = torch.empty(1, dtype=wide), torch.full((4,), -math.log(4), dtype=wide)
        information(
            Logits(values[1], 30.1), Logits(values[0], 30.1), scratch(4), (out[0], even, out[2]), 0.6, 1 / 128, loss
        )
        assert float(loss) == pytest.approx(-math.log(4), rel=1e-5)
        assert float(values[1].abs().max()) < 1e-9
