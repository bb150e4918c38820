from __future__ import annotations

import pytest
import torch

from rayclust.kernels.adamw import AdamW, Slot, adamw
from tests.kernels.twins import both_ways

STEPS, RATE, DECAY, FOLLOW = 5, 1e-2, 0.1, 0.004


def _fused(count: int, dtype: torch.dtype, copied: bool, narrow: bool) -> list[torch.Tensor]:
    """Value, follower and copies after some steps on drawn gradients, which come last."""
    value, follower = torch.randn(count, dtype=dtype), torch.randn(count, dtype=dtype)
    start = value.clone(), follower.clone()
    copies = torch.zeros(2, count, dtype=torch.bfloat16) if copied else None
    slot = Slot(
        value, torch.zeros_like(value), torch.zeros_like(value), follower, None if copies is None else tuple(copies)
    )
    gradients = torch.randn(STEPS, count, dtype=dtype) * 10.0 ** torch.arange(-4, 1)[:, None]
    gradients = gradients.to(torch.bfloat16) if narrow else gradients
    for step, gradient in enumerate(gradients):
        adamw(slot, gradient, AdamW(RATE, DECAY, step + 1, FOLLOW))
    if copies is not None:
        assert copies[0].equal(value.to(torch.bfloat16))
        assert copies[1].equal(follower.to(torch.bfloat16))
    return [value, follower, *start, gradients]


@pytest.mark.parametrize("count", [1, 16, 37, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_adamw_and_a_plain_moving_average(count: int, dtype: torch.dtype):
    torch.manual_seed(0)
    value, follower, start, expected_follower, gradients = _fused(count, dtype, copied=False, narrow=False)
    expected = start.requires_grad_()
    optimizer = torch.optim.AdamW([expected], lr=RATE, weight_decay=DECAY)
    for gradient in gradients:
        expected.grad = gradient
        optimizer.step()
        expected_follower = (1 - FOLLOW) * expected_follower + FOLLOW * expected.detach()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(value, expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(follower, expected_follower, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("copied", "narrow"), [(True, True), (True, False), (False, False)])
def test_the_compiled_pass_is_its_twin_but_for_rounding(copied: bool, narrow: bool):
    compiled, twin = both_ways(lambda: _fused(4096, torch.float32, copied, narrow))
    for a, b in zip(compiled, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_a_parameter_without_gradient_only_decays():
    value = torch.full((16,), 2.0)
    slot = Slot(value, torch.zeros(16), torch.zeros(16), value.clone())
    adamw(slot, torch.zeros(16), AdamW(0.5, 0.1, 1, 0.5))
    assert value.tolist() == pytest.approx([1.9] * 16)
    assert slot.follower.tolist() == pytest.approx([1.95] * 16)
