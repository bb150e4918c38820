from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rayclust.methods import METHODS, config_type, find, is_recuttable, reads_pixels
from rayclust.methods.base import Batch, Method, Prototypes, Transform
from rayclust.methods.settings import BaseMethodConfig, Plan, TrainedConfig, cosine_schedule


def _plan(count: int, **settings: Any) -> Plan:
    return Plan.of(TrainedConfig.model_validate({"name": "any", "clusters": 2, **settings}), count)


def test_a_plan_counts_whole_batches():
    plan = _plan(50_000, batch_size=1024, epochs=100, warmup_epochs=20)
    assert (plan.steps_per_epoch, plan.steps, plan.epochs, plan.warmup_steps) == (48, 4800, 100, 960)


def test_a_plan_of_steps_ends_in_the_middle_of_an_epoch():
    plan = _plan(1000, batch_size=100, steps=25, warmup_steps=3)
    assert (plan.steps_per_epoch, plan.steps, plan.epochs, plan.warmup_steps) == (10, 25, 3, 3)


def test_a_small_set_is_one_batch():
    plan = _plan(30, batch_size=512, epochs=7)
    assert (plan.batch_size, plan.steps_per_epoch, plan.steps) == (30, 1, 7)


def test_the_warm_up_is_no_longer_than_the_training():
    assert _plan(100, batch_size=50, epochs=3, warmup_epochs=20).warmup_steps == 6


def test_a_cosine_starts_at_its_start_is_half_way_in_the_middle_and_stays_at_its_end():
    assert cosine_schedule(0.996, 1.0, 0, 100) == 0.996
    assert cosine_schedule(0.996, 1.0, 50, 100) == pytest.approx(0.998)
    assert cosine_schedule(0.996, 1.0, 100, 100) == 1.0
    assert cosine_schedule(0.996, 1.0, 500, 100) == 1.0
    assert cosine_schedule(0.3, 0.3, 7, 100) == 0.3
    assert cosine_schedule(1.0, 0.0, 0, 0) == 0.0


class Plain(Method):
    """Parameters of every number of axes, one of them fixed."""

    def __init__(self) -> None:
        super().__init__(BaseMethodConfig(name="plain", clusters=2), 3, 10, 0)
        self.bias, self.matrix = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 4))
        self.stack = nn.Parameter(torch.zeros(2, 3, 4))
        self.fixed = nn.Parameter(torch.zeros(3, 4), requires_grad=False)


def test_matrices_decay_and_vectors_do_not():
    method = Plain()
    matrices, stacks, vectors = method.parameter_groups()
    assert (matrices["params"], stacks["params"], vectors["params"]) == ([method.matrix], [method.stack], [method.bias])
    assert stacks["stacked"]
    assert vectors["weight_decay"] == 0.0
    assert "weight_decay" not in matrices


def test_a_method_without_a_plan_describes_none():
    assert BaseMethodConfig(name="any", clusters=2).describe_plan(10, 3, 1) == ""


def test_a_batch_of_several_spaces_has_no_only_one():
    x = torch.zeros(1, 2, 3)
    assert Batch({"clip": x}, torch.arange(2), 0, 0).x is x
    with pytest.raises(ValueError, match="unpack"):
        _ = Batch({"clip": x, "text": x}, torch.arange(2), 0, 0).x


PIXELS = ["propos", "byol", "simsiam", "simclr", "moco", "pcl", "cc"]


def test_what_a_method_can_do_is_asked_of_it():
    assert [name for name in METHODS if config_type(name).has_own_space] == ["cpp", "cpp_pixels", *PIXELS]
    assert [name for name in METHODS if reads_pixels(name)] == ["cpp_pixels", *PIXELS]
    assert [name for name in METHODS if is_recuttable(name)] == ["cpp", "spectral", "cpp_pixels"]
    assert issubclass(find("temi"), Prototypes)
    for name in METHODS:
        assert config_type(name) is find(name).config_type
        assert config_type(name).has_own_space == hasattr(find(name), "transform")
    assert not isinstance(Plain(), Transform)
