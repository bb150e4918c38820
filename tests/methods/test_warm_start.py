from __future__ import annotations

import torch

from rayclust.methods.heads import Heads, HeadShape
from rayclust.methods.warm_start import start_from_centers
from rayclust.training.pairs import ArrayRows
from tests.workers import on_two_workers


def _started(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads = Heads(HeadShape(heads=3, dimension=8, clusters=4), seed=0).double()
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = heads.direction.detach().clone()
    centers = torch.cat([torch.eye(3, 8), torch.full((1, 8), -1e3)]).double()
    x = x.abs()  # no row is nearest to the last centre
    start_from_centers(heads, ArrayRows(x), centers)
    return before, heads.direction.detach()


def test_directions_become_unit_means_seen_from_the_middle_and_empty_clusters_stay():
    before, after = _started(0, 1)
    assert after[:, :3].norm(dim=-1).allclose(torch.ones(3, 3, dtype=torch.float64))
    assert after[:, 3].equal(before[:, 3])


def test_two_workers_pool_their_rows():
    _, alone = _started(0, 1)
    for _, share in on_two_workers(_started):
        assert share.allclose(alone, rtol=0, atol=1e-12)
