from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.errors import ShapeError
from rayclust.metrics import calibration
from rayclust.metrics.calibration import Calibration, calibrate, measure, sample_size


def planted(count: int, groups: int, spread: float, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit rows around some directions, and which."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(groups, size=count)
    x = rng.normal(size=(groups, width))[labels] + spread * rng.normal(size=(count, width))
    return torch.nn.functional.normalize(torch.from_numpy(x.astype(np.float32)), dim=1), torch.from_numpy(labels)


def test_a_map_is_linear_between_knots():
    curve = Calibration((0.0, 0.5, 0.9, 1.0), (0.1, 0.2, 0.4, 0.9))
    found = curve(np.array([0.0, 0.25, 0.5, 0.7, 0.95, 1.0], np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.1, 0.15, 0.2, 0.3, 0.65, 0.9], rtol=1e-5)
    assert curve(np.zeros(0, np.float32)).shape == (0,)


def test_measures_worked_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(4, 0)
    right = torch.arange(2).repeat_interleave(4)
    share, again = measure(x, right, 2)
    # Of 8/2 = 4 nearest, three are of the own cluster: (3/4 − 1/2) / (1 − 1/2). Halves have both groups.
    assert share.tolist() == [0.5] * 8
    assert again == 1.0
    # Clusters that cut across: one to two of the four nearest, none beyond chance, and half found again.
    share, again = measure(x, torch.tensor([0, 1] * 4), 2)
    assert share.max() <= 0.5
    assert again == 0.5


@pytest.mark.parametrize("spread", [0.2, 0.6, 1.6])
def test_more_is_right_where_groups_are_apart_and_probabilities_stay_in_order(spread: float):
    x, labels = planted(3000, 10, spread)
    probability = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    curve = calibrate(x, labels, probability, 10)
    confidence = curve(probability.numpy())
    assert (np.diff(confidence[np.argsort(probability.numpy())]) >= 0).all()
    assert len(curve.probabilities) <= calibration.KNOTS + 2
    assert (np.diff(curve.shares) > 0).all()
    assert 0 < min(curve.shares) < max(curve.shares) < 1
    assert (confidence.mean() > 0.9) == (spread < 0.8)


def test_clusters_by_chance_are_not_believed():
    x, _ = planted(2000, 10, 0.3)
    chance = torch.randint(10, (2000,), generator=torch.Generator().manual_seed(1))
    sure = calibrate(x, chance, torch.full((2000,), 0.99) + 0.01 * torch.rand(2000), 10)
    assert max(sure.shares) < 0.02


def test_the_same_rows_give_the_same_map():
    x, labels = planted(500, 4, 0.5)
    probability = torch.rand(500, generator=torch.Generator().manual_seed(0))
    assert calibrate(x, labels, probability, 4) == calibrate(x, labels, probability, 4)


@pytest.mark.parametrize("count", [2, 3, 5, 50])
def test_few_equal_or_zero_rows_have_a_map(count: int):
    for x in (torch.ones(count, 3), torch.zeros(count, 3), torch.eye(count)):
        labels = torch.arange(count) % 2
        for probability in (torch.ones(count), torch.linspace(0, 1, count)):
            curve = calibrate(x, labels, probability, 2)
            assert np.isfinite(curve(probability.numpy())).all()
    # As many clusters as rows.
    assert np.isfinite(calibrate(torch.eye(count), torch.arange(count), torch.ones(count), count).shares).all()


def test_of_many_clusters_some_that_lie_together_are_measured(monkeypatch: pytest.MonkeyPatch):
    x, labels = planted(4000, 60, 0.3)
    whole = measure(x, labels, 60)
    monkeypatch.setattr(calibration, "MOST_CLUSTERS", 12)
    share, again = measure(x, labels, 60)
    assert len(share) < 1500
    assert abs(share.mean() - whole[0].mean()) < 0.1
    assert abs(again - whole[1]) < 0.2


def test_size_of_the_sample():
    assert [sample_size(*pair) for pair in ((300, 10), (10**6, 10), (10**6, 5000), (10**9, 10**6))] == [
        300, 8192, 40_000, 65_536,
    ]  # fmt: skip


def test_a_single_row_or_other_lengths_are_refused():
    for x, clusters in ((torch.ones(1, 3), torch.zeros(1)), (torch.ones(4, 3), torch.zeros(3))):
        with pytest.raises(ShapeError, match="as many of each are needed, two at least"):
            measure(x, clusters.long(), 2)
