from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from rayclust.methods import TemiConfig
from rayclust.methods.base import Plan
from rayclust.methods.temi_auto import auto_settings, neighbors_for
from rayclust.metrics.external import accuracy
from rayclust.search.knn import top_k
from rayclust.training.arrays import fit_arrays

GRID = [
    (count, dimension, clusters)
    for count, dimension, clusters in itertools.product(
        [2, 3, 50, 500, 3_000, 10_000, 50_000, 1_281_167], [1, 64, 768, 1280], [2, 3, 10, 100, 1_000, 25_000]
    )
    if clusters <= count
]


def _settled(count: int, dimension: int, clusters: int, **written: Any) -> TemiConfig:
    return TemiConfig.model_validate({"clusters": clusters, **written}).settled(count, dimension)


@pytest.mark.parametrize(("count", "dimension", "clusters"), GRID)
def test_settings_are_possible_for_every_size(count: int, dimension: int, clusters: int):
    c = _settled(count, dimension, clusters)
    plan = Plan.of(c, count)
    assert 200 <= plan.steps <= max(3_000, 200 * count)
    assert plan.warmup_steps < plan.steps
    assert 1 <= c.neighbors <= 50
    assert c.start_neighbors <= c.neighbors
    assert 0.5 < c.beta <= 1.0
    assert 2e-4 <= c.learning_rate * c.batch_size / 256 * 1.0001 <= 2.1e-3
    assert 0.98 <= c.teacher_momentum <= 0.996


def test_more_clusters_or_rows_never_take_fewer_steps():
    for dimension in (64, 1280):
        by_clusters = [_settled(100_000, dimension, k).steps for k in (2, 10, 100, 1_000)]
        by_rows = [_settled(n, dimension, 100).steps for n in (500, 5_000, 50_000, 500_000)]
        assert by_clusters == sorted(by_clusters)
        assert by_rows == sorted(by_rows)


def test_large_trainings_come_near_to_the_published_one():
    c = _settled(1_281_167, 768, 1_000)
    assert (c.batch_size, c.teacher_momentum) == (1024, 0.996)
    assert c.learning_rate == pytest.approx(2e-4 * 256 / 1024)
    fine = _settled(1_281_167, 768, 25_000)
    assert (fine.warm_start, fine.beta, fine.freeze_last_layer) == ("none", 1.0, 1)


def test_what_is_written_is_heeded_by_what_depends_on_it():
    c = _settled(3_000, 1280, 10, batch_size=128, steps=6_000)
    assert (c.batch_size, c.steps) == (128, 6_000)
    assert (c.learning_rate, c.teacher_momentum) == (pytest.approx(4e-4), 0.996)
    assert auto_settings(3_000, 1280, 10, TemiConfig(clusters=10))["beta"] == 0.8


def test_neighbours_by_hand():
    assert [neighbors_for(n, k) for n, k in ((10_000, 10), (3_000, 10), (50_000, 10), (60, 20), (3, 3), (2, 2))] == [
        32, 17, 50, 3, 2, 1,
    ]  # fmt: skip


def _planted(sizes: list[int], width: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centers = rng.normal(size=(len(sizes), width)) / np.sqrt(width)
    x = centers[labels] + spread * rng.normal(size=(len(labels), width)) / np.sqrt(width)
    x -= x.mean(0)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("sizes", [[60] * 5, [150, 80, 40, 20]], ids=["even", "uneven"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_clusters_are_found_whatever_their_sizes(sizes: list[int], seed: int):
    x, labels = _planted(sizes, 16, 0.35, seed)
    rows = torch.from_numpy(x)
    ids = torch.arange(len(rows))
    neighbors, _ = top_k(rows, rows, 20, query_ids=ids, database_ids=ids)
    config = TemiConfig(clusters=len(sizes), heads=4, steps=60, hidden=64, bottleneck=32, start_restarts=16)
    method = fit_arrays(rows, neighbors, config, seed)
    assert accuracy(labels, method.assign(rows).argmax(1).numpy()) > 0.97
