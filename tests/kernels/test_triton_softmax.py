"""See interpreter.py for how kernels run without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import compiled_for_hopper, run_interpreted

pytest.importorskip("triton", reason="this build of torch brings no Triton")

SIZES = ((2, 5, 7), (1, 9, 600), (3, 33, 129), (1, 1, 1025), (1, 3, 64))
"""H, B, K: odd ones, single pairs, clusters below, at and above a block's."""


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def _shares_of_halves(logits: torch.Tensor, clusters: int) -> torch.Tensor:
    """Float[H K] from two workers' clusters, each with the log-sum-exps over both."""
    from rayclust.kernels import pair_softmax as twin
    from rayclust.kernels import triton_softmax as kernels

    halves = []
    for some in (slice(0, clusters // 2), slice(clusters // 2, clusters)):
        own = logits[..., some]
        if own.shape[-1]:
            filling = own.new_full((*own.shape[:-1], twin.padded(own.shape[-1]) - own.shape[-1]), 99.0)
            halves.append((torch.cat([own, filling], dim=-1).contiguous(), own.shape[-1]))
    whole = torch.logsumexp(torch.stack([kernels.normalize(*half)[0] for half in halves]), dim=0)
    return torch.cat([kernels.sum_shares(half, whole, own) for half, own in halves], dim=1)


def compare_with_the_twin(dtype: torch.dtype, sizes: tuple[int, int, int], spread: float) -> list[float]:
    """How far each result of the kernels is from the twin's, relative to the largest number in it."""
    from rayclust.kernels import pair_softmax as twin
    from rayclust.kernels import triton_softmax as kernels

    heads, pairs, clusters = sizes
    torch.manual_seed(sum(sizes))
    student, teacher = (spread * torch.randn(2, heads, 2, pairs, twin.padded(clusters))).to(dtype)
    expected, (normalizer, agreement) = twin.teach(teacher, clusters), kernels.normalize(teacher, clusters)
    taught = twin.Taught(normalizer, agreement, kernels.sum_shares(teacher, normalizer, clusters))
    wrong = [_relative(getattr(taught, name), getattr(expected, name)) for name in ("normalizer", "agreement", "sums")]
    wrong.append(_relative(_shares_of_halves(teacher, clusters), expected.sums))
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
    run_interpreted("tests.kernels.test_triton_softmax")


@pytest.mark.parametrize(
    ("kernel", "prefix"),
    [("_teach_pairs", "TEACHER"), ("_sum_shares", "SUM"), ("_compare_pairs", "STUDENT"), ("_give_way", "STUDENT")],
)
def test_kernels_compile_for_hopper_with_wide_loads(kernel: str, prefix: str):
    from rayclust.kernels import triton_softmax as kernels

    function = getattr(kernels, kernel)
    pairs, clusters, warps = (getattr(kernels, f"{prefix}_{what}") for what in ("PAIRS", "CLUSTERS", "WARPS"))
    blocks = {"pair_block": pairs, "row_block": pairs, "cluster_block": clusters}
    types = dict.fromkeys(function.arg_names, "*fp32") | dict.fromkeys(("logits", "student", "teacher"), "*bf16")
    types |= dict.fromkeys(("pairs", "clusters", "rows", "row_stride", "view_stride"), "i32") | {"beta": "fp32"}
    constants = {name: size for name, size in blocks.items() if name in function.arg_names}
    compiled = compiled_for_hopper(function, types, constants, warps)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]  # 8 bf16 at once
    assert len(compiled.asm["cubin"]) > 0


if __name__ == "__main__":
    main()
