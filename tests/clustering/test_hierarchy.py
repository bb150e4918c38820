from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rayclust.clustering.hierarchy import nest
from rayclust.errors import ConfigError


def _prototypes() -> torch.Tensor:
    """Two continents of three countries of five towns: 30 directions."""
    generator = torch.Generator().manual_seed(0)
    continents = torch.eye(2, 16).repeat_interleave(15, 0)
    countries = 0.5 * torch.eye(6, 16).roll(2, dims=1).repeat_interleave(5, 0)
    lengths = 0.5 + torch.rand(30, 1, generator=generator)
    return lengths * (continents + countries + 0.05 * torch.randn(30, 16, generator=generator))


def test_planted_levels_are_found():
    countries, continents = nest(_prototypes(), [6, 2])
    for group in countries.view(6, 5):
        assert len(set(group.tolist())) == 1
    assert len(set(countries.tolist())) == 6
    for group in continents.view(2, 15):
        assert len(set(group.tolist())) == 1
    assert len(set(continents.tolist())) == 2


def test_each_level_lies_in_the_next():
    prototypes = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    levels = nest(prototypes, [40, 12, 3], seed=5)
    for fine, coarse in pairwise(levels):
        assert all(len(coarse[fine == cluster].unique()) == 1 for cluster in fine.unique())
    assert [int(level.max()) + 1 for level in levels] == [40, 12, 3]
    assert all(a.equal(b) for a, b in zip(levels, nest(prototypes, [40, 12, 3], seed=5), strict=True))


@pytest.mark.parametrize("sizes", [[30], [10, 10], [5, 8], [10, 1]])
def test_levels_that_do_not_fall_are_refused(sizes: list[int]):
    with pytest.raises(ConfigError, match="finest level first"):
        nest(_prototypes(), sizes)


def test_without_levels_there_is_nothing_to_do():
    assert nest(_prototypes(), []) == []
