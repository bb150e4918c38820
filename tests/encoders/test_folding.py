from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rayclust.encoders.folding import folded
from tests.encoders.networks import tiny_timm

EXAMPLE = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def stirred(network: nn.Module) -> nn.Module:
    """Norms as after training: no statistic is what it was at the start."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Backwards(nn.Module):
    """Its norm comes first, though it is named after the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.norm(x)).mean((2, 3))
        return y


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_the_function_stays_and_the_norms_go(name: str) -> None:
    network = stirred(tiny_timm(name))
    shorter = folded(network, EXAMPLE)
    assert norms(shorter) < norms(network)
    with torch.inference_mode():
        x = torch.randn(2, 3, 32, 32)
        assert torch.allclose(shorter(x), network(x), rtol=1e-3, atol=1e-4)


def test_the_network_itself_is_not_changed() -> None:
    network = stirred(tiny_timm("test_resnet"))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded(network, EXAMPLE)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_what_cannot_be_folded_is_left_alone() -> None:
    backwards = stirred(Backwards())
    assert folded(backwards, EXAMPLE) is backwards
    plain = tiny_timm("test_vit")
    assert folded(plain, EXAMPLE) is plain
