"""The passes against autograd, and as Triton kernels; see interpreter.py for how these run without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from rayclust.kernels import weight_norm
from rayclust.kernels.weight_norm import scaled_rows, scaled_rows_backward
from tests.kernels.interpreter import compiled_for_hopper

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
def test_the_gradient_is_that_of_autograd(dtype: torch.dtype, tolerance: float):
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


def main() -> None:
    """Kernels against the plain form; `test_pair_softmax` runs it in the interpreter."""
    is_chosen: Any = weight_norm._has_kernels
    for heads, clusters, width, columns in ((2, 5, 7, 64), (1, 70, 32, 128), (3, 64, 20, 64)):
        torch.manual_seed(clusters)
        direction, scale = torch.randn(heads, clusters, width), torch.randn(heads, clusters)
        direction[0, 0] = 0
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):  # the interpreter cuts bf16 off
            slopes = torch.randn(heads, columns, width).to(dtype)
            forms = []
            for has_kernels in (lambda x: True, is_chosen):
                weight_norm._has_kernels = has_kernels
                out = torch.full((heads, columns, width), 9.0, dtype=dtype)
                forms.append(
                    (scaled_rows(direction, scale, 10.0, out), *scaled_rows_backward(slopes, direction, scale, 10.0))
                )
            torch.testing.assert_close(forms[0][0], forms[1][0], rtol=tolerance, atol=1e-6)
            for one, other in zip(forms[0][1:], forms[1][1:], strict=True):
                close = (one - other)[1:].abs().max() if heads > 1 else (one - other)[:, 1:].abs().max()
                assert close < 1e-4, (heads, clusters, close)
                assert one.isfinite().all()


@pytest.mark.parametrize("kernel", ["_scaled_rows_kernel", "_scaled_rows_backward_kernel"])
def test_kernels_compile_for_hopper(kernel: str):
    pytest.importorskip("triton", reason="this build of torch brings no Triton")
    numbers = {"clusters": "i32", "columns": "i32", "width": "i32", "factor": "fp32"}
    types = dict.fromkeys(("direction", "scale", "gradient", "scale_gradient"), "*fp32") | numbers
    types |= {"out": "*bf16", "slopes": "*bf16"}
    constants = {"row_block": weight_norm.ROWS, "width_block": 256}
    compiled = compiled_for_hopper(getattr(weight_norm, kernel), types, constants, weight_norm.WARPS)
    assert len(compiled.asm["cubin"]) > 0
