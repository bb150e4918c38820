from __future__ import annotations

import math

import pytest
import torch

from rayclust.clustering.neighborhood import (
    graph_eigenpairs,
    mean_of_neighbors,
    modularity,
    modularity_terms,
    smooth,
)
from rayclust.errors import ShapeError


def test_smoothing_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    neighbors = torch.tensor([[1, -1], [0, 2], [-1, -1]])
    half = 1 / math.sqrt(2)
    assert smooth(x, neighbors, 1).allclose(torch.tensor([[half, half], [half, half], [0.0, 0.0]]))
    assert smooth(x, neighbors, 0).allclose(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


def test_smoothing_in_blocks_is_smoothing(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator)
    neighbors = torch.randint(-1, 50, (50, 4), generator=generator)
    whole = smooth(x, neighbors, 2)
    monkeypatch.setattr("rayclust.clustering.neighborhood._GATHERED", 40)
    assert smooth(x, neighbors, 2).equal(whole)


def test_modularity_by_hand():
    # two pairs of rows, each row pointing at the other one of its pair
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    neighbors = torch.tensor([[1], [0], [3], [2]])
    terms = modularity_terms(labels, labels[:, neighbors], 2)
    assert terms.tolist() == [[2, 2, 4, 4], [2, 2, 0, 4], [4, 0, 4, 4]]
    assert modularity(terms).tolist() == [0.5, -0.5, 0.0]


def test_missing_neighbours_do_not_count_and_parts_add_up():
    labels = torch.tensor([[0, 0, 1, 1]])
    found = torch.tensor([[[0, -1], [1, 0], [-1, -1], [1, 1]]])
    whole = modularity_terms(labels, found, 2)
    assert whole.tolist() == [[2, 2, 4, 5]]
    parts = modularity_terms(labels[:, :2], found[:, :2], 2) + modularity_terms(labels[:, 2:], found[:, 2:], 2)
    assert parts.equal(whole)


def test_rows_and_neighbours_are_matrices():
    with pytest.raises(ShapeError):
        smooth(torch.zeros(3), torch.zeros(3, 1).long())


def test_eigenpairs_of_the_graph_of_two_rings():
    """A ring of n rows and their two neighbours has the eigenvalues cos 2πk/n; two rings have each twice."""
    place = torch.arange(24)
    ring = torch.stack([(place + 1) % 12, (place - 1) % 12], dim=1) + (place // 12 * 12)[:, None]
    pairs = graph_eigenpairs(mean_of_neighbors(ring), 6, seed=0)
    wanted = [1.0, 1.0, *[math.cos(math.pi / 6)] * 4]
    assert pairs.values.tolist() == pytest.approx(wanted, abs=1e-3)
    # The first two tell the rings apart: rows of one are equal up to sign, of two orthogonal.
    apart = torch.nn.functional.normalize(pairs.vectors[:, :2], dim=1) @ pairs.vectors[:, :2].T
    assert apart[:12, :12].min() > 0.2
    assert apart[:12, 12:].abs().max() < 1e-2


def test_a_row_without_neighbours_has_no_weights():
    graph = mean_of_neighbors(torch.tensor([[1, 2], [0, -1], [-1, -1]])).toarray()
    assert graph.tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
