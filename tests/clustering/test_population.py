from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.clustering.population import Population, even_sample, gather_rows, survey
from rayclust.errors import DataError, ShapeError
from tests.workers import on_two_workers


def rows(count: int = 50) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0)) + 2.0


def test_moments_are_those_of_the_whole():
    x = rows()
    population = survey(lambda: x.split(7), "euclidean")
    wide = x.double().numpy()
    assert (population.count, population.first) == (50, 0)
    assert np.allclose(population.origin, wide.mean(0))
    assert population.scatter == pytest.approx(((wide - wide.mean(0)) ** 2).sum())
    assert population.variance == pytest.approx(wide.var(0).mean())


def test_directions_are_taken_for_cosine_and_unit_rows_left_alone():
    x = torch.cat([rows(), torch.zeros(1, 3)])
    population = survey(lambda: x.split(7), "cosine")
    unit = torch.nn.functional.normalize(x, dim=1)
    assert torch.equal(torch.cat(list(population.blocks())), unit)
    assert population.scatter == pytest.approx(50.0)
    assert population.origin.tolist() == [0.0, 0.0, 0.0]

    def blocks() -> list[Tensor]:
        return [unit]

    assert survey(blocks, "cosine").blocks is blocks
    assert torch.cat(list(survey(lambda: [x.half()], "cosine").blocks())).dtype == torch.float32


def sharded(rank: int, world: int, x: Tensor, split: int) -> tuple[Population, Tensor]:
    own = x[:split] if rank == 0 else x[split:]
    population = survey(lambda: own.split(4) if len(own) else [own], "euclidean")
    found = gather_rows(population, torch.tensor([0, 3, 19, 20, 49]))
    return (population.count, population.first, population.origin, population.scatter), found


def test_two_workers_see_one_population():
    x = rows()
    whole = survey(lambda: [x], "euclidean")
    for rank, ((count, first, origin, scatter), found) in enumerate(on_two_workers(sharded, x, 20)):
        assert (count, first) == (50, 20 * rank)
        assert torch.allclose(origin, whole.origin)
        assert scatter == pytest.approx(whole.scatter)
        assert torch.equal(found, x[[0, 3, 19, 20, 49]])


@pytest.mark.parametrize("block", [1, 7, 50])
def test_rows_by_position(block: int):
    x = rows()
    population = survey(lambda: x.split(block), "euclidean")
    assert torch.equal(gather_rows(population, torch.tensor([0, 6, 7, 49])), x[[0, 6, 7, 49]])


@pytest.mark.parametrize(("count", "size"), [(10, 3), (1000, 999), (10**9, 5000), (7, 7), (5, 9)])
def test_sample_is_even(count: int, size: int):
    sample = even_sample(count, size, seed=1)
    assert len(sample) == min(count, size)
    assert len(sample.unique()) == len(sample)
    stretch = np.arange(len(sample)) * count / len(sample)
    assert (sample.numpy() >= np.floor(stretch)).all()
    assert (sample.numpy() <= np.ceil(stretch + count / len(sample))).all()
    assert torch.equal(sample, even_sample(count, size, seed=1))
    assert 0 <= int(sample[0]) <= int(sample[-1]) < count


def test_refuses_what_cannot_be():
    with pytest.raises(DataError, match="rows = 0"):
        survey(lambda: [rows(0)], "euclidean")
    with pytest.raises(DataError, match="blocks = 0"):
        survey(list, "euclidean")
    with pytest.raises(ShapeError, match="width 2: 3 is needed"):
        survey(lambda: [rows(), rows()[:, :2]], "euclidean")
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = rows()
        x[3, 1] = wrong
        for metric in ("cosine", "euclidean"):
            with pytest.raises(DataError, match="NaN or infinite"):
                survey(lambda x=x: [x], metric)
