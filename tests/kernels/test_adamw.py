from __future__ import annotations

import pytest
import torch

from rayclust.kernels import native
from rayclust.kernels.adamw import AdamW, Slot, adamw
from rayclust.kernels.tile_head import to_left

STEPS, RATE, DECAY, FOLLOW = 5, 1e-2, 0.1, 0.004

needs_library = pytest.mark.skipif(native.library() is None, reason="no compiler, or no matrix tiles")


def _plainly(value: torch.Tensor, follower: torch.Tensor, gradients: torch.Tensor) -> None:
    """torch's AdamW and a moving average, in place."""
    value.requires_grad_()
    optimizer = torch.optim.AdamW([value], lr=RATE, weight_decay=DECAY)
    for gradient in gradients:
        value.grad = gradient.to(value.dtype)
        optimizer.step()
        follower.mul_(1 - FOLLOW).add_(FOLLOW * value.detach())
    value.requires_grad_(False)


def _gradients(*size: int) -> torch.Tensor:
    return torch.randn(STEPS, *size) * 10.0 ** torch.arange(-4, 1).view(-1, *[1] * len(size))


@pytest.mark.parametrize("count", [1, 16, 37, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_torchs_adamw_and_a_plain_moving_average(
    count: int, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    if not compiled:
        monkeypatch.setattr("rayclust.kernels.adamw.library", lambda: None)
    torch.manual_seed(0)
    values = torch.randn(2, count, dtype=dtype)
    gradients = _gradients(count).to(dtype)
    value, follower = values.clone()
    slot = Slot(value, torch.zeros_like(value), torch.zeros_like(value), follower)
    for step, gradient in enumerate(gradients):
        adamw(slot, gradient, AdamW(RATE, DECAY, step + 1, FOLLOW))
    expected, expected_follower = values.clone()
    _plainly(expected, expected_follower, gradients)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(follower, expected_follower, rtol=tolerance, atol=tolerance)


@needs_library
@pytest.mark.parametrize("narrow", [False, True])
def test_tiles_follow_value_and_follower(narrow: bool):
    torch.manual_seed(0)
    values, gradients = torch.randn(2, 64, 320), _gradients(64, 320)
    gradients = gradients.to(torch.bfloat16) if narrow else gradients
    value, follower = values.clone()
    tiles = torch.empty(2, value.numel(), dtype=torch.bfloat16)
    slot = Slot(value, torch.zeros_like(value), torch.zeros_like(value), follower, (tiles[0], tiles[1]))
    for step, gradient in enumerate(gradients):
        adamw(slot, gradient, AdamW(RATE, DECAY, step + 1, FOLLOW))
    expected, expected_follower = values.clone()
    _plainly(expected, expected_follower, gradients)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(follower, expected_follower, rtol=2e-6, atol=2e-6)
    assert tiles[0].equal(to_left(value))
    assert tiles[1].equal(to_left(follower))


def test_a_parameter_without_gradient_only_decays():
    value = torch.full((16,), 2.0)
    slot = Slot(value, torch.zeros(16), torch.zeros(16), value.clone())
    adamw(slot, torch.zeros(16), AdamW(0.5, 0.1, 1, 0.5))
    assert value.tolist() == pytest.approx([1.9] * 16)
    assert slot.follower.tolist() == pytest.approx([1.95] * 16)
