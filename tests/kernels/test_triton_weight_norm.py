"""See interpreter.py for how kernels run without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import compiled_for_hopper, run_interpreted

pytest.importorskip("triton", reason="this build of torch brings no Triton")


def main() -> None:
    from rayclust.kernels import triton_weight_norm as kernels
    from rayclust.kernels import weight_norm as twin

    for heads, clusters, width, columns in ((2, 5, 7, 64), (1, 70, 32, 128), (3, 64, 20, 64)):
        torch.manual_seed(clusters)
        direction, scale = torch.randn(heads, clusters, width), torch.randn(heads, clusters)
        direction[0, 0] = 0
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):  # the interpreter cuts bf16 off
            out, wanted = torch.full((2, heads, columns, width), 9.0, dtype=dtype)
            kernels.scaled_rows(direction, scale, 10.0, out)
            twin.scaled_rows(direction, scale, 10.0, wanted)
            torch.testing.assert_close(out, wanted, rtol=tolerance, atol=1e-6)
            slopes = torch.randn(heads, columns, width).to(dtype)
            found = kernels.scaled_rows_backward(slopes, direction, scale, 10.0)
            for one, other in zip(found, twin.scaled_rows_backward(slopes, direction, scale, 10.0), strict=True):
                close = (one - other)[1:].abs().max() if heads > 1 else (one - other)[:, 1:].abs().max()
                assert close < 1e-4, (heads, clusters, close)
                assert one.isfinite().all()


def test_kernels_agree_with_their_twin_in_the_interpreter():
    run_interpreted("tests.kernels.test_triton_weight_norm")


@pytest.mark.parametrize("kernel", ["_scale_rows", "_scale_rows_backward"])
def test_kernels_compile_for_hopper(kernel: str):
    from rayclust.kernels import triton_weight_norm as kernels

    numbers = {"clusters": "i32", "columns": "i32", "width": "i32", "factor": "fp32"}
    types = dict.fromkeys(("direction", "scale", "gradient", "scale_gradient"), "*fp32") | numbers
    types |= {"out": "*bf16", "slopes": "*bf16"}
    constants = {"row_block": kernels.ROWS, "width_block": 256}
    compiled = compiled_for_hopper(getattr(kernels, kernel), types, constants, kernels.WARPS)
    assert len(compiled.asm["cubin"]) > 0


if __name__ == "__main__":
    main()
