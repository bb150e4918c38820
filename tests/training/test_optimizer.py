from __future__ import annotations

import pytest
import torch

from rayclust.methods import TemiConfig, build
from rayclust.training.optimizer import Lars, build_optimizer, set_rates


def test_groups_hold_every_trainable_parameter_once_and_decay_only_matrices():
    config = TemiConfig(clusters=3, preset="none", heads=2)
    method = build(config, 5, 20, seed=0)
    optimizer = build_optimizer(method, config)
    set_rates(optimizer, 0.3, 0.2)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.3
        assert group["weight_decay"] == (0.2 if group["decays"] else 0.0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_parameter_without_gradient_is_passed_over(name: str):
    config = TemiConfig.model_validate({"clusters": 3, "preset": "none", "heads": 2, "optimizer": name})
    method = build(config, 5, 20, seed=0)
    optimizer = build_optimizer(method, config)
    set_rates(optimizer, 0.1, 0.5)
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    method.get_parameter("student.weights.0").grad = torch.ones_like(before["student.weights.0"])
    optimizer.step()
    changed = {key for key, p in method.named_parameters() if not p.equal(before[key])}
    assert changed == {"student.weights.0"}


def test_lars_scales_each_stacked_layer_by_its_own_norms():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    optimizer = Lars([{"params": [weight], "lr": 1.0, "decays": True}], momentum=0.0, trust=0.1, stacked=[weight])
    weight.grad = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    optimizer.step()
    # step = trust · |w| · g/|g| : 0.1·5 and 0.1·0.5 along the second axis
    assert weight.flatten().tolist() == pytest.approx([3.0, 3.5, 0.3, 0.35])


def test_lars_takes_the_steps_of_each_head_alone():
    """All heads at once, and each as the only one of a method that begins where it does."""
    config = TemiConfig.model_validate({"clusters": 3, "preset": "none", "heads": 2, "optimizer": "lars"})
    both = build(config, 5, 20, seed=0)
    alone = [build(config.model_copy(update={"heads": 1}), 5, 20, seed=0) for _ in range(2)]
    gradients = {name: torch.randn_like(p) for name, p in both.named_parameters() if p.requires_grad}
    for head, method in enumerate(alone):
        for name, p in method.named_parameters():
            p.data.copy_(both.get_parameter(name)[head : head + 1])
            p.grad = gradients[name][head : head + 1].clone() if name in gradients else None
    for name, gradient in gradients.items():
        both.get_parameter(name).grad = gradient
    for method in (both, *alone):
        optimizer = build_optimizer(method, config)
        set_rates(optimizer, 0.1, 0.5)
        optimizer.step()
    for name in gradients:
        for head, method in enumerate(alone):
            torch.testing.assert_close(method.get_parameter(name)[0], both.get_parameter(name)[head])
