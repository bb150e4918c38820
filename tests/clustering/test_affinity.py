from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayclust.clustering import affinity
from rayclust.clustering.affinity import Affinity, NormalizedMembership, balance, kernel, unit
from rayclust.errors import ConfigError, ShapeError
from tests import references
from tests.workers import on_two_workers


def codes(count: int = 60, width: int = 5, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn((count, width), generator=torch.Generator().manual_seed(seed)))


def membership(c: torch.Tensor, temperature: float, half_steps: int | None = None) -> torch.Tensor:
    scaling = balance(Affinity(c, temperature), half_steps)
    return scaling.rows[:, None] * kernel(c, c, temperature).fill_diagonal_(1.0) * scaling.columns


def test_equal_codes_share_evenly():
    torch.testing.assert_close(membership(codes(1).expand(7, -1), 0.1), torch.full((7, 7), 1 / 7))


def test_two_orthogonal_groups_by_hand():
    found = membership(torch.eye(4)[[0, 0, 0, 1, 1, 1]], 0.1)
    inside, outside = (math.exp(s / 0.1) / (3 * math.exp(10) + 3) for s in (1, 0))
    torch.testing.assert_close(found[:3, :3], torch.full((3, 3), inside))
    torch.testing.assert_close(found[:3, 3:], torch.full((3, 3), outside))
    assert inside == pytest.approx(0.333318, abs=1e-6)
    assert outside == pytest.approx(1.513e-5, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.175, 10.0])
def test_rows_and_columns_sum_to_one(temperature: float):
    found = membership(codes(), temperature)
    torch.testing.assert_close(found.sum(1), torch.ones(60), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(0), torch.ones(60), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, found.T)
    assert balance(Affinity(codes(), temperature)).error < 1e-5


def test_the_temperature_goes_from_each_row_alone_to_all_alike():
    torch.testing.assert_close(membership(codes(), 1e-4), torch.eye(60), atol=1e-5, rtol=0)
    torch.testing.assert_close(membership(codes(), 1e4), torch.full((60, 60), 1 / 60), atol=1e-5, rtol=0)


def test_signs_play_no_part():
    c = codes()
    signs = torch.where(torch.arange(60) % 3 == 0, -1.0, 1.0)[:, None]
    torch.testing.assert_close(membership(c * signs, 0.1), membership(c, 0.1))


@pytest.mark.parametrize("half_steps", [1, 5])
def test_half_steps_are_the_plain_form(half_steps: int):
    expected = references.membership(codes().double().numpy(), 0.1, half_steps)
    np.testing.assert_allclose(membership(codes(), 0.1, half_steps).numpy(), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(expected.sum(1), 1.0)


def test_the_symmetric_steps_reach_what_half_steps_reach():
    expected = references.membership(codes().double().numpy(), 0.1, 2001)
    np.testing.assert_allclose(membership(codes(), 0.1).numpy(), expected, rtol=1e-4, atol=1e-7)


def test_tiles_are_the_kept_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(affinity, "_ENTRIES_ON_CPU", 60 * 17)
    c, x = codes(90), torch.randn((90, 3), generator=torch.Generator().manual_seed(5))
    kept, tiled = Affinity(c, 0.1, weight=2.0), Affinity(c, 0.1, weight=2.0, keep=False)
    tiled._rows_at_once, tiled._columns_at_once = 13, 17
    dense = 2.0 * (kernel(c, c, 0.1) - torch.eye(90)) @ x
    torch.testing.assert_close(kept.product(x), dense, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(tiled.product(x), dense, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("half_steps", [None, 5])
def test_the_normalised_membership_is_the_plain_form(half_steps: int | None):
    c = codes()
    operator = NormalizedMembership(Affinity(c, 0.1), balance(Affinity(c, 0.1), half_steps))
    linked = references.membership(c.double().numpy(), 0.1, half_steps or 2001)
    np.fill_diagonal(linked, 0.0)
    root = np.sqrt(linked.sum(0))
    expected = 0.5 * (linked + linked.T) / root[:, None] / root
    np.testing.assert_allclose(operator.product(torch.eye(60)).numpy(), expected, rtol=2e-4, atol=1e-6)


def test_a_code_that_meets_no_other_is_safe():
    c = torch.eye(4)[[0, 0, 1, 1, 2]]
    operator = NormalizedMembership(Affinity(c, 1e-3), balance(Affinity(c, 1e-3)))
    assert operator.degrees[4] == 0
    assert operator.product(torch.eye(5)).isfinite().all()
    assert (operator.product(torch.eye(5))[4] == 0).all()


def _on_worker(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    c, x = codes(61), torch.randn((61, 3), generator=torch.Generator().manual_seed(5))
    kept = Affinity(c, 0.1)
    return balance(kept).rows, NormalizedMembership(Affinity(c, 0.1, keep=False), balance(kept)).product(x)


def test_two_workers_are_one():
    alone = _on_worker(0, 1)
    for found in on_two_workers(_on_worker):
        for part, whole in zip(found, alone, strict=True):
            torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


def test_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="temperature = 0: must be above 0"):
        Affinity(codes(), 0)
    with pytest.raises(ConfigError, match="half_steps = 4: must be odd"):
        balance(Affinity(codes(), 0.1), 4)
    with pytest.raises(ShapeError, match="two axes"):
        Affinity(torch.ones(3), 0.1)
