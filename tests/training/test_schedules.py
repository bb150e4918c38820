from __future__ import annotations

import itertools

import pytest

from rayclust.methods.base import Plan, TrainedConfig
from rayclust.training.schedules import learning_rate, weight_decay


def _rates(count: int, **settings: float) -> list[float]:
    config = TrainedConfig.model_validate({"name": "any", "clusters": 2, **settings})
    plan = Plan.of(config, count)
    return [learning_rate(config, plan, step) for step in range(plan.steps)]


def test_the_published_rate_rises_from_zero_to_four_times_its_base_and_stays():
    rates = _rates(4096, batch_size=1024, epochs=100, learning_rate=1e-4, min_learning_rate=1e-4, warmup_epochs=20)
    assert len(rates) == 400
    assert rates[0] == 0
    assert rates[1] == pytest.approx(4e-4 / 79)
    assert rates[79] == pytest.approx(4e-4)
    assert rates[80:] == pytest.approx([4e-4] * 320)


def test_a_cosine_falls_from_the_peak_to_the_minimum():
    rates = _rates(256, batch_size=256, steps=101, warmup_steps=1, learning_rate=1.0, min_learning_rate=0.1)
    assert rates[:2] == [0.0, 1.0]
    assert rates[51] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[1:]))


def test_a_batch_cut_to_the_rows_scales_the_rate_by_what_is_left():
    assert _rates(64, batch_size=1024, epochs=2, warmup_epochs=0)[0] == pytest.approx(1e-4 * 64 / 256)


def test_a_warm_up_longer_than_the_training_is_cut():
    rates = _rates(100, batch_size=50, epochs=3, warmup_epochs=20)
    assert len(rates) == 6
    assert rates[-1] == pytest.approx(1e-4 * 50 / 256)


def test_weight_decay_is_constant_or_a_cosine():
    config = TrainedConfig(name="any", clusters=2, steps=10, weight_decay=0.0, final_weight_decay=1.0)
    plan = Plan.of(config, 100)
    assert [weight_decay(config, plan, step) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    flat = config.model_copy(update={"weight_decay": 1.0})
    assert weight_decay(flat, plan, 3) == 1.0
