from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust import collectives
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.methods.base import Batch, Pairing, Plan, TrainedConfig
from rayclust.training import cells
from rayclust.training.cells import at_hand, places_of
from rayclust.training.pairs import (
    ArrayRows,
    PairBatches,
    batch_order,
    draw_partners,
    draw_partners_at_hand,
    hashed,
    mix,
)

LIKE = torch.zeros(0)


def _ring(count: int, width: int) -> torch.Tensor:
    """Row r's neighbours are the next `width` rows."""
    return (torch.arange(count)[:, None] + torch.arange(1, width + 1)) % count


def _batches(count: int, pairing: Pairing, batch_size: int = 4, seed: int = 3, **settings: int) -> PairBatches:
    x = torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()
    config = TrainedConfig(name="any", clusters=2, batch_size=batch_size, **settings)
    return PairBatches(ArrayRows(x, _ring(count, 5)), Plan.of(config, count), pairing, seed, LIKE)


def test_every_epoch_visits_whole_batches_of_different_rows():
    batches = _batches(11, Pairing(5), epochs=2)
    for epoch in range(2):
        rows = torch.cat([batch.rows for batch in batches.epoch(epoch)])
        assert len(rows) == 8  # the rest of 3 does not fill a batch
        assert len(rows.unique()) == 8
    assert not batch_order(11, 3, 0).equal(batch_order(11, 3, 1))
    assert batch_order(11, 3, 0).sort().values.equal(torch.arange(11))


def test_views_are_the_rows_and_a_neighbour_of_each():
    for batch in _batches(11, Pairing(5)).epoch(0):
        assert batch.views[0, :, 0].equal(batch.rows.float())
        steps = (batch.views[1, :, 0].long() - batch.rows) % 11
        assert ((steps >= 1) & (steps <= 5)).all()
        assert batch.share == 1.0


def test_only_the_nearest_columns_are_drawn_from():
    for batch in _batches(11, Pairing(2)).epoch(0):
        assert (((batch.views[1, :, 0].long() - batch.rows) % 11) <= 2).all()


def test_a_method_without_pairs_gets_the_rows_alone():
    batches = PairBatches(
        ArrayRows(torch.randn(8, 3)), Plan.of(TrainedConfig(name="any", clusters=2), 8), Pairing(), 0, LIKE
    )
    (batch,) = batches.epoch(0)
    assert batch.views.shape == (1, 8, 3)


def test_fewer_rows_than_a_batch_still_make_steps():
    batches = list(_batches(3, Pairing(2), batch_size=512, epochs=2).epoch(0))
    assert [len(batch.rows) for batch in batches] == [3]


def test_steps_end_an_epoch_short_and_number_on():
    batches = _batches(20, Pairing(2), steps=7)
    assert [batch.step for epoch in range(2) for batch in batches.epoch(epoch)] == list(range(7))
    assert batches.plan.epochs == 2


def test_skipped_batches_leave_the_others_as_they_are():
    batches = _batches(20, Pairing(5))
    whole, rest = list(batches.epoch(4)), list(batches.epoch(4, skipped=2))
    assert [batch.step for batch in rest] == [batch.step for batch in whole[2:]]
    for mine, expected in zip(rest, whole[2:], strict=True):
        assert mine.views.equal(expected.views)


def test_partners_depend_on_seed_epoch_and_row_only():
    neighbors = _ring(1000, 7)
    rows = torch.randperm(1000)
    drawn = draw_partners(neighbors, rows, seed=1, epoch=2)
    one_by_one = torch.cat([draw_partners(neighbors, row[None], seed=1, epoch=2) for row in rows])
    assert drawn.equal(one_by_one)
    assert not drawn.equal(draw_partners(neighbors, rows, seed=1, epoch=3))
    assert not drawn.equal(draw_partners(neighbors, rows, seed=2, epoch=2))


def test_partners_are_uniform_over_neighbours_rows_and_epochs():
    neighbors = torch.arange(5).repeat(20_000, 1)
    counts = torch.bincount(draw_partners(neighbors, torch.arange(20_000), seed=0, epoch=0), minlength=5)
    assert (counts - 4000).abs().max() < 5 * 4000**0.5
    over_epochs = [int(draw_partners(neighbors, torch.tensor([17]), seed=0, epoch=epoch)) for epoch in range(2000)]
    assert (torch.bincount(torch.tensor(over_epochs), minlength=5) - 400).abs().max() < 5 * 400**0.5


