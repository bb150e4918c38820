from __future__ import annotations

import pytest
import torch

from rayclust.kernels.products import Shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_with_a_shared_side(dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(70, 33).to(dtype)
    shared = Shared(x, 48)
    for rows in (48, 5):
        left = torch.randn(rows, 33).to(dtype)
        expected = left.double() @ x.double().T
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(shared.product(left).double(), expected, rtol=tolerance, atol=tolerance)
