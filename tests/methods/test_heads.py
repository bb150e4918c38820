from __future__ import annotations

import pytest
import torch
from torch import nn

from rayclust.errors import ShapeError
from rayclust.methods.layers import ema_update, matmul_dtype
from rayclust.methods.settings import Precision
from rayclust.methods.temi import Heads
from rayclust.methods.temi_settings import HeadShape
from tests import references
from tests.workers import on_two_workers

SMALL = HeadShape(heads=3, dimension=7, clusters=4, hidden=6, bottleneck=5)


def _randomised(shape: HeadShape, seed: int = 0) -> Heads:
    """Heads in float64 whose parameters are all far from their start, so that none can hide."""
    heads = Heads(shape, seed, "fp32").double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return heads


def _rows(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_stacked_heads_equal_heads_built_from_torch_layers():
    heads, x = _randomised(SMALL), _rows(9)
    logits = heads(x)
    assert logits.shape == (3, 9, 4)
    for head in range(3):
        expected = references.ClusteringHead(heads.state_dict(), head)(x)
        assert logits[head].allclose(expected, rtol=0, atol=1e-12)
        assert heads(x, head=head)[0].allclose(expected, rtol=0, atol=1e-12)


def test_stacked_gradients_equal_those_of_single_heads():
    heads, x = _randomised(SMALL), _rows(9)
    heads(x, training=True).square().sum().backward()
    for head in range(3):
        state = {name: value.detach().clone().requires_grad_() for name, value in heads.state_dict().items()}
        torch.func.functional_call(heads, state, (x,), {"head": head}).square().sum().backward()
        for name, parameter in heads.named_parameters():
            assert parameter.grad is not None
            assert state[name].grad is not None
            assert parameter.grad[head].allclose(state[name].grad[head], rtol=0, atol=1e-9), name


def test_logits_are_bounded_by_the_scale_and_blind_to_the_length_of_direction_and_bottleneck():
    heads, x = _randomised(SMALL), _rows(20)
    logits = heads(x)
    assert (logits.abs() <= heads.scale.abs()[:, None] + 1e-12).all()
    with torch.no_grad():
        heads.direction.mul_(7.0)
        heads.weights[-1].mul_(3.0)
        heads.biases[-1].mul_(3.0)
    assert heads(x).allclose(logits, rtol=0, atol=1e-12)


def test_initial_weights_are_small_and_cut_off_and_scales_are_one():
    heads = Heads(HeadShape(heads=2, dimension=300, clusters=30, hidden=64), seed=0)
    for weight, bias in zip(heads.weights, heads.biases, strict=True):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.abs().max() <= 2.0
        assert not bias.any()
    assert heads.direction.abs().max() <= 1 / 16
    assert heads.direction.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.05)
    assert (heads.scale == 1).all()


def test_initial_weights_differ_by_head_and_not_by_the_number_of_heads():
    few, many = Heads(SMALL, seed=4), Heads(HeadShape(5, 7, 4, 6, 5), seed=4)
    assert few.weights[0].equal(many.weights[0][:3])
    assert few.direction.equal(many.direction[:3])
    assert not few.weights[0][0].equal(few.weights[0][1])
    assert not few.weights[0].equal(Heads(SMALL, seed=5).weights[0])


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("final_gelu", [False, True])
def test_any_number_of_layers_gives_logits(layers: int, final_gelu: bool):
    heads = Heads(HeadShape(2, 7, 4, 6, 5, layers=layers, final_gelu=final_gelu), seed=0)
    assert len(heads.weights) == layers
    assert heads(torch.randn(3, 7)).shape == (2, 3, 4)


def test_a_frozen_scale_gets_no_gradient():
    assert not Heads(HeadShape(2, 7, 4, learn_scale=False), seed=0).scale.requires_grad


def test_dropout_drops_in_training_only():
    heads, x = Heads(HeadShape(2, 7, 4, dropout=0.5), seed=0, precision="fp32"), torch.randn(5, 7)
    assert heads(x).equal(heads(x))
    assert not heads(x, training=True).equal(heads(x, training=True))


