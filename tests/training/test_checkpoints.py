from __future__ import annotations

import pytest
import torch

from rayclust.errors import ArtefactError
from rayclust.methods import TemiConfig, build
from rayclust.methods.base import Method
from rayclust.training.checkpoints import pack, unpack
from rayclust.training.optimizer import build_optimizer, set_rates


def _stepped(optimizer_name: str, steps: int, clusters: int = 3) -> tuple[Method, torch.optim.Optimizer]:
    config = TemiConfig.model_validate(
        {"clusters": clusters, "preset": "none", "heads": 2, "hidden": 4, "optimizer": optimizer_name}
    )
    method = build(config, 5, 20, seed=0)
    optimizer = build_optimizer(method, config)
    set_rates(optimizer, 1e-2, 1e-2)
    for _ in range(steps):
        _step(method, optimizer)
    return method, optimizer


def _step(method: Method, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.stack([p.square().sum() + p.sum() for p in method.parameters() if p.requires_grad]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_packed_training_goes_on_with_the_same_bits(name: str):
    method, optimizer = _stepped(name, 3)
    packed = pack(method, optimizer, {"loss": torch.tensor(1.5, dtype=torch.float64)})
    other, its_optimizer = _stepped(name, 0)
    sums = unpack(packed, other, its_optimizer)
    assert sums["loss"].item() == 1.5
    _step(method, optimizer)
    _step(other, its_optimizer)
    for mine, theirs in zip(method.state_dict().values(), other.state_dict().values(), strict=True):
        assert mine.equal(theirs)


def test_packed_tensors_are_own_contiguous_copies_on_the_cpu():
    method, optimizer = _stepped("adamw", 1)
    packed = pack(method, optimizer, {})
    before = packed["method.student.weights.0"].clone()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    assert packed["method.student.weights.0"].equal(before)
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in packed.values())


def test_a_checkpoint_of_another_size_is_refused_in_one_line():
    packed = pack(*_stepped("adamw", 1), {})
    with pytest.raises(ArtefactError, match="checkpoint does not fit the method") as error:
        unpack(packed, *_stepped("adamw", 0, clusters=4))
    assert "\n" not in str(error.value)
