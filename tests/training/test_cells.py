from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rayclust.errors import ConfigError, DataError
from rayclust.methods.base import FOREIGN
from rayclust.search.knn import top_k
from rayclust.training import cells
from rayclust.training.cells import LEAST_SHARE, Stretches, Tally, at_hand, holders, pack, places_of, tally

CPU = torch.device("cpu")


def _groups(count: int, groups: int, seed: int = 0) -> Tensor:
    """Rows around some directions, in a seeded order."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(groups, 12, generator=generator)
    which = torch.randint(groups, (count,), generator=generator)
    return directions[which] + 0.3 * torch.randn(count, 12, generator=generator)


def _division(x: Tensor, workers: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Who of some workers holds each row of `x`, found by one process that has all blocks."""
    with monkeypatch.context() as patch:
        patch.setattr(cells, "CELLS_PER_WORKER", cells.CELLS_PER_WORKER * workers)
        patch.setattr(cells, "pack", lambda centers, sizes, _: pack(centers, sizes, workers))
        return holders(lambda: torch.split(x, 100), seed=3)


def test_cells_on_a_line_are_cut_where_half_of_the_rows_are():
    centers = torch.tensor([[5.0, 0.1], [1.0, 0.0], [4.0, 0.0], [2.0, 0.1], [3.0, 0.0], [6.0, 0.0]])
    sizes = torch.tensor([10, 30, 10, 10, 10, 10])  # in order of place: 30 10 10 10 10 10
    halves = pack(centers, sizes, 2).tolist()
    assert halves in ([1, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 0])
    assert pack(centers, sizes, 1).tolist() == [0] * 6
    assert sorted(pack(centers, sizes, 6).tolist()) == list(range(6))


def test_three_workers_get_a_third_each():
    centers, sizes = torch.arange(9.0)[:, None] * torch.ones(1, 2), torch.full((9,), 7)
    along = pack(centers, sizes, 3).tolist()
    assert along in ([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 2, 2, 2, 1, 1, 1], along[::-1])
    assert [along.count(worker) for worker in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("workers", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_no_worker_holds_more_than_its_part_and_a_large_cell(workers: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    number = 64 * workers
    centers = torch.nn.functional.normalize(torch.randn(number, 6, generator=generator), dim=1)
    sizes = (1000 * torch.rand(number, generator=generator) ** 3).long()
    held = torch.zeros(workers).scatter_add(0, pack(centers, sizes, workers).long(), sizes.float())
    even = sizes.sum() / workers
    assert ((held - even).abs() <= 1.5 * sizes.max()).all()
    assert (held / even).max() < 1.15


def test_every_worker_gets_a_cell_even_beside_one_that_holds_all():
    centers, sizes = torch.arange(4.0)[:, None], torch.tensor([0, 0, 1000, 0])
    assert sorted(pack(centers, sizes, 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [2, 4])
def test_neighbours_are_mostly_at_hand_and_counts_are_those_of_plain_loops(
    workers: int, monkeypatch: pytest.MonkeyPatch
):
    x = _groups(1500, 16)
    holder = _division(x, workers, monkeypatch)
    assert holder.dtype == torch.int16
    assert set(holder.tolist()) == set(range(workers))
    assert _division(x, workers, monkeypatch).equal(holder)
    unit, ids = torch.nn.functional.normalize(x, dim=1), torch.arange(len(x))
    neighbors = top_k(unit, unit, 8, query_ids=ids, database_ids=ids)[0]
    foreign = 0
    for worker in range(workers):
        places = places_of(holder, worker)
        owned = (holder == worker).nonzero()[:, 0]
        here = at_hand(neighbors[owned], places)
        for place, row in enumerate(owned.tolist()):
            for column, other in enumerate(neighbors[row].tolist()):
                kept = int(here[place, column])
                assert (int(owned[kept]) == other) if holder[other] == worker else kept == FOREIGN
        found = tally(here, CPU)
        near = holder[neighbors[owned]] == worker
        assert found == Tally(
            len(owned), int((~near).all(1).sum()), near.numel(), int((~near).sum()), largest=len(owned)
        )
        foreign += found.foreign
    by_chance = 1 - 1 / workers
    assert foreign / neighbors.numel() < by_chance / 3


def test_places_and_neighbours_of_few_rows_by_hand():
    holder = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int16)
    assert places_of(holder, 1).tolist() == [0, -2, 1, 2, -2]
    neighbors = torch.tensor([[2, 1], [4, -1], [-1, -1], [0, 3]])
    here = at_hand(neighbors, places_of(holder, 1))
    assert here.dtype == torch.int32
    assert here.tolist() == [[1, -2], [-2, -1], [-1, -1], [0, 2]]
    found = tally(here, CPU)
    assert found == Tally(rows=4, alone=1, neighbors=5, foreign=2, largest=4)
    assert str(found) == (
        "2 of 5 neighbours (40.0%) are with another worker, 1 of 4 rows have none at hand; "
        "a worker holds at most 4 rows"
    )
    assert tally(torch.zeros(3, 0, dtype=torch.int32), CPU).neighbors == 0


def test_rows_that_are_too_few_for_cells_are_divided_all_the_same(monkeypatch: pytest.MonkeyPatch):
    assert set(_division(torch.ones(3, 2), 1, monkeypatch).tolist()) == {0}
    with pytest.raises(DataError, match="rows = 0"):
        holders(lambda: [torch.empty(0, 2)], seed=0)


SIZES = [(50, 50), (53, 47), (10, 80, 31), (2500, 700, 1800, 8), (97,)]


@pytest.mark.parametrize("held", SIZES)
def test_stretches_make_whole_batches_and_take_each_row_once(held: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    count = sum(held)
    size = -(-LEAST_SHARE * count // min(held))
    size = next(b for b in range(size, count + 1) if count % b == 0)  # batches that make up all rows
    monkeypatch.setattr(cells, "_held_by_each", lambda own, device: list(held))
    found = []
    for rank, own in enumerate(held):
        monkeypatch.setattr(cells.collectives, "rank", lambda rank=rank: rank)
        found.append(Stretches.of(own, size, CPU))
    for index in range(count // size):
        ends = 0
        for stretches in found:
            here, there = stretches.in_order(index), stretches.in_batch(index)
            assert there.start == ends
            assert there.stop - there.start == here.stop - here.start >= 1
            assert abs(here.stop - here.start - size * stretches.held / count) < 2
            ends = there.stop
        assert ends == size
    for stretches in found:
        taken = [stretches.in_order(index) for index in range(count // size)]
        assert [part.start for part in taken] == [0, *(part.stop for part in taken[:-1])]
        assert taken[-1].stop == stretches.held


def test_an_epoch_that_leaves_a_rest_takes_no_more_than_there_is():
    for held in range(20, 60):
        stretches = Stretches(before=40, held=held, count=101 + held, batch_size=17)
        assert stretches.in_order((101 + held) // 17 - 1).stop <= held


def test_a_worker_with_hardly_any_rows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells, "_held_by_each", lambda own, device: [95, 5])
    with pytest.raises(
        ConfigError, match="the worker with 5 of 100 rows would have fewer than 2 rows of a batch of 30"
    ):
        Stretches.of(95, 30, CPU)
    assert Stretches.of(95, 40, CPU).held == 95
