from __future__ import annotations

from typing import Any

import pytest

from rayclust.methods import TemiConfig


def _settled(preset: str, clusters: int, count: int, **written: Any) -> TemiConfig:
    config = TemiConfig.model_validate({"clusters": clusters, "preset": preset, **written})
    return config.settled(count, 768)


@pytest.mark.parametrize(
    ("clusters", "count", "expected"),
    [
        (10, 50_000, (50, 50, 200, 512, 20, 0.6)),  # CIFAR-10
        (20, 50_000, (50, 50, 200, 512, 20, 0.55)),  # CIFAR-20
        (100, 50_000, (50, 50, 200, 512, 20, 0.6)),  # CIFAR-100
        (10, 5_000, (50, 50, 800, 512, 20, 0.6)),  # STL-10
        (50, 64_274, (50, 25, 200, 1024, 10, 0.6)),  # ImageNet-50
        (1_000, 1_281_167, (50, 25, 200, 1024, 10, 0.6)),  # ImageNet
        (25_000, 1_281_167, (50, 25, 200, 1024, 10, 1.0)),  # over-clustering
    ],
)
def test_paper_settings_by_the_size_of_its_data_sets(clusters: int, count: int, expected: tuple[Any, ...]):
    c = _settled("paper", clusters, count)
    assert (c.heads, c.neighbors, c.epochs, c.batch_size, c.warmup_epochs, c.beta) == expected


@pytest.mark.parametrize(
    ("clusters", "count", "expected"),
    [
        (10, 50_000, (16, 50, 100, 1024, 20, 0.6)),
        (1_000, 1_281_167, (16, 25, 100, 1024, 20, 0.6)),
        (25_000, 1_281_167, (16, 25, 100, 128, 20, 1.0)),
    ],
)
def test_readme_settings(clusters: int, count: int, expected: tuple[Any, ...]):
    c = _settled("readme", clusters, count)
    assert (c.heads, c.neighbors, c.epochs, c.batch_size, c.warmup_epochs, c.beta) == expected


@pytest.mark.parametrize("preset", ["readme", "paper"])
def test_published_rates_and_momenta(preset: str):
    c = _settled(preset, 10, 50_000)
    assert (c.learning_rate, c.min_learning_rate) == (1e-4, 1e-4)
    assert (c.teacher_momentum, c.final_teacher_momentum) == (0.996, 0.996)
    assert (c.student_temperature, c.teacher_temperature, c.marginal_momentum) == (0.1, 0.1, 0.9)
    assert (c.optimizer, c.weight_decay, c.freeze_last_layer, c.steps) == ("adamw", 1e-4, 1, None)


@pytest.mark.parametrize("preset", ["auto", "readme", "paper", "none"])
def test_what_is_written_wins_over_every_preset_and_settling_twice_changes_nothing(preset: str):
    c = _settled(preset, 10, 50_000, heads=3, beta=0.77, batch_size=64)
    assert (c.heads, c.beta, c.batch_size, c.preset) == (3, 0.77, 64, "none")
    assert c.settled(7, 7) == c
    assert TemiConfig.model_validate(c.model_dump(mode="json")) == c


def test_short_trainings_start_warm_unless_told_otherwise():
    assert _settled("readme", 10, 3_000, epochs=200, batch_size=512).warm_start == "kmeans"
    assert _settled("readme", 10, 3_000, warm_start="none").warm_start == "none"
    assert _settled("readme", 10, 3_000, steps=5_000).warm_start == "none"
    assert {_settled(preset, 10, 50_000).warm_start for preset in ("readme", "paper")} == {"none"}
