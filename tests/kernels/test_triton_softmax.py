"""The kernels run in Triton's interpreter, which has to be asked for before they are read: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="this build of torch brings no Triton")

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((2, 5, 7), (1, 9, 600), (3, 33, 129), (1, 1, 1025), (1, 3, 64))
"""H, B, K: odd ones, single pairs, clusters below, at and above a block's."""


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def compare_with_the_twin(dtype: torch.dtype, sizes: tuple[int, int, int], spread: float) -> list[float]:
    """How far each result of the kernels is from the twin's, relative to the largest number in it."""
    from rayclust.kernels import pair_softmax as twin
    from rayclust.kernels import triton_softmax as kernels

    heads, pairs, clusters = sizes
    torch.manual_seed(sum(sizes))
    student, teacher = (spread * torch.randn(2, heads, 2, pairs, twin.padded(clusters))).to(dtype)
    expected, taught = twin.teach(teacher, clusters), kernels.teach(teacher, clusters)
    wrong = [_relative(getattr(taught, name), getattr(expected, name)) for name in ("normalizer", "agreement", "sums")]
    log_marginal, weights = torch.randn(heads, clusters).log_softmax(1), torch.rand(1, pairs).expand(heads, -1)
    lesson = twin.Lesson(expected.normalizer, log_marginal, weights, 0.6, 0.5 / pairs)
    plain, own = twin.compare(student, teacher, lesson)[1], kernels.compare(student, teacher, lesson)
    wrong += [_relative(own.own, plain.own), _relative(own.both, plain.both)]
    slope, wanted = student.clone(), student.clone()
    kernels.give_way(slope, teacher, lesson, own)
    twin.give_way(wanted, teacher, lesson, plain)
    return [*wrong, _relative(slope, wanted), float(slope[..., clusters:].abs().sum())]


def main() -> None:
    for sizes in SIZES:
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.01)):  # the interpreter cuts bf16 off
            for spread in (3.0, 300.0):
                wrong = compare_with_the_twin(dtype, sizes, spread)
                # exponents of 1000 have 4 digits less behind the point
                allowed = tolerance if dtype == torch.bfloat16 else tolerance * max(1.0, spread / 10)
                assert max(wrong) < allowed, (sizes, dtype, spread, wrong)


def test_kernels_agree_with_their_twin_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.test_triton_softmax"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("kernel", "prefix"),
    [("_teach_pairs", "TEACHER"), ("_sum_shares", "SUM"), ("_compare_pairs", "STUDENT"), ("_give_way", "STUDENT")],
)
def test_kernels_compile_for_hopper_with_wide_loads(kernel: str, prefix: str):
    """Without a GPU: as far as its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rayclust.kernels import triton_softmax as kernels

    function = getattr(kernels, kernel)
    narrow, numbers = {"logits", "student", "teacher"}, {"pairs", "clusters", "rows", "row_stride", "view_stride"}
    pairs, clusters, warps = (getattr(kernels, f"{prefix}_{what}") for what in ("PAIRS", "CLUSTERS", "WARPS"))
    blocks = {"pair_block": pairs, "row_block": pairs, "cluster_block": clusters}
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        if name in blocks:
            signature[name], constants[(place,)] = "constexpr", blocks[name]
            continue
        plain = "i32" if name in numbers else "fp32" if name == "beta" else None
        signature[name] = plain or ("*bf16" if name in narrow else "*fp32")
        if plain is None or name.endswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert "ld.global.v4.b32" in compiled.asm["ptx"]  # 8 bf16 at once
    assert len(compiled.asm["cubin"]) > 0


if __name__ == "__main__":
    main()