def test_rows_with_few_neighbours_draw_among_those_and_a_row_with_none_meets_itself():
    neighbors = torch.tensor([[1, -1, -1], [-1, -1, -1], [0, 1, -1]])
    drawn = {tuple(draw_partners(neighbors, torch.arange(3), 0, epoch).tolist()) for epoch in range(50)}
    assert drawn == {(1, 1, 0), (1, 1, 1)}
    assert draw_partners(torch.empty(3, 0, dtype=torch.long), torch.arange(3), 0, 0).tolist() == [0, 1, 2]


def test_fewer_columns_than_wanted_are_named_in_the_log(caplog: pytest.LogCaptureFixture):
    _batches(11, Pairing(5))
    assert not caplog.records
    _batches(11, Pairing(9))
    assert "neighbors: 5 per row at hand, 9 wanted" in caplog.text


def test_hashes_are_those_of_plain_integers():
    def plain(seed: int, row: int) -> int:
        mask, state = (1 << 64) - 1, (row * 0x9E3779B97F4A7C15 + seed) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return (state ^ (state >> 31)) >> 33

    rows = torch.tensor([0, 1, 2, 12345, 2**40])
    seed = mix(7, 8)
    assert 0 <= seed < 2**63
    assert mix(7, 8) != mix(8, 7)
    assert hashed(seed, rows).tolist() == [plain(seed, int(row)) for row in rows]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_shares_of_any_number_of_workers_are_one_batch(workers: int, monkeypatch: pytest.MonkeyPatch):
    pairing = Pairing(5, noise=0.1, repeats=2)

    def shares(world: int, rank: int) -> list[Batch]:
        monkeypatch.setattr(collectives, "world_size", lambda: world)
        monkeypatch.setattr(collectives, "rank", lambda: rank)
        return list(_batches(22, pairing, batch_size=7).epoch(1))

    whole = shares(1, 0)
    parts = [shares(workers, rank) for rank in range(workers)]
    for index, batch in enumerate(whole):
        mine = [part[index] for part in parts]
        for rank, share in enumerate(mine):
            assert share.views.equal(batch.views[:, rank::workers])
            assert share.rows.equal(batch.rows[rank::workers])
        assert sum(share.share for share in mine) == pytest.approx(workers)


