"""Semantic centres, the choice of nouns, and counterparts: closed forms, and blocks against the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.errors import ConfigError, ShapeError
from rayclust.language import nouns as module
from rayclust.language.nouns import center_count, choose_nouns, classify_nouns, counterparts, score_nouns


def unit(rows: int, width: int, seed: int = 0) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(x, dim=1)


@pytest.mark.parametrize(("rows", "clusters", "wanted"), [
    (50_000, 10, 167), (50_000, 20, 167), (5_000, 10, 17), (13_000, 10, 43), (19_500, 15, 65),
    (3_760, 47, 141), (9_537, 101, 303), (1_281_167, 1000, 4271), (100, 50, 100),
])  # fmt: skip
def test_number_of_centres(rows: int, clusters: int, wanted: int):
    assert center_count(rows, clusters) == wanted


def test_a_noun_belongs_to_its_nearest_centre():
    scores = classify_nouns(torch.tensor([[0.3, 0.2]]))
    assert scores.centers.tolist() == [0]
    assert float(scores.confidence) == pytest.approx(0.5249792, abs=5e-8)
    even = classify_nouns(torch.full((1, 7), 0.11))
    assert float(even.confidence) == pytest.approx(1 / 7, abs=1e-12)


def test_a_constant_on_all_cosines_of_a_noun_changes_nothing():
    similarity = unit(9, 4) @ unit(5, 4, 1).T
    moved = classify_nouns(similarity + torch.linspace(-0.4, 0.4, 9)[:, None])
    before = classify_nouns(similarity)
    assert moved.centers.equal(before.centers)
    torch.testing.assert_close(moved.confidence, before.confidence, rtol=1e-12, atol=0)


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch):
    centers, nouns = unit(6, 8), unit(50, 8, 1)
    whole = classify_nouns(nouns @ centers.T)
    monkeypatch.setattr(module, "_SCORES", 40)
    found = score_nouns(centers * 3, nouns * 2)
    assert found.centers.equal(whole.centers)
    torch.testing.assert_close(found.confidence, whole.confidence)


def test_each_centre_keeps_its_most_certain_nouns_and_of_equal_ones_the_first():
    centers = torch.tensor([1, 1, 0, 1, -1, 1, 0])
    confidence = torch.tensor([0.3, 0.5, 0.4, 0.5, 0.9, 0.2, 0.6], dtype=torch.float64)
    assert choose_nouns(module.NounScores(centers, confidence), 2).tolist() == [6, 2, 1, 3]
    assert choose_nouns(module.NounScores(centers, confidence), 9).tolist() == [6, 2, 1, 3, 0, 5]


def test_centres_and_nouns_without_direction_take_no_part():
    centers = torch.cat([unit(2, 4), torch.zeros(1, 4), torch.full((1, 4), torch.nan)])
    nouns = torch.cat([unit(6, 4, 1), torch.zeros(1, 4)])
    found = score_nouns(centers.float(), nouns.float())
    assert set(found.centers.tolist()) == {0, 1, -1}
    assert found.centers[-1] == -1
    torch.testing.assert_close(found.confidence[:6], score_nouns(centers[:2].float(), nouns[:6].float()).confidence)
    assert 6 not in choose_nouns(found, 9)
    with pytest.raises(ConfigError, match="none of 2 has a direction"):
        score_nouns(centers[2:], nouns)


def two_nouns(first: float, second: float) -> Tensor:
    """An image with these cosines to the first two axes, which are nouns."""
    return torch.tensor([[first, second, math.sqrt(1 - first**2 - second**2)]], dtype=torch.float64)


AXES = torch.eye(2, 3, dtype=torch.float64)


def test_two_nouns_weigh_by_their_cosines():
    found = counterparts(two_nouns(0.30, 0.29), AXES)
    wanted = functional.normalize(torch.tensor([[0.8807971, 0.1192029, 0.0]], dtype=torch.float64), dim=1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


def test_one_noun_is_its_own_counterpart_and_a_high_temperature_takes_the_mean():
    x = unit(4, 3)
    torch.testing.assert_close(counterparts(x, AXES[:1]), AXES[:1].expand(4, 3))
    mean = functional.normalize(AXES.mean(0), dim=0)
    torch.testing.assert_close(counterparts(x, AXES, math.inf), mean.expand(4, 3))


def test_a_noun_that_comes_twice_takes_two_shares():
    x = two_nouns(0.30, 0.30)  # r = 1: a half becomes two thirds
    found = counterparts(x, AXES[[0, 0, 1]])[0]
    assert float(found[0] / found[1]) == pytest.approx(2.0)


def test_blocks_of_nouns_and_rows_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch):
    x, nouns = unit(11, 6), unit(300, 6, 1)
    slow = functional.normalize((x @ nouns.T / 0.02).softmax(1) @ nouns, dim=1)
    torch.testing.assert_close(counterparts(x, nouns, 0.02), slow)
    monkeypatch.setattr(module, "_COLUMNS", 7)
    torch.testing.assert_close(counterparts(x, nouns, 0.02), slow)
    near = (x @ nouns.T).topk(5)
    few = functional.normalize(((near.values / 0.02).softmax(1)[:, :, None] * nouns[near.indices]).sum(1), dim=1)
    torch.testing.assert_close(counterparts(x, nouns, 0.02, top=5), few)
    torch.testing.assert_close(counterparts(x, nouns, 0.02, top=300), slow)


def test_far_nouns_do_not_matter_to_the_precision_of_halves():
    x, nouns = unit(20, 32), unit(500, 32, 1)
    assert float((counterparts(x, nouns, top=20) * counterparts(x, nouns)).sum(1).min()) > 0.999


def test_no_noun_and_other_widths_are_refused():
    assert len(counterparts(AXES[:0], AXES)) == 0
    with pytest.raises(ConfigError, match="nouns = 0"):
        counterparts(AXES, AXES[:0])
    with pytest.raises(ShapeError, match="width 3: 2 is needed"):
        counterparts(AXES, AXES[:, :2])
