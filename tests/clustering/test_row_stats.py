from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.clustering.row_stats import compute, even_sample, gather_rows
from rayclust.errors import DataError, ShapeError


def rows(count: int = 50) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0)) + 2.0


def test_moments_are_those_of_the_whole():
    x = rows()
    stats = compute(lambda: x.split(7), "euclidean")
    wide = x.double().numpy()
    assert (stats.count, stats.first) == (50, 0)
    assert np.allclose(stats.origin, wide.mean(0))
    assert stats.scatter == pytest.approx(((wide - wide.mean(0)) ** 2).sum())
    assert stats.variance == pytest.approx(wide.var(0).mean())


def test_directions_are_taken_for_cosine_and_unit_rows_left_alone():
    x = torch.cat([rows(), torch.zeros(1, 3)])
    stats = compute(lambda: x.split(7), "cosine")
    unit = torch.nn.functional.normalize(x, dim=1)
    assert torch.equal(torch.cat(list(stats.blocks())), unit)
    assert stats.scatter == pytest.approx(50.0)
    assert stats.origin.tolist() == [0.0, 0.0, 0.0]

    def blocks() -> list[Tensor]:
        return [unit]

    assert compute(blocks, "cosine").blocks is blocks
    assert torch.cat(list(compute(lambda: [x.half()], "cosine").blocks())).dtype == torch.float32


@pytest.mark.parametrize("block", [1, 7, 50])
def test_rows_by_position(block: int):
    x = rows()
    stats = compute(lambda: x.split(block), "euclidean")
    assert torch.equal(gather_rows(stats, torch.tensor([0, 6, 7, 49])), x[[0, 6, 7, 49]])


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
        compute(lambda: [rows(0)], "euclidean")
    with pytest.raises(DataError, match="blocks = 0"):
        compute(list, "euclidean")
    with pytest.raises(ShapeError, match="width 2: 3 is needed"):
        compute(lambda: [rows(), rows()[:, :2]], "euclidean")
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x = rows()
        x[3, 1] = wrong
        for metric in ("cosine", "euclidean"):
            with pytest.raises(DataError, match="NaN or infinite"):
                compute(lambda x=x: [x], metric)
