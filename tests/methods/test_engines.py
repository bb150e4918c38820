from __future__ import annotations

import pytest
import torch

from rayclust.kernels import native
from rayclust.kernels.crew import Crew
from rayclust.losses import information
from rayclust.methods.engines import Engine, PlainEngine, Step, TileEngine
from rayclust.methods.heads import Heads, HeadShape

H, D, K, B = 2, 64, 7, 45
needs_tiles = pytest.mark.skipif(native.library() is None, reason="no compiler, or no matrix tiles")


def _heads(seed: int, dtype: torch.dtype, dimension: int = D) -> Heads:
    shape = HeadShape(heads=H, dimension=dimension, clusters=K, hidden=96, bottleneck=32)
    heads = Heads(shape, seed=0).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn.to(torch.bfloat16))
    return heads


def _engine(kind: str, student: Heads, teacher: Heads) -> Engine:
    if kind == "tiles":
        return TileEngine(student, teacher, Crew(1))
    return PlainEngine(student, teacher, Crew(1), torch.bfloat16 if kind == "bf16" else student.direction.dtype)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("plain", torch.float64, 1e-10),
        ("plain", torch.float32, 1e-4),
        ("bf16", torch.float32, 0.03),
        pytest.param("tiles", torch.float32, 0.03, marks=needs_tiles),
    ],
)
def test_engines_do_what_heads_and_losses_do_under_autograd(kind: str, dtype: torch.dtype, tolerance: float):
    teacher, student = _heads(1, dtype), _heads(2, dtype)
    torch.manual_seed(3)
    views = torch.randn(2, B, D).to(torch.bfloat16).to(dtype)
    engine = _engine(kind, student, teacher)
    engine.refresh()
    engine.take_in(views)
    step = Step(B, 0.6, 1 / (2 * B), (10.0, 5.0), ([12.0] * H, [12.0] * H), last_learns=True)
    for head in range(H):
        engine.teach(step, head, 0)
    taught, learnt = (
        information.log_probabilities(heads(views.flatten(0, 1)), 1 / factor).view(H, 2, B, K)
        for heads, factor in ((teacher, 5.0), (student, 10.0))
    )
    exchange = engine.exchange
    assert _distance(exchange.sums, taught.exp().sum((1, 2))) < tolerance
    assert _distance(exchange.agreement[:, :B], information.agreement(taught)) < tolerance

    log_marginal = torch.randn(H, K).log_softmax(1).to(dtype)
    weights = information.agreement(taught).mean(0).detach()
    exchange.log_marginal.copy_(log_marginal)
    exchange.weights[:B] = weights
    expected = information.temi(learnt, taught.detach(), log_marginal, information.InformationOptions(0.6))
    expected.sum().backward()
    for head in range(H):
        gradients = engine.learn(step, head, 0)
        for name, gradient in gradients.items():
            wanted = student.get_parameter(name).grad
            assert wanted is not None
            assert _distance(gradient, wanted[head]) < tolerance, name
        assert gradients.keys() == dict(student.named_parameters()).keys()
    assert _distance(exchange.losses, expected) < tolerance


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    wide = expected.detach().double()
    return float((found.double() - wide).norm() / wide.norm())


@needs_tiles
def test_tiles_want_whole_blocks():
    assert TileEngine.fits(_heads(0, torch.float32))
    assert not TileEngine.fits(_heads(0, torch.float32, dimension=50))


def test_without_the_library_there_are_no_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rayclust.methods.engines.library", lambda: None)
    assert not TileEngine.fits(_heads(0, torch.float32))
