from __future__ import annotations

import torch

from rayclust.methods.cpp_steps import FACTOR, FIRST_SCALE, CppSteps
from tests.methods.test_cpp import batch, method


def test_is_torchs_sgd_with_momentum_in_two_groups():
    ours, plain = method(variant="two_head", code_rate=0.5), method(variant="two_head")
    codes = list(plain.network.codes.parameters())
    others = [p for p in plain.parameters() if all(p is not c for c in codes)]
    groups = [{"params": others, "weight_decay": 1e-2}, {"params": codes, "lr": 0.05, "weight_decay": 5e-3}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    steps = CppSteps(ours)
    for step in range(2, 5):
        steps.take(batch(step), 0.1, 1e-2)
        optimizer.zero_grad()
        plain.losses(batch(step))["loss"].backward()
        optimizer.step()
    for (name, own), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, msg=name)


def test_half_precision_scales_the_loss_and_skips_steps_that_overflow():
    made = method(precision="fp16").float()
    steps = CppSteps(made)
    first = batch(2)
    steps.take(type(first)(first.views.float(), first.rows, 2, 0), 0.1, 1e-2)
    assert steps.state()["scale"].tolist() == [FIRST_SCALE, 1.0]
    before = [p.clone() for p in made.parameters()]
    for parameter in made.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    assert not steps._unscaled([p.grad for p in made.parameters()])
    assert steps.state()["scale"].tolist() == [FIRST_SCALE / FACTOR, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


def test_state_goes_back_in():
    made = method(variant="two_head")
    steps = CppSteps(made)
    for step in range(4):
        steps.take(batch(step), 0.1, 1e-2)
    other = CppSteps(made)
    other.load({name: value.clone() for name, value in steps.state().items()})
    assert other.state().keys() == steps.state().keys()
    assert all(torch.equal(other.state()[name], value) for name, value in steps.state().items())
