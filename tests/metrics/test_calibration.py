from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.errors import ShapeError
from rayclust.metrics import calibration
from rayclust.metrics.calibration import Calibration, Evidence, calibrate, crowding, measure, rising_map


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
    x = torch.eye(3).repeat_interleave(40, 0)
    right = torch.arange(3).repeat_interleave(40)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    found = measure(x[order], right[order], 3)
    # Of 120/3 = 40 nearest, 39 are of the own cluster: (39/40 − 1/3) / (1 − 1/3). Halves and graph have the groups, and
    # a group's graph of six neighbours that are equally near holds together or not.
    assert found.nearest == found.again == found.spectral == 1.0
    assert found.around == pytest.approx((39 / 40 - 1 / 3) * 1.5)
    # Clusters of their own sizes that cut across all groups.
    across = measure(x[order], torch.arange(120) % 3, 3)
    assert max(across.nearest, across.around, across.again, across.spectral) < 0.2
    assert across.crowding == found.crowding == 0.0  # exact copies are none
    # Log odds of 0.98, three times, and of what is around; shares of 0 count as 0.02.
    around = np.log(found.around / (1 - found.around))
    np.testing.assert_allclose(found.inputs(), [(3 * np.log(49) + around) / 4, 0.0])
    assert Evidence(0.0, 0.0, 0.0, 0.0, 0.5).inputs().tolist() == pytest.approx([-np.log(49), 0.5])
    assert Evidence(0.0, 0.0, 0.0, 0.0, -2.0).inputs()[1] == -calibration.MOST_CROWDING


def test_crowding_is_that_of_distances_worked_by_hand():
    # One row, with nearest rows at 1/2, 1, and eight times at 1: by two neighbours 1 / ln 2, by ten 9 / ln 2.
    distances = torch.tensor([[0.5] + 9 * [1.0]])
    assert crowding(1 - distances**2 / 2) == pytest.approx(np.log(9), rel=1e-6)
    # Copies before them are passed over; fewer columns than ten repeat the last.
    copies = torch.cat([torch.tensor([[0.0, 1e-4]]), distances], 1)
    assert crowding(1 - copies.double() ** 2 / 2) == pytest.approx(np.log(9), rel=1e-6)
    assert crowding(1 - distances[:, :2] ** 2 / 2) == pytest.approx(np.log(9), rel=1e-6)
    assert crowding(torch.ones(3, 12)) == crowding(torch.zeros(3, 1)) == 0.0


@pytest.mark.parametrize("dimension", [2, 5])
def test_rows_that_fill_their_space_are_not_crowded_and_pairs_are(dimension: int):
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(1200, dimension + 1, generator=generator)
    pairs = even[:600].repeat(2, 1) + 0.01 * torch.randn(1200, dimension + 1, generator=generator)
    found = [measure(x, torch.arange(1200) % 2, 2).crowding for x in (even, pairs, even[:600].repeat(2, 1))]
    assert abs(found[0]) < 0.1
    assert found[1] > 0.5
    assert abs(found[2]) < 0.1


def test_near_copies_support_clusters_less():
    x, labels = planted(1200, 6, 0.4)
    probability = torch.rand(1200, generator=torch.Generator().manual_seed(0))
    crowded = (x[:600] + 0.01 * torch.randn(2, 600, 16, generator=torch.Generator().manual_seed(1))).flatten(0, 1)
    levels = [
        calibrate(rows, names, probability, 6)(probability.numpy()).mean()
        for rows, names in ((x, labels), (crowded, labels[:600].repeat(2)))
    ]
    assert levels[1] < levels[0]


@pytest.mark.parametrize("level", [0.0, 0.3, 0.9, 1.0])
def test_the_mean_of_the_map_is_the_level_and_rows_stay_in_order(level: float):
    probability = np.random.default_rng(0).beta(5, 1, 3000)
    curve = rising_map(probability, level)
    confidence = curve(probability)
    assert confidence.mean() == pytest.approx(np.clip(level, 0.02, 0.98), abs=2e-3)
    assert (np.diff(confidence[np.argsort(probability)]) >= 0).all()
    assert (np.diff(curve.shares) > 0).all()
    assert 0.015 < min(curve.shares) < max(curve.shares) < 0.985
    # Of a level between, log odds scatter as they are told to, in proportion to it.
    odds = np.log(confidence / (1 - confidence))
    assert level != 0.3 or odds.std() == pytest.approx(0.3 * calibration.SPREAD, rel=0.1)
    # More spread, more apart; none, all alike.
    assert confidence.std() >= rising_map(probability, level, 0.1)(probability).std()


@pytest.mark.parametrize("spread", [0.2, 0.6, 1.6])
def test_more_is_right_where_groups_are_apart(spread: float):
    x, labels = planted(2000, 10, spread)
    probability = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    curve = calibrate(x, labels, probability, 10)
    assert len(curve.probabilities) <= calibration.KNOTS + 2
    assert (curve(probability.numpy()).mean() > 0.85) == (spread < 0.8)


def test_clusters_by_chance_are_not_believed():
    x, _ = planted(2000, 10, 0.3)
    chance = torch.randint(10, (2000,), generator=torch.Generator().manual_seed(1))
    sure = 0.99 + 0.01 * torch.rand(2000)
    assert calibrate(x, chance, sure, 10)(sure.numpy()).max() < 0.1


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
    x, labels = planted(1600, 40, 0.3)
    whole = measure(x, labels, 40)
    monkeypatch.setattr(calibration, "MOST_CLUSTERS", 12)
    near = measure(x, labels, 40)
    assert near != whole
    assert abs(near.around - whole.around) < 0.1
    assert abs(near.again - whole.again) < 0.2
    # Clusters without rows are not among them: two opposite rows of very many clusters.
    assert 0 <= measure(torch.tensor([[1.0], [-1.0]]), torch.tensor([3, 90]), 100).around <= 1
    # Rows beyond a number are left out.
    monkeypatch.setattr(calibration, "MEASURED_ROWS", 500)
    assert measure(x, labels % 10, 10) == measure(x[:500], labels[:500] % 10, 10)


def test_a_single_row_or_other_lengths_are_refused():
    for x, clusters in ((torch.ones(1, 3), torch.zeros(1)), (torch.ones(4, 3), torch.zeros(3))):
        with pytest.raises(ShapeError, match="as many of each are needed, two at least"):
            measure(x, clusters.long(), 2)