def test_batch_norm_equals_torchs_in_training_and_after():
    shape = HeadShape(2, 7, 4, 6, 5, batch_norm=True)
    heads, x = _randomised(shape), _rows(30)
    twin = torch.nn.BatchNorm1d(6, dtype=torch.float64)
    twin.load_state_dict({"weight": heads.norms[0].gains[1], "bias": heads.norms[0].biases[1]}, strict=False)
    hidden = torch.nn.functional.linear(x, heads.weights[0][1], heads.biases[0][1])
    stacked = torch.stack([hidden, hidden])
    assert heads.norms[0](stacked, training=True)[1].allclose(twin(hidden), rtol=0, atol=1e-12)
    twin.eval()
    assert heads.norms[0](stacked, training=False)[1].allclose(twin(hidden), rtol=0, atol=1e-6)
    heads(x, training=True)
    assert heads(x, training=False).isfinite().all()


def _normed(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads, x = _randomised(HeadShape(2, 7, 4, 6, 5, batch_norm=True)), _rows(9)
    logits = heads(x[rank::world], training=True)
    (logits.square().sum() / 9 * world).backward()
    gradient = heads.weights[0].grad
    assert gradient is not None
    if world > 1:
        torch.distributed.all_reduce(gradient)
    return logits.detach(), gradient / world


def test_batch_norm_on_two_workers_sees_all_rows():
    logits, gradient = _normed(0, 1)
    for rank, (share, together) in enumerate(on_two_workers(_normed)):
        assert share.allclose(logits[:, rank::2], rtol=0, atol=1e-12)
        assert together.allclose(gradient, rtol=0, atol=1e-12)


def test_bf16_products_stay_near_float32_and_leave_float32_parameters_and_gradients():
    shape = HeadShape(heads=4, dimension=64, clusters=10)
    x = torch.nn.functional.normalize(torch.randn(256, 64, generator=torch.Generator().manual_seed(2)), dim=1)
    found = {}
    for precision in ("fp32", "bf16"):
        heads = Heads(shape, seed=0, precision=precision)
        logits = heads(x, training=True).float()
        logits.square().sum().backward()
        found[precision] = (logits.detach(), [p.grad for p in heads.parameters() if p.grad is not None])
    assert (found["bf16"][0] - found["fp32"][0]).abs().max() < 0.02
    for coarse, fine in zip(found["bf16"][1], found["fp32"][1], strict=True):
        assert coarse.dtype == torch.float32
        assert torch.cosine_similarity(coarse.flatten(), fine.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(("precision", "expected"), [("auto", torch.float64), ("fp32", torch.float64)])
def test_float64_rows_stay_float64_for_exactness_tests(precision: Precision, expected: torch.dtype):
    assert matmul_dtype(precision, torch.zeros(1, dtype=torch.float64)) == expected
    assert matmul_dtype("bf16", torch.zeros(1)) == torch.bfloat16


def test_a_wrong_width_is_refused():
    with pytest.raises(ShapeError, match="width 8: 7 is needed"):
        Heads(SMALL, seed=0)(torch.zeros(2, 8))


def _twins() -> tuple[nn.Linear, nn.Linear]:
    teacher, student = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(1.0)
        for parameter in student.parameters():
            parameter.zero_()
    return teacher, student


def test_the_gap_to_a_constant_student_shrinks_by_the_momentum():
    teacher, student = _twins()
    for step in range(1, 4):
        ema_update(teacher, student, 0.996)
        assert teacher.weight.flatten().tolist() == pytest.approx([0.996**step] * 6)
    assert not student.weight.any()


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    teacher, student = _twins()
    ema_update(teacher, student, 1.0)
    assert (teacher.weight == 1).all()
    ema_update(teacher, student, 0.0)
    assert teacher.bias.equal(student.bias)


def test_buffers_are_the_teachers_own():
    teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    student.running_mean.fill_(5.0)
    ema_update(teacher, student, 0.5)
    assert not teacher.running_mean.any()
