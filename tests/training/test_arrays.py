from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.errors import DataError
from rayclust.methods import TemiConfig
from rayclust.training.arrays import fit_arrays

K = 4


def _planted(rows: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows around K corners, each row's neighbours among its own kind, and the kinds."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % K
    x = (np.eye(K, 16)[labels] + 0.1 * rng.standard_normal((rows, 16))).astype(np.float32)
    x -= x.mean(0)
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    return x, np.argsort(-similarity, axis=1)[:, :10].copy(), labels


@pytest.mark.parametrize("loss", ["temi", "pmi", "wmi", "scan"])
def test_every_loss_finds_planted_clusters(loss: str):
    x, neighbors, labels = _planted()
    config = TemiConfig.model_validate(
        {
            "clusters": K,
            "preset": "none",
            "loss": loss,
            "heads": 3,
            "hidden": 32,
            "batch_size": 120,
            "steps": 150,
            "learning_rate": 5e-3,
            "warmup_steps": 10,
            "beta": 0.7,
        }
    )
    found = fit_arrays(x, neighbors, config, seed=1).assign(torch.from_numpy(x)).argmax(1).numpy()
    table = np.zeros((K, K), dtype=int)
    np.add.at(table, (found, labels), 1)
    purity = table.max(1).sum() / len(labels)
    assert purity > 0.9


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    x, neighbors, _ = _planted(60)
    config = TemiConfig(clusters=K, preset="none", heads=2, steps=3, learning_rate=1e-2, warmup_steps=0)
    first, again, other = (fit_arrays(x, neighbors, config, seed).assign(torch.from_numpy(x)) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_method_of_pairs_needs_neighbours():
    x, _, _ = _planted(60)
    with pytest.raises(DataError, match="neighbors = None"):
        fit_arrays(x, None, TemiConfig(clusters=K, preset="none"))
