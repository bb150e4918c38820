from __future__ import annotations

import math

import pytest
import torch

from rayclust.kernels.plain_head import Lesson, Net, Room, Sizes
from rayclust.kernels.products import Shared
from rayclust.losses import information
from rayclust.methods.heads import Heads, HeadShape

D, K, B, FACTOR, BETA = 6, 5, 9, 10.0, 0.6


def _heads(seed: int, dtype: torch.dtype = torch.float64) -> Heads:
    heads = Heads(HeadShape(heads=1, dimension=D, clusters=K, hidden=7, bottleneck=4), seed=0).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return heads


def _net(heads: Heads) -> Net:
    weights, biases = ([p.detach()[0] for p in stacked] for stacked in (heads.weights, heads.biases))
    return Net((weights[0], weights[1]), (biases[0], biases[1]), heads.direction.detach()[0], heads.scale.detach()[0])


def _log_probabilities(heads: Heads, x: torch.Tensor) -> torch.Tensor:
    """Float[1 2 B K]."""
    return information.log_probabilities(heads(x), 1 / FACTOR).view(1, 2, -1, K)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_lesson_is_that_of_the_losses_under_autograd(dtype: torch.dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.manual_seed(0)
    teacher, student, x = _heads(1, dtype), _heads(2, dtype), torch.randn(2 * B, D, dtype=dtype)
    room = Room(Sizes(7, 4, K, 2 * B, dtype, dtype))
    out = tuple(torch.empty(*size, dtype=dtype) for size in ((K, 2 * B), (2 * B,), (K,), (B,)))
    packed = Shared(x, 7), Shared(x.T.contiguous(), 7)
    room.teach(_net(teacher), packed[0], FACTOR, out)
    with torch.no_grad():
        taught = _log_probabilities(teacher, x)
    torch.testing.assert_close(out[0].T, FACTOR * teacher(x)[0].detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out[2], taught.exp().sum((0, 1, 2)), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out[3], information.agreement(taught)[0], rtol=tolerance, atol=tolerance)

    log_marginal = torch.randn(K, dtype=dtype).log_softmax(0)
    lesson = Lesson(out[0], out[1], log_marginal, out[3], BETA, 1 / (2 * B))
    loss, gradients = room.learn(_net(student), *packed, FACTOR, lesson, last_learns=True)
    options = information.InformationOptions(BETA)
    expected = information.temi(_log_probabilities(student, x), taught, log_marginal[None], options)
    torch.testing.assert_close(loss, expected[0].detach(), rtol=tolerance, atol=tolerance)
    expected.sum().backward()
    assert gradients.keys() == dict(student.named_parameters()).keys()
    for name, gradient in gradients.items():
        wanted = student.get_parameter(name).grad
        assert wanted is not None
        torch.testing.assert_close(gradient, wanted[0], rtol=tolerance, atol=tolerance, msg=name)
    _, frozen = room.learn(_net(student), *packed, FACTOR, lesson, last_learns=False)
    assert frozen.keys() == gradients.keys() - {"direction", "scale"}
    torch.testing.assert_close(frozen["weights.0"], gradients["weights.0"])


def test_even_logits_by_hand():
    """Everything uniform: a row's views agree with 1/K, ℓ = (2β − 2)·ln K, and there is nothing to gain."""
    room = Room(Sizes(4, 4, 10, 4, torch.float64, torch.float64))
    zeros = [torch.zeros(*size, dtype=torch.float64) for size in ((4, 3), (4, 4), (4,), (4,), (10, 4), (10,))]
    net = Net((zeros[0], zeros[1]), (zeros[2], zeros[3]), zeros[4], zeros[5])
    x = torch.zeros(4, 3, dtype=torch.float64)
    packed = Shared(x, 4), Shared(x.T.contiguous(), 4)
    out = tuple(torch.empty(*size, dtype=torch.float64) for size in ((10, 4), (4,), (10,), (2,)))
    room.teach(net, packed[0], 10.0, out)
    assert out[2].tolist() == pytest.approx([0.4] * 10)
    assert out[3].tolist() == pytest.approx([0.1] * 2)
    even = torch.full((10,), -math.log(10), dtype=torch.float64)
    lesson = Lesson(out[0], out[1], even, out[3], 0.6, 1 / 4)
    loss, gradients = room.learn(net, *packed, 10.0, lesson, last_learns=True)
    assert float(loss) == pytest.approx(-0.184207, abs=1e-6)
    for gradient in gradients.values():
        assert gradient.isfinite().all()
        assert float(gradient.abs().max()) < 1e-12
