from __future__ import annotations

import torch
from torch import Tensor

from rayclust.clustering.lloyd import Partitions
from rayclust.clustering.population import survey
from rayclust.clustering.relocation import relocate
from tests.workers import on_two_workers

LINE = torch.tensor([[0.0], [1], [2], [3], [9], [-5], [-5]])


def moved(x: Tensor, centers: Tensor, block: int = 100) -> tuple[Tensor, Tensor]:
    population = survey(lambda: x.split(block), "euclidean")
    seen = centers - population.origin.float()
    partitions = Partitions(seen)
    sums, counts, _ = partitions.assign_and_sum(population.blocks, seen, population.origin)
    before = sums.clone(), counts.clone()
    found = relocate(population, partitions, seen, sums, counts)
    assert torch.equal(sums, before[0])
    assert torch.equal(counts, before[1])
    return found


def test_worked_by_hand():
    # Centre 1 has all rows; 9 is farthest, then the first of the two at −5. The empty clusters 0 and 2 get them.
    for block in (1, 3, 100):
        sums, counts = moved(LINE, torch.tensor([[[100.0], [1.0], [200.0]]]), block)
        assert counts.tolist() == [[1, 5, 1]]
        assert torch.allclose(sums.flatten(), torch.tensor([9.0, 1.0, -5.0], dtype=torch.float64))


def test_each_partition_has_its_own_empty_clusters():
    centers = torch.tensor([[[1.0], [100.0], [200.0]], [[0.0], [9.0], [100.0]], [[1.0], [9.0], [-5.0]]])
    sums, counts = moved(LINE, centers)
    assert counts.tolist() == [[5, 1, 1], [5, 1, 1], [4, 1, 2]]
    assert sums[:, :, 0].tolist() == [[1.0, 9.0, -5.0], [1.0, 9.0, -5.0], [6.0, 9.0, -10.0]]


def test_rows_alone_or_on_their_centre_stay():
    x = torch.tensor([[0.0], [0.0], [50.0]])
    _, counts = moved(x, torch.tensor([[[0.0], [40.0], [100.0]]]))
    assert counts.tolist() == [[2, 1, 0]]


def sharded(rank: int, world: int, centers: Tensor) -> tuple[Tensor, Tensor]:
    from rayclust import collectives

    own = LINE[:2] if rank == 0 else LINE[2:]
    population = survey(lambda: own.split(2), "euclidean")
    seen = centers - population.origin.float()
    partitions = Partitions(seen)
    sums, counts, _ = partitions.assign_and_sum(population.blocks, seen, population.origin)
    return relocate(population, partitions, seen, collectives.all_sum(sums), collectives.all_sum(counts))


def test_two_workers_move_the_same_rows():
    centers = torch.tensor([[[1.0], [100.0], [200.0]], [[0.0], [9.0], [100.0]]])
    alone = moved(LINE, centers)
    for sums, counts in on_two_workers(sharded, centers):
        assert torch.allclose(sums, alone[0])
        assert torch.equal(counts, alone[1])
