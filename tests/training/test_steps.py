from __future__ import annotations

import pytest
import torch

from rayclust.methods import TemiConfig, build
from rayclust.methods.base import Batch
from rayclust.training.steps import GradientSteps

B, D = 9, 5


def test_frozen_parameters_have_no_optimiser_state_until_they_move():
    config = TemiConfig(clusters=3, preset="none", heads=2, hidden=4)
    method = build(config, D, 20, seed=0)
    steps = GradientSteps(method, config)
    before = method.get_parameter("student.direction").detach().clone()
    for epoch, moved in [(0, False), (1, True)]:
        steps.take(Batch(torch.randn(2, B, D), torch.arange(B), epoch, epoch), 1e-2, 0.5)
        assert method.get_parameter("student.direction").equal(before) != moved
        assert len({name.partition(".")[0] for name in steps.state()}) == (6 if moved else 4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_positive_rate_lowers_the_loss_of_a_repeated_batch(optimizer: str):
    config = TemiConfig.model_validate(
        {"clusters": 3, "preset": "none", "heads": 2, "optimizer": optimizer, "precision": "fp32"}
    )
    method = build(config, D, 20, seed=0)
    steps = GradientSteps(method, config)
    batch = Batch(
        torch.randn(1, B, D, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1), torch.arange(B), 0, 1
    )
    first, *_, last = (float(steps.take(batch, 0.02, 0.0)["loss"]) for _ in range(20))
    assert last < first
