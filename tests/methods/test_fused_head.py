from __future__ import annotations

import pytest
import torch

from rayclust.kernels.products import Shared
from rayclust.methods.fused_head import Net, Room
from rayclust.methods.heads import Heads, HeadShape

R, FACTOR = 128, 10.0


@pytest.mark.parametrize(
    ("narrow", "wide", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.03),
    ],
)
def test_logits_and_gradients_are_those_of_heads_under_autograd(
    narrow: torch.dtype, wide: torch.dtype, tolerance: float
):
    torch.manual_seed(0)
    shape = HeadShape(heads=2, dimension=24, clusters=7, hidden=32, bottleneck=16)
    heads = Heads(shape, seed=0).to(wide)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    x = torch.randn(R, 24).to(narrow)
    upstream = torch.randn(2, R, 7).to(narrow)
    logits = FACTOR * heads(x.to(wide))
    logits.backward(upstream.to(wide))
    room = Room(shape, R, narrow, wide)
    for head in range(2):
        first, second = (weight.detach()[head].to(narrow) for weight in heads.weights)
        biases = heads.biases[0].detach()[head], heads.biases[1].detach()[head]
        net = Net(first, second, biases, (heads.direction.detach()[head], heads.scale.detach()[head]))
        out = torch.empty(7, R, dtype=narrow)
        room.forward(net, Shared(x, 32), FACTOR, out, learns=True)
        assert _distance(out.T, logits[head]) < tolerance
        found = room.backward(
            net, Shared(x.T.contiguous(), 32), FACTOR, upstream[head].T.contiguous(), last_learns=True
        )
        for name, gradient in found.items():
            expected = heads.get_parameter(name).grad
            assert expected is not None
            assert _distance(gradient, expected[head]) < tolerance, name
        assert found.keys() == dict(heads.named_parameters()).keys()


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two tensors, over the length of the second."""
    wide = expected.detach().double()
    return float((found.double() - wide).norm() / wide.norm())
