"""The passes by hand, against autograd, and as Triton kernels; see interpreter.py for how these run without a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rayclust.kernels import pair_softmax
from rayclust.kernels.pair_softmax import (
    PairLossInputs,
    TeacherStats,
    padded_columns,
    student_forward_backward,
    teacher_forward,
)
from tests.kernels.interpreter import compiled_for_hopper, run_interpreted

H, B, K, BETA = 3, 7, 5, 0.6


def _logits(seed: int, clusters: int = K, dtype: torch.dtype = torch.float64, views: int = 2) -> Tensor:
    """Logits of H heads, padded with numbers that must play no part."""
    drawn = torch.randn(H, views, B, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    padding = torch.full((H, views, B, padded_columns(clusters, "cuda") - clusters), 99.0, dtype=torch.float64)
    return torch.cat([3 * drawn, padding], dim=-1).to(dtype)


def _inputs(stats: TeacherStats, some: slice = slice(None), positive: bool = False) -> PairLossInputs:
    generator = torch.Generator().manual_seed(5)
    dtype = stats.normalizer.dtype
    log_marginal = torch.randn(H, K, generator=generator, dtype=torch.float64).log_softmax(1).to(dtype)
    weights = torch.rand(1, B, generator=generator, dtype=torch.float64).expand(H, -1)[:, some].to(dtype)
    return PairLossInputs(stats.normalizer, log_marginal, weights, BETA, 1 / (2 * B), positive)


def _plain(student: Tensor, teacher: Tensor, inputs: PairLossInputs) -> Tensor:
    """The losses from log-probabilities, with gradient, pair of views by pair of views."""
    total = torch.zeros(H, dtype=torch.float64)
    for a in range(student.shape[1]):
        for b in range(student.shape[1]):
            if a != b:
                joint = inputs.beta * (student[:, a] + teacher[:, b]) - inputs.log_marginal[:, None]
                information = joint.logsumexp(-1)
                if inputs.positive:
                    information = information.clamp(min=0.0)
                total = total - inputs.scale * (inputs.weights * information).sum(1)
    return total


def test_hand_worked_pair():
    """Two clusters, one pair: the teacher halves, then is sure; the student is sure of the first."""
    logits = torch.zeros(1, 2, 1, padded_columns(2, "cuda"), dtype=torch.float64)
    logits[0, 1, 0, 0] = math.log(3)
    stats = teacher_forward(logits, 2)
    assert stats.agreement.item() == pytest.approx(0.5 * 0.75 + 0.5 * 0.25)
    assert stats.sums[0].tolist() == pytest.approx([0.5 + 0.75, 0.5 + 0.25])
    assert stats.normalizer.flatten().tolist() == pytest.approx([math.log(2), math.log(4)])
    one = torch.ones(1, 1, dtype=torch.float64)
    inputs = PairLossInputs(stats.normalizer, torch.full((1, 2), 0.5).double().log(), one, 1.0, 0.5)
    losses = student_forward_backward(logits.clone(), logits, inputs, True)  # Σ q_a q_b / ½ = 1 both ways round
    assert losses.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_passes_are_the_losses_under_autograd(dtype: torch.dtype, tolerance: float, positive: bool, views: int):
    teacher, student = _logits(1, dtype=dtype, views=views), _logits(2, dtype=dtype, views=views)
    stats = teacher_forward(teacher, K)
    inputs = _inputs(stats, positive=positive)
    log_teacher = teacher[..., :K].double().log_softmax(-1)
    leaf = student[..., :K].double().requires_grad_()
    wide = replace(inputs, log_marginal=inputs.log_marginal.double(), weights=inputs.weights.double())
    expected = _plain(leaf.log_softmax(-1), log_teacher, wide)
    expected.sum().backward()
    losses = student_forward_backward(student, teacher, inputs, True)
    probabilities = log_teacher.exp()
    pairs = [probabilities[:, a] * probabilities[:, b] for a in range(views) for b in range(a)]
    agreement = torch.stack([pair.sum(-1) for pair in pairs]).mean(0)
    assert stats.agreement.double().allclose(agreement, rtol=tolerance, atol=tolerance)
    assert stats.sums.double().allclose(probabilities.sum((1, 2)), rtol=tolerance, atol=tolerance)
    assert losses.double().allclose(expected, rtol=tolerance, atol=tolerance)
    assert leaf.grad is not None
    assert student[..., :K].double().allclose(leaf.grad, rtol=tolerance, atol=tolerance * float(leaf.grad.abs().max()))
    assert student[..., K:].abs().max() == 0


def test_pairs_may_come_in_parts_and_logits_stay_without_gradient():
    teacher, student = _logits(1), _logits(2)
    stats, before = teacher_forward(teacher, K), student.clone()
    whole = student_forward_backward(student, teacher, _inputs(stats), False)
    assert student.equal(before)
    total, sums = torch.zeros(H, dtype=torch.float64), torch.zeros(H, K, dtype=torch.float64)
    for some in (slice(0, 3), slice(3, B)):
        part = teacher_forward(teacher[:, :, some].contiguous(), K)
        sums += part.sums
        total += student_forward_backward(student[:, :, some], teacher[:, :, some], _inputs(part, some), False)
    assert total.allclose(whole)
    assert sums.allclose(stats.sums)


def test_logits_far_apart_cost_a_large_number_and_not_an_infinite_one():
    logits = torch.zeros(H, 2, B, K, dtype=torch.float32)
    logits[:, 0, :, 0], logits[:, 1, :, 1] = 1e4, 1e4
    student = logits.clone()
    losses = student_forward_backward(student, logits, _inputs(teacher_forward(logits, K)), True)
    assert losses.isfinite().all()
    assert losses.min() > 100
    assert student.isfinite().all()


def test_rows_of_logits_start_on_lines_of_a_gpus_memory():
    assert [padded_columns(k, "cuda") for k in (1, 64, 65, 25_000)] == [64, 64, 128, 25_024]
    assert padded_columns(65, "cpu") == 65


SIZES = ((2, 5, 7), (1, 9, 600), (3, 33, 129), (1, 1, 1025), (1, 3, 64))
"""H, B, K: odd ones, single pairs, clusters below, at and above a block's."""


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def differences_from_the_plain_form(dtype: torch.dtype, sizes: tuple[int, int, int], spread: float) -> list[float]:
    """How far each result of the kernels is from the plain form's, relative to the largest number in it."""
    heads, pairs, clusters = sizes
    torch.manual_seed(sum(sizes))
    student, teacher = (spread * torch.randn(2, heads, 2, pairs, padded_columns(clusters, "cuda"))).to(dtype)
    log_marginal, weights = torch.randn(heads, clusters).log_softmax(1), torch.rand(1, pairs).expand(heads, -1)
    found, chosen = [], pair_softmax._has_kernels
    for has_kernels in (lambda logits: False, lambda logits: True):
        pair_softmax._has_kernels = has_kernels
        stats, gradient = teacher_forward(teacher, clusters), student.clone()
        normalizer = found[0][0].normalizer if found else stats.normalizer
        inputs = PairLossInputs(normalizer, log_marginal, weights, 0.6, 0.5 / pairs)
        found.append((stats, student_forward_backward(gradient, teacher, inputs, True), gradient))
    pair_softmax._has_kernels = chosen
    (expected, wanted_losses, wanted), (stats, losses, gradient) = found
    wrong = [_relative(getattr(stats, name), getattr(expected, name)) for name in ("normalizer", "agreement", "sums")]
    wrong += [_relative(losses, wanted_losses), _relative(gradient, wanted)]
    return [*wrong, float(gradient[..., clusters:].abs().sum())]


