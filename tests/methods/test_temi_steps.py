from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from rayclust.methods import Temi, TemiConfig, build, engines, temi_steps
from rayclust.methods.base import Batch
from rayclust.methods.temi_steps import FusedSteps, fits, pays
from rayclust.metrics.external import accuracy
from rayclust.training.loop import Trainer
from rayclust.training.pairs import ArrayRows
from rayclust.training.steps import GradientSteps
from tests.workers import on_two_workers

D, K, B, STEPS = 6, 4, 9, 6


def _method(dtype: torch.dtype = torch.float64, width: int = D, **settings: Any) -> Temi:
    """A small TEMI whose student and teacher are far apart; its first two steps leave the last layer alone."""
    written = {"clusters": K, "preset": "none", "heads": 3, "hidden": 8, "bottleneck": 5, "batch_size": B, "epochs": 9}
    written |= {"teacher_momentum": 0.5, "final_teacher_momentum": 0.9, "warmup_teacher_temperature": 0.3, **settings}
    method = build(TemiConfig.model_validate(written), width, 50, seed=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    assert isinstance(method, Temi)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn if "direction" not in name and "scale" not in name else drawn.abs())
        for last in ("direction", "scale"):  # as it is while the last layer rests
            method.teacher.get_parameter(last).copy_(method.student.get_parameter(last))
    return method


def _batch(
    step: int, dtype: torch.dtype = torch.float64, rank: int = 0, world: int = 1, rows: int = B, width: int = D
) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)[:, rank::world].to(dtype)
    return Batch(x, torch.arange(rows)[rank::world], step, step // 2, share=world * x.shape[1] / rows)


def _run(steps: FusedSteps | GradientSteps, first: int = 0, last: int = STEPS, **of_batch: Any) -> list[torch.Tensor]:
    return [steps.take(_batch(step, **of_batch), 0.05, 0.3)["head_loss"] for step in range(first, last)]


def _assert_equal(found: Temi, expected: Temi, tolerance: float = 1e-10) -> None:
    wanted = expected.state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "settings",
    [{}, {"learn_scale": False}, {"heads": 1, "beta": 1.0}, {"hidden": 33, "bottleneck": 17}, {"freeze_last_layer": 0}],
)
def test_steps_are_those_of_autograd_adamw_and_a_moving_average(settings: dict[str, Any]):
    fused, plain = _method(**settings), _method(**settings)
    ours, theirs = FusedSteps(fused), GradientSteps(plain, plain.config)
    for a, b in zip(_run(ours), _run(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    _assert_equal(fused, plain)
    mine, wanted = ours.state(), theirs.state()
    assert mine.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(mine[name].double(), wanted[name].double(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("precision", "width"), [("fp32", D), ("bf16", D), ("bf16", 32)])
def test_float32_and_bf16_stay_close(precision: str, width: int):
    settings = {"hidden": 32, "bottleneck": 32, "teacher_momentum": 0.9, "precision": precision}
    fused, plain = _method(torch.float32, width, **settings), _method(torch.float64, width, **settings)
    start = copy.deepcopy(plain)
    _run(FusedSteps(fused), last=3, dtype=torch.float32, width=width)
    _run(GradientSteps(plain, plain.config), last=3, width=width)
    for name, value in fused.named_parameters():
        moved = plain.get_parameter(name).detach() - start.get_parameter(name).detach()
        wrong = value.detach().double() - plain.get_parameter(name).detach()
        tolerance = 1e-4 if precision == "fp32" else 0.3
        assert float(wrong.norm()) <= tolerance * max(float(moved.norm()), 1e-6), name


def test_state_goes_on_with_either_kind_of_steps():
    whole = _method()
    _run(GradientSteps(whole, whole.config))
    for first, second in ((FusedSteps, GradientSteps), (GradientSteps, FusedSteps), (FusedSteps, FusedSteps)):
        method = _method()
        early, late = _steps(first, method), _steps(second, method)
        _run(early, 0, 3)
        late.load({name: value.clone() for name, value in early.state().items()})
        _run(late, 3)
        _assert_equal(method, whole)


def _steps(kind: type[FusedSteps | GradientSteps], method: Temi) -> FusedSteps | GradientSteps:
    return FusedSteps(method) if kind is FusedSteps else GradientSteps(method, method.config)


def _on_worker(rank: int, world: int, dtype: torch.dtype, width: int) -> dict[str, torch.Tensor]:
    method = _method(dtype, width, hidden=32, bottleneck=32)
    _run(FusedSteps(method), rank=rank, world=world, dtype=dtype, width=width)
    return method.state_dict()


def _on_worker_both_ways(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    return [_on_worker(rank, world, torch.float64, D), _on_worker(rank, world, torch.float32, 32)]


def test_two_workers_with_uneven_shares_are_one():
    """To the last digits in float64, and but for rounding on matrix tiles."""
    alone = _on_worker_both_ways(0, 1)
    for found in on_two_workers(_on_worker_both_ways):
        for tolerance, one, other in zip((1e-10, 0.05), alone, found, strict=True):
            for name, value in one.items():
                wrong = float((other[name] - value).double().norm())
                assert wrong <= tolerance * max(float(value.double().norm()), 1.0), name


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, D), (torch.float32, D), (torch.float32, 32)])
def test_threads_change_no_bit(dtype: torch.dtype, width: int):
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        method = _method(dtype, width, hidden=32, bottleneck=32)
        torch.set_num_threads(threads)
        try:
            _run(FusedSteps(method), dtype=dtype, width=width)
        finally:
            torch.set_num_threads(before)
        found.append(method)
    _assert_equal(found[0], found[1], tolerance=0.0)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, D), (torch.float32, 32)])
