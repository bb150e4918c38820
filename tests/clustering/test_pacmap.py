from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.clustering.pacmap import CANDIDATES, FEW_ROWS, _Pairs, near_pairs, place, planar_map
from rayclust.metrics.geometry import neighbor_precision


def unit(x: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(x, np.float32)), dim=1)


def nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """All other rows that a map wants, by sorting all cosines."""
    cosine = (x @ x.T).fill_diagonal_(-2)
    wanted = min(len(x) - 1, near_pairs(len(x)) + CANDIDATES)
    similarity, neighbors = cosine.sort(dim=1, descending=True, stable=True)
    return neighbors[:, :wanted], similarity[:, :wanted]


def mapped(x: np.ndarray, seed: int = 0) -> np.ndarray:
    rows = unit(x)
    return planar_map(rows, *nearest(rows), seed)


def groups(per_group: int = 20, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centers = 4 * np.eye(4, width)
    labels = np.repeat(range(4), per_group)
    return centers[labels] + 0.3 * rng.normal(size=(4 * per_group, width)), labels


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (24, 6), (40, 10), (10_000, 10), (100_000, 25), (1_000_000, 40)])
def test_more_rows_have_more_pairs(count: int, pairs: int):
    assert near_pairs(count) == pairs


def test_partners_are_drawn_as_the_paper_says():
    x, _ = groups(30)
    rows = unit(x)
    neighbors, similarity = nearest(rows)
    pairs = _Pairs(rows, neighbors, similarity, seed=0)
    # Near: the ten smallest of the scaled distances, one by one.
    d = torch.cdist(rows.double(), rows.double())
    sigma = [float(np.mean(sorted(row)[4:7])) for row in d.tolist()]  # place 0 is itself
    for i in (0, 31, 119):
        scaled = {j: float(d[i, j]) ** 2 / (sigma[i] * sigma[j]) for j in neighbors[i].tolist()}
        chosen = sorted(scaled[j] for j in pairs.near[i].tolist())
        np.testing.assert_allclose(chosen, sorted(scaled.values())[:10], rtol=1e-3)
    # Mid-near: five, nearer than rows drawn at random. Further: twenty, none of them near, any of the others.
    own = torch.arange(120)[:, None]
    assert pairs.mid_near.shape == (120, 5)
    assert not (pairs.mid_near == own).any()
    assert d.gather(1, pairs.mid_near).mean() < d.gather(1, pairs.further).mean()
    assert pairs.further.shape == (120, 20)
    left_out = torch.cat([pairs.near, own], dim=1)
    assert not (pairs.further[:, :, None] == left_out[:, None, :]).any()
    assert (pairs.further.min(), pairs.further.max()) == (0, 119)


def test_the_gradient_is_that_of_the_loss():
    rows = unit(groups(5)[0])
    pairs = _Pairs(rows, *nearest(rows), seed=1)
    y = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def loss(partners: Tensor, of: float) -> Tensor:
        d = 1 + (y[:, :, None] - y[:, partners]).square().sum(0)
        return (d / (of + d)).sum() if of else (1 / (1 + d)).sum()

    wanted = 2 * loss(pairs.near, 10) + 500 * loss(pairs.mid_near, 10_000) + loss(pairs.further, 0)
    wanted.backward()
    assert y.grad is not None
    torch.testing.assert_close(pairs.gradient(y.detach(), 2.0, 500.0), y.grad)


def test_groups_stay_together_and_the_map_fills_its_square():
    x, labels = groups()
    flat = mapped(x)
    assert (flat.shape, flat.dtype) == ((80, 2), np.float32)
    assert np.abs(flat).max() == 1
    np.testing.assert_allclose(flat.min(0) + flat.max(0), 0, atol=1e-6)
    assert neighbor_precision(flat, labels, 5) == 1


def test_equal_rows_and_seeds_give_equal_maps():
    x, _ = groups(6)
    np.testing.assert_array_equal(mapped(x, 3), mapped(x, 3))
    assert not np.array_equal(mapped(x, 3), mapped(x, 4))


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (FEW_ROWS, 5), (FEW_ROWS + 1, 1), (40, 2), (12, 300)])
def test_few_rows_and_odd_widths_have_a_map(shape: tuple[int, int]):
    flat = mapped(np.random.default_rng(0).normal(size=shape))
    assert flat.shape == (shape[0], 2)
    assert np.isfinite(flat).all()


def test_rows_that_are_all_alike_lie_in_one_place_and_some_alike_lie_near():
    assert not mapped(np.ones((30, 4))).any()
    x = np.random.default_rng(0).normal(size=(60, 4))
    x[:20] = x[0]
    assert np.isfinite(mapped(x)).all()


def test_a_new_row_lies_among_its_neighbours_and_nearest_to_the_nearest():
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # Distances √(2 − 2s) of 0.1, 0.1 and 0.4: weights 1, 1 and exp(−0.3 / 0.1), as 0.1 is the mean of 0, 0 and 0.3.
    similarity = 1 - torch.tensor([[0.1, 0.1, 0.4]]).square() / 2
    third = np.exp(-3.0)
    found = place(places, torch.tensor([[0, 1, 2]]), similarity)
    np.testing.assert_allclose(found, [[1 / (2 + third), third / (2 + third)]], atol=1e-4)
    same = place(places, torch.tensor([[0, 1, 2]]), torch.full((1, 3), 0.5))
    np.testing.assert_allclose(same, [[1 / 3, 1 / 3]], atol=1e-6)
