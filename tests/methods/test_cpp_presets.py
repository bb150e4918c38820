from __future__ import annotations

import pytest

from rayclust.methods.configs import Plan
from rayclust.methods.cpp import CppConfig


@pytest.mark.parametrize(("preset", "count", "wanted"), [
    ("cifar10", 50_000, (4096, 128, 1024, 0.175, 15 * 48, 50)),
    ("cifar20", 50_000, (4096, 128, 1024, 0.13, 15 * 48, 48)),
    ("cifar100", 50_000, (4096, 128, 1500, 0.10, 50 * 33, 33)),
    ("imagenet", 1_281_167, (2048, 1024, 1024, 0.12, 20 * 1251, 2000)),
])  # fmt: skip
def test_published_settings(preset: str, count: int, wanted: tuple[float, ...]):
    c = CppConfig(clusters=10, preset=preset).settled(count)
    plan = Plan.of(c, count)
    assert (c.hidden, c.width, plan.batch_size, c.temperature, plan.steps, c.expansion_steps) == wanted
    assert c.learning_rate * plan.batch_size / 256 == pytest.approx(1e-4)
    assert c.min_learning_rate == c.learning_rate
    assert (c.distortion, c.compression_weight, c.membership_weight, c.half_steps) == (0.1, 1.0, 0.05, 5)
    assert (c.weight_decay, c.final_weight_decay, c.code_weight_decay) == (1e-4, 1e-4, 5e-3)


@pytest.mark.parametrize("count", [5, 1_000, 100_000])
def test_auto_counts_steps_and_stops_on_the_loss(count: int):
    c = CppConfig(clusters=3).settled(count)
    assert c.steps is not None
    assert c.patience is not None
    assert c.start == "principal"
    assert Plan.of(c, count).batch_size <= count


def test_auto_leaves_room_for_many_clusters_and_moves_the_slower_for_it():
    narrow, wide = (CppConfig(clusters=clusters).settled(5_000) for clusters in (10, 40))
    assert (narrow.width, wide.width) == (32, 128)
    assert wide.learning_rate == pytest.approx(narrow.learning_rate / 4)
    assert CppConfig(clusters=1_000).settled(5_000).width == 128
