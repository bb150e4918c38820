from __future__ import annotations

import pytest
import torch

from rayclust.errors import ArtefactError
from rayclust.methods import TemiConfig, build
from rayclust.methods.base import Batch, Method
from rayclust.training.checkpoints import pack, unpack
from rayclust.training.steps import GradientSteps


def _stepped(optimizer_name: str, steps: int, clusters: int = 3) -> tuple[Method, GradientSteps]:
    config = TemiConfig.model_validate(
        {"clusters": clusters, "preset": "none", "heads": 2, "hidden": 4, "optimizer": optimizer_name}
    )
    method = build(config, 5, 20, seed=0)
    taken = GradientSteps(method, config)
    for step in range(steps):
        taken.take(_batch(step), 1e-2, 1e-2)
    return method, taken


def _batch(step: int) -> Batch:
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(step))
    return Batch(x, torch.arange(7), step, epoch=1)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_packed_training_goes_on_with_the_same_bits(name: str):
    method, steps = _stepped(name, 3)
    packed = pack(method, steps, {"loss": torch.tensor(1.5, dtype=torch.float64)})
    other, its_steps = _stepped(name, 0)
    sums = unpack(packed, other, its_steps)
    assert sums["loss"].item() == 1.5
    for taken in (steps, its_steps):
        taken.take(_batch(3), 1e-2, 1e-2)
    for mine, theirs in zip(method.state_dict().values(), other.state_dict().values(), strict=True):
        assert mine.equal(theirs)


def test_packed_tensors_are_own_contiguous_copies_on_the_cpu():
    method, steps = _stepped("adamw", 1)
    packed = pack(method, steps, {})
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