def test_logits_that_are_made_twice_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int):
    found = []
    for kept in (1 << 31, 0):
        monkeypatch.setattr(engines, "KEPT_BYTES", kept)
        method = _method(dtype, width, hidden=32, bottleneck=32)
        _run(FusedSteps(method), dtype=dtype, width=width)
        found.append(method)
    _assert_equal(found[0], found[1], tolerance=0.0)


@pytest.mark.parametrize("width", [D, 32])
def test_batches_may_change_their_size_and_parameters_be_set_before_the_first_step(width: int):
    losses = []
    for precision in ("bf16", "fp32"):
        method = _method(torch.float32, width, hidden=32, bottleneck=32, precision=precision)
        steps = FusedSteps(method)
        with torch.no_grad():
            method.student.weights[0].mul_(0.5)
        batches = [_batch(0, torch.float32, rows=rows, width=width) for rows in (200, 9, 130)]
        losses.append(torch.stack([steps.take(batch, 0.0, 0.0)["head_loss"] for batch in batches]))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"layers": 1}, False),
        ({"layers": 3}, False),
        ({"batch_norm": True}, False),
        ({"dropout": 0.1}, False),
        ({"final_gelu": True}, False),
        ({"loss": "pmi"}, False),
        ({"positive_pmi": True}, False),
        ({"repeats": 2}, False),
        ({"optimizer": "sgd"}, False),
        ({"clip_norm": 1.0}, False),
        ({"hidden": 30, "precision": "fp32"}, True),
        ({"hidden": 30, "precision": "bf16"}, True),
    ],
)
def test_what_is_written_out(settings: dict[str, Any], expected: bool):
    written = {"clusters": K, "preset": "none", "heads": 2, **settings}
    assert fits(build(TemiConfig.model_validate(written), D, 50, seed=0)) == expected


def test_small_heads_are_left_to_autograd():
    assert not pays(_method())
    assert _method().own_steps() is None
    large = build(TemiConfig(clusters=K, preset="none"), 64, 500, seed=0)
    assert isinstance(large, Temi)
    assert isinstance(large.own_steps(), FusedSteps)


def _planted(seed: int) -> tuple[ArrayRows, np.ndarray]:
    """480 rows around eight points, and ten near neighbours of each."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(8, size=480)
    x = rng.normal(size=(8, 32))[labels] + 0.6 * rng.normal(size=(480, 32))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return ArrayRows(x, np.argsort(-x @ x.T, axis=1)[:, 1:11].copy()), labels


def test_bf16_finds_planted_clusters_as_float32_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(temi_steps, "LEAST_WORK", 0.0)
    settings = {"clusters": 8, "preset": "none", "heads": 4, "hidden": 64, "bottleneck": 32, "neighbors": 10}
    settings |= {"batch_size": 120, "steps": 300, "warmup_steps": 10, "learning_rate": 0.02, "min_learning_rate": 0.02}
    scores: dict[str, list[float]] = {"bf16": [], "fp32": []}
    for seed in range(3):
        rows, labels = _planted(seed)
        for precision, found in scores.items():
            config = TemiConfig.model_validate({**settings, "precision": precision})
            method = build(config, rows.dimension, rows.count, seed=seed)
            method.fit(rows, Trainer(seed))
            found.append(accuracy(labels, method.assign(rows.tensor()).argmax(1).numpy()))
    assert np.mean(scores["bf16"]) > 0.85
    assert np.mean(scores["bf16"]) > np.mean(scores["fp32"]) - 0.02
