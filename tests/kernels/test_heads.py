from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from rayclust.kernels import heads, native
from tests.kernels.twins import both_ways

F, R, K = 32, 128, 21
BF16 = torch.bfloat16


def _narrow(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes).to(BF16)


def _gelu() -> list[torch.Tensor]:
    product, bias, hidden, kept = 3 * _narrow(F, R), torch.randn(F), _narrow(F, R), _narrow(F, R)
    heads.gelu(product, bias, hidden, kept)
    gradient, sums = _narrow(F, R), torch.empty(F)
    heads.gelu_backward(gradient, kept, sums)
    return [hidden, gradient, sums]


def _unit() -> list[torch.Tensor]:
    x, bias, inverse = _narrow(F, R), torch.randn(F), torch.empty(R)
    heads.unit_columns(x, bias, inverse)
    gradient, sums = _narrow(F, R), torch.empty(F)
    heads.unit_columns_backward(gradient, x, inverse, sums)
    return [x, inverse, gradient, sums]


def _scaled() -> list[torch.Tensor]:
    layer = torch.randn(K, F), torch.rand(K)
    weights, transposed, inverse = _narrow(K, F), _narrow(F, K), torch.empty(K)
    heads.scaled_rows(layer, 10.0, weights, transposed, inverse)
    out = torch.empty(K, F), torch.empty(K)
    heads.scaled_rows_backward(_narrow(K, F), layer, inverse, 10.0, out)
    return [weights, transposed, inverse, *out]


def _transposed() -> list[torch.Tensor]:
    out = _narrow(F, 40)
    heads.transpose(_narrow(40, F), out)
    return [out]


@pytest.mark.parametrize("passes", [_gelu, _unit, _scaled, _transposed])
def test_compiled_passes_are_their_twins_but_for_rounding(passes: Callable[[], list[torch.Tensor]]):
    compiled, twin = both_ways(passes)
    for a, b in zip(compiled, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 0.005


@pytest.mark.skipif(native.library() is None, reason="no compiled passes here")
def test_compiled_gelu_is_right_wherever_bf16_can_point():
    x = torch.cat([torch.linspace(-12, 12, 16 * 1024 - 64), torch.zeros(64)]).view(16, 1024).to(BF16)
    hidden, slope = torch.empty_like(x), torch.empty_like(x)
    heads.gelu(x.clone(), torch.zeros(16), hidden, slope)
    wide = x.double().requires_grad_()
    exact = functional.gelu(wide)
    exact.sum().backward()
    assert wide.grad is not None
    assert bool(((hidden - exact).abs() <= 2**-8 * exact.abs() + 2e-4).all())
    assert bool(((slope - wide.grad).abs() <= 2**-8 * wide.grad.abs() + 3e-4).all())


def _small() -> tuple[torch.Tensor, ...]:
    """Parameters of a head in float64: W1 3·4, b1, direction 5·3, scale, and four columns of input."""
    torch.manual_seed(0)
    sizes = [(3, 4), (3,), (5, 3), (5,), (4, 6)]
    return tuple(torch.randn(*size, dtype=torch.float64) for size in sizes)


def test_gradients_are_those_of_autograd():
    weight, bias, direction, scale, x = _small()
    leaves = [t.clone().requires_grad_() for t in (weight, bias, direction, scale)]
    hidden = functional.gelu(leaves[0] @ x + leaves[1][:, None])
    unit = functional.normalize(hidden, dim=0)
    logits = 10 * functional.normalize(leaves[2], dim=1) * leaves[3][:, None] @ unit
    upstream = torch.randn_like(logits)
    logits.backward(upstream)

    own, kept = torch.empty(3, 6, dtype=torch.float64), torch.empty(3, 6, dtype=torch.float64)
    heads.gelu(weight @ x, bias, own, kept)
    inverse, none = torch.empty(6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    heads.unit_columns(own, none, inverse)
    weights, lengths = torch.empty_like(direction), torch.empty_like(scale)
    heads.scaled_rows((direction, scale), 10.0, weights, None, lengths)
    torch.testing.assert_close(weights @ own, logits.detach(), rtol=0, atol=1e-12)
    out = torch.empty_like(direction), torch.empty_like(scale)
    heads.scaled_rows_backward(upstream @ own.T, (direction, scale), lengths, 10.0, out)
    gradient, sums = weights.T @ upstream, torch.empty(3, dtype=torch.float64)
    heads.unit_columns_backward(gradient, own, inverse, sums)
    torch.testing.assert_close(sums, gradient.sum(1))
    heads.gelu_backward(gradient, kept, sums)
    for found, leaf in zip((gradient @ x.T, sums, *out), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-12)


def test_a_column_of_zeros_stays_zero_and_gives_no_gradient():
    for dtype in (BF16, torch.float64):
        wide = torch.float32 if dtype == BF16 else dtype
        x, inverse, sums = torch.zeros(F, R, dtype=dtype), torch.empty(R, dtype=wide), torch.empty(F, dtype=wide)
        heads.unit_columns(x, torch.zeros(F, dtype=wide), inverse)
        assert not x.any()
        gradient = torch.zeros_like(x)
        heads.unit_columns_backward(gradient, x, inverse, sums)
        assert not gradient.any()
        assert not sums.any()
