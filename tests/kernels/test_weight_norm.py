from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rayclust.kernels.weight_norm import scaled_rows, scaled_rows_backward

H, K, P, WIDTH, FACTOR = 2, 5, 64, 7, 10.0


def _layer(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(H, K, WIDTH, generator=generator, dtype=torch.float64)
    return direction.to(dtype), torch.randn(H, K, generator=generator, dtype=torch.float64).to(dtype)


def test_rows_have_the_lengths_asked_for_and_zeros_behind_them():
    direction, scale = _layer()
    out = scaled_rows(direction, scale, FACTOR, torch.full((H, P, WIDTH), 9.0, dtype=torch.float64))
    assert out[:, :K].allclose(functional.normalize(direction, dim=2) * scale[..., None] * FACTOR)
    assert out[:, K:].abs().max() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_the_way_back_is_that_of_autograd(dtype: torch.dtype, tolerance: float):
    direction, scale = (x.requires_grad_() for x in _layer())
    slopes = torch.randn(H, P, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    rows = functional.normalize(direction, dim=2) * scale[..., None] * FACTOR
    rows.backward(slopes[:, :K].double())
    found = scaled_rows_backward(slopes, direction.detach(), scale.detach(), FACTOR)
    for gradient, parameter in zip(found, (direction, scale), strict=True):
        assert parameter.grad is not None
        assert gradient.allclose(parameter.grad, rtol=tolerance, atol=tolerance)


def test_a_direction_without_length_is_no_error():
    direction, scale = _layer()
    direction[0, 0] = 0
    out = scaled_rows(direction, scale, FACTOR, torch.empty(H, P, WIDTH, dtype=torch.float64))
    assert out[0, 0].abs().max() == 0
    assert all(x.isfinite().all() for x in scaled_rows_backward(out, direction, scale, FACTOR))