def test_noise_has_its_deviation_and_differs_between_repeated_views():
    batches = _batches(4000, Pairing(5, noise=0.1, repeats=2), batch_size=4000)
    (batch,) = batches.epoch(0)
    assert batch.views.shape == (4, 4000, 2)
    clean = batch.rows.float()[:, None]
    for view in batch.views[:2]:
        assert (view - clean).std().item() == pytest.approx(0.1, rel=0.05)
    assert not batch.views[0].equal(batch.views[1])
    (again,) = batches.epoch(0)
    assert again.views.equal(batch.views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_of_any_dtype_become_what_the_method_computes_in(dtype: torch.dtype):
    rows = ArrayRows(torch.randn(8, 3).to(dtype))
    for wanted in (torch.float32, torch.float64):
        plan = Plan.of(TrainedConfig(name="any", clusters=2), 8)
        batches = PairBatches(rows, plan, Pairing(), 0, torch.zeros(0, dtype=wanted))
        assert next(batches.epoch(0)).views.dtype == wanted


def test_array_rows_split_into_equal_stretches(monkeypatch: pytest.MonkeyPatch):
    rows = ArrayRows(np.arange(10.0)[:, None])
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    stretches = []
    for rank in range(3):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        stretches += list(rows.blocks())
    assert torch.cat(stretches).equal(rows.tensor())
    assert {len(stretch) for stretch in stretches} == {3, 4}


def test_unfit_arrays_are_refused_in_one_line():
    x = torch.zeros(4, 2)
    with pytest.raises(ShapeError, match="x has shape"):
        ArrayRows(torch.zeros(4))
    with pytest.raises(ShapeError, match="neighbors has 3 rows: 4 are needed"):
        ArrayRows(x, torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(DataError, match="neighbors holds 4: row numbers must be below 4"):
        ArrayRows(x, torch.full((4, 2), 4))
    with pytest.raises(DataError, match="neighbors = None"):
        ArrayRows(x).neighbors()


def test_more_workers_than_rows_in_a_batch_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 8)
    with pytest.raises(ConfigError, match="workers = 8: a batch has only 4 rows"):
        _batches(20, Pairing(2))


HOLDER = torch.tensor([0, 1, 1, 0, 2, 0] * 10, dtype=torch.int16)
"""Who of three holds each of 60 rows."""


class OwnRows(ArrayRows):
    """A worker's own rows of those that hold their own number, with the next 5 for neighbours."""

    def __init__(self, worker: int) -> None:
        self._owned = (worker == HOLDER).nonzero()[:, 0]
        here = at_hand(_ring(60, 5)[self._owned], places_of(HOLDER, worker))
        super().__init__(self._owned[:, None].expand(-1, 2).float().contiguous(), here)

    @property
    def count(self) -> int:
        return len(HOLDER)

    def owned(self) -> torch.Tensor:
        return self._owned


def _own_batches(worker: int, pairing: Pairing, patch: pytest.MonkeyPatch, **settings: int) -> PairBatches:
    patch.setattr(collectives, "world_size", lambda: 3)
    patch.setattr(collectives, "rank", lambda: worker)
    patch.setattr(cells, "_held_by_each", lambda own, device: torch.bincount(HOLDER.int()).tolist())
    config = TrainedConfig(name="any", clusters=2, batch_size=15, **settings)
    return PairBatches(OwnRows(worker), Plan.of(config, 60), pairing, 3, LIKE)


def test_partners_at_hand_are_the_ones_drawn_before_unless_another_worker_has_them():
    neighbors, rows = _ring(60, 5), torch.arange(60)
    for epoch in range(20):
        drawn = draw_partners(neighbors, rows, 1, epoch)
        for worker in range(3):
            owned = (worker == HOLDER).nonzero()[:, 0]
            here = at_hand(neighbors[owned], places_of(HOLDER, worker))
            places = torch.arange(len(owned))
            found, crossed = draw_partners_at_hand(here, places, owned, 1, epoch)
            assert crossed.equal(HOLDER[drawn[owned]] != worker)
            assert owned[found][~crossed].equal(drawn[owned][~crossed])
            alone = (here < 0).all(1)
            assert found[alone].equal(places[alone])
            assert (here[~alone] == found[~alone, None]).any(1).all()


def test_partners_at_hand_are_uniform_over_those_at_hand():
    neighbors = torch.tensor([[7, -2, 3, -2, 5, -2]]).repeat(30_000, 1)
    rows = torch.arange(30_000)
    found, crossed = draw_partners_at_hand(neighbors, rows, rows, 0, 0)
    counts = torch.bincount(found, minlength=8)[[3, 5, 7]]
    assert counts.sum() == 30_000
    assert (counts - 10_000).abs().max() < 5 * 10_000**0.5
    assert crossed.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_rows_without_neighbours_at_hand_meet_themselves():
    neighbors = torch.tensor([[-2, -2, -1], [-1, -1, -1], [0, -1, -1]])
    for epoch in range(20):
        found, crossed = draw_partners_at_hand(neighbors, torch.arange(3), torch.tensor([5, 6, 9]), 0, epoch)
        assert found.tolist() == [0, 1, 0]
        assert crossed.tolist() == [True, False, False]
    none = torch.empty(3, 0, dtype=torch.int32)
    assert draw_partners_at_hand(none, torch.tensor([2, 0]), torch.tensor([8, 3]), 0, 0)[0].tolist() == [2, 0]


def test_workers_with_rows_of_their_own_make_whole_batches_and_visit_every_row_once(monkeypatch: pytest.MonkeyPatch):
    parts = [list(_own_batches(worker, Pairing(5), monkeypatch).epoch(1)) for worker in range(3)]
    for shares in zip(*parts, strict=True):
        assert sum(len(share.rows) for share in shares) == 15
        assert sum(share.share for share in shares) == pytest.approx(3)
        for worker, share in enumerate(shares):
            assert share.share == pytest.approx(3 * len(share.rows) / 15)
            assert (HOLDER[share.rows] == worker).all()
            assert share.views[0, :, 0].equal(share.rows.float())
            partners = share.views[1, :, 0].long()
            assert (HOLDER[partners] == worker).all()
            drawn = draw_partners(_ring(60, 5), share.rows, 3, 1)
            assert share.crossed is not None
            assert share.crossed.item() == pytest.approx((HOLDER[drawn] != worker).float().mean().item())
    visited = torch.cat([share.rows for part in parts for share in part])
    assert visited.sort().values.equal(torch.arange(60))


def test_skipped_batches_of_own_rows_leave_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch):
    batches = _own_batches(1, Pairing(5, noise=0.1), monkeypatch)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, skipped=1))
    assert [share.step for share in rest] == [share.step for share in whole[1:]]
    for mine, expected in zip(rest, whole[1:], strict=True):
        assert mine.views.equal(expected.views)
