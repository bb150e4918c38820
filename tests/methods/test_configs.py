from __future__ import annotations

from typing import Any

from rayclust.methods.configs import BaseMethodConfig, Plan, TrainedConfig


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


def test_a_method_without_a_plan_tells_none():
    assert BaseMethodConfig(name="any", clusters=2).outlook(10, 3, 1) == ""
