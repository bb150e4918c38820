from __future__ import annotations

import logging
import math

import pytest
import torch

from rayclust.losses.information import Marginal
from rayclust.methods import Temi, TemiConfig, build
from rayclust.methods.temi_health import Health
from rayclust.training.loop import Trainer
from rayclust.training.pairs import ArrayRows

K = 20


def _health() -> Health:
    """An even head, and one that has put 99 % into one cluster."""
    marginal = Marginal(2, K)
    marginal.shares[1] = 0.01 / (K - 1)
    marginal.shares[1, 3] = 0.99
    return Health(marginal.entropy(), marginal.live(), marginal.shares.amax(1), torch.tensor([0.4, 0.98]), K)


def test_the_row_has_every_head_and_the_best():
    row = _health().row(best=1)
    assert row["head_live_clusters"] == [K, 1]
    assert row["head_entropies"][0] == pytest.approx(math.log(K))
    assert row["head_largest_shares"] == pytest.approx([1 / K, 0.99])
    assert (row["live_clusters"], row["collapsed_heads"]) == (1, 1)
    assert row["largest_share"] == pytest.approx(0.99)
    assert row["agreement"] == pytest.approx(0.98)


def test_a_collapse_of_the_best_head_is_told_with_what_to_do(caplog: pytest.LogCaptureFixture):
    config = TemiConfig(clusters=K, preset="none", beta=1.0)
    with caplog.at_level(logging.WARNING):
        assert not _health().watch(0, config)
        assert not caplog.records
        assert _health().watch(1, config)
    assert "head 1 has 1 live clusters of 20" in caplog.text
    assert "method.beta below 1, such as 0.9" in caplog.text


def test_without_room_below_beta_the_rate_is_to_blame(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        _health().watch(1, TemiConfig(clusters=K, preset="none", beta=0.5))
    assert "lower method.learning_rate" in caplog.text


def test_classes_of_very_different_size_are_no_collapse():
    marginal = Marginal(1, 10)
    marginal.shares[0], marginal.shares[0, 0] = 0.1 / 9, 0.9
    health = Health(marginal.entropy(), marginal.live(), marginal.shares.amax(1), torch.tensor([0.9]), 10)
    assert float(health.entropy[0]) < 0.5 * math.log(10)
    assert not health.collapsed().any()


@pytest.mark.parametrize("stops", [False, True])
def test_training_ends_at_a_collapse_where_that_is_asked_for(stops: bool):
    settings = {"clusters": K, "preset": "none", "heads": 2, "hidden": 8, "bottleneck": 5, "batch_size": 20}
    settings |= {"epochs": 4, "marginal_momentum": 0.0, "stop_on_collapse": stops}
    method = build(TemiConfig.model_validate(settings), 6, 20, seed=0)
    assert isinstance(method, Temi)
    with torch.no_grad():
        for heads in (method.student, method.teacher):
            heads.scale.zero_()
            heads.scale[:, 0] = 50.0  # one cluster takes all rows on its side, and nothing can take them away
            heads.direction[:, 0] = 0.0
            heads.direction[:, 0, 0] = 1.0
            heads.biases[-1].fill_(5.0)
    trainer = Trainer(0)
    method.fit(ArrayRows(torch.randn(20, 6), (torch.arange(20)[:, None] + torch.arange(1, 4)) % 20), trainer)
    assert trainer.history[0]["collapsed_heads"] == 2
    assert len(trainer.history) == (1 if stops else 4)