def main() -> None:
    for sizes in SIZES:
        # Exponents of 1000 have 4 digits less behind the point; the interpreter cuts bf16 off.
        for dtype, spread, allowed in (
            (torch.float32, 3.0, 2e-5),
            (torch.float32, 300.0, 6e-4),
            (torch.bfloat16, 3.0, 0.01),
        ):
            wrong = differences_from_the_plain_form(dtype, sizes, spread)
            assert max(wrong) < allowed, (sizes, dtype, spread, wrong)


def test_kernels_agree_with_the_plain_form_in_the_interpreter():
    pytest.importorskip("triton", reason="this build of torch brings no Triton")
    run_interpreted("tests.kernels.test_pair_softmax", "tests.kernels.test_weight_norm")


@pytest.mark.parametrize(
    ("kernel", "prefix"),
    [
        ("_teacher_pairs_kernel", "TEACHER"),
        ("_cluster_sums_kernel", "SUM"),
        ("_student_pairs_kernel", "STUDENT"),
        ("_student_backward_kernel", "STUDENT"),
    ],
)
def test_kernels_compile_for_hopper_with_wide_loads(kernel: str, prefix: str):
    pytest.importorskip("triton", reason="this build of torch brings no Triton")
    function = getattr(pair_softmax, kernel)
    pairs, clusters, warps = (getattr(pair_softmax, f"{prefix}_{what}") for what in ("PAIRS", "CLUSTERS", "WARPS"))
    blocks = {"pair_block": pairs, "row_block": pairs, "cluster_block": clusters}
    types = dict.fromkeys(function.arg_names, "*fp32") | dict.fromkeys(("logits", "student", "teacher"), "*bf16")
    types |= dict.fromkeys(("pairs", "clusters", "rows", "row_stride", "view_stride"), "i32") | {"beta": "fp32"}
    constants = {name: size for name, size in blocks.items() if name in function.arg_names}
    compiled = compiled_for_hopper(function, types, constants, warps)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]  # 8 bf16 at once
    assert len(compiled.asm["cubin"]) > 0
