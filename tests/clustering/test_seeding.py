from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.clustering import seeding
from rayclust.clustering.seeding import kmeans_plusplus
from rayclust.errors import ConfigError
from tests.references import greedy_seeds


def rows(count: int = 120, offset: float = 0.0) -> Tensor:
    rng = np.random.default_rng(0)
    centers = 4.0 * rng.normal(size=(8, 5))
    return torch.from_numpy(centers[rng.integers(8, size=count)] + rng.normal(size=(count, 5)) + offset).float()


@pytest.mark.parametrize("clusters", [1, 2, 8, 30])
def test_agrees_with_the_slow_form(clusters: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seeding, "_DISTANCES_AT_ONCE", 500)
    x = rows()
    found = kmeans_plusplus(x, clusters, [0, (1, 2), 3])
    expected = [greedy_seeds(x.double().numpy(), clusters, seed) for seed in (0, (1, 2), 3)]
    assert found.tolist() == expected


def test_seeds_lie_in_different_clusters_when_those_are_far_apart():
    labels = torch.arange(60) % 6
    x = 100.0 * torch.eye(6)[labels] + torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    chosen = kmeans_plusplus(x, 6, range(20))
    assert all(len(labels[row].unique()) == 6 for row in chosen)


def test_better_than_seeds_at_random():
    x = rows(500)
    chosen = kmeans_plusplus(x, 8, range(30))
    random = torch.from_numpy(np.stack([np.random.default_rng(s).choice(500, 8, False) for s in range(30)]))

    def inertia(seeds: Tensor) -> float:
        return float(np.mean([torch.cdist(x, x[row]).min(1)[0].square().sum() for row in seeds]))

    assert inertia(chosen) < 0.7 * inertia(random)


def test_far_from_zero_the_same_rows_are_drawn():
    assert torch.equal(kmeans_plusplus(rows(), 8, range(5)), kmeans_plusplus(rows(offset=500.0), 8, range(5)))


def test_never_draws_a_row_twice_while_others_differ():
    for row in kmeans_plusplus(rows(40), 40, range(5)):
        assert len(row.unique()) == 40


def test_equal_rows():
    chosen = kmeans_plusplus(torch.ones(5, 2), 3, [0])
    assert chosen.shape == (1, 3)


def test_refuses_more_clusters_than_rows():
    with pytest.raises(ConfigError, match="clusters = 6: at most the number of rows, 5"):
        kmeans_plusplus(torch.ones(5, 2), 6, [0])
