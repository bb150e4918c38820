from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rayclust import distributed
from rayclust.distributed import ProcessGroup, data_parallel
from rayclust.errors import DataError, ShapeError
from rayclust.methods.base import Batch, Pairing
from rayclust.methods.settings import Plan, TrainedConfig
from rayclust.training import sampling
from rayclust.training.sampling import (
    ArrayRows,
    RowSource,
    batch_order,
    derive_seed,
    draw_neighbors,
    free_host_bytes,
    gather_rows,
    place_on_device,
    row_hash,
)

CPU = torch.device("cpu")


def _ring(count: int, width: int) -> torch.Tensor:
    """Row r's neighbours are the next `width` rows."""
    return (torch.arange(count)[:, None] + torch.arange(1, width + 1)) % count


def _numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()


def _plan(count: int, batch_size: int = 4, **settings: int) -> Plan:
    return Plan.of(TrainedConfig(name="any", clusters=2, batch_size=batch_size, **settings), count)


def _batches(count: int, pairing: Pairing, start: int = 0, batch_size: int = 4, **settings: int) -> Iterator[Batch]:
    source = RowSource(ArrayRows(_numbered(count), _ring(count, 5)), pairing, 3, CPU)
    return source.batches(_plan(count, batch_size, **settings), distributed.data_group().rank, start)


def test_every_epoch_visits_whole_batches_of_different_rows():
    batches = list(_batches(11, Pairing(5), epochs=2))
    for epoch in range(2):
        rows = torch.cat([batch.rows for batch in batches if batch.epoch == epoch])
        assert len(rows) == 8  # the rest of 3 does not fill a batch
        assert len(rows.unique()) == 8
    assert not batch_order(11, 3, 0).equal(batch_order(11, 3, 1))
    assert batch_order(11, 3, 0).sort().values.equal(torch.arange(11))


@pytest.mark.parametrize("columns", [2, 5])
def test_views_are_the_rows_and_one_of_the_nearest_neighbours_of_each(columns: int):
    for batch in _batches(11, Pairing(columns), epochs=1):
        assert batch.x[0, :, 0].equal(batch.rows.float())
        steps = (batch.x[1, :, 0].long() - batch.rows) % 11
        assert ((steps >= 1) & (steps <= columns)).all()
        assert batch.weight == 1.0


def test_a_method_without_pairs_gets_the_rows_alone():
    (batch,) = RowSource(ArrayRows(torch.randn(8, 3)), Pairing(), 0, CPU).batches(_plan(8, 8, epochs=1), 0)
    assert batch.x.shape == (1, 8, 3)


def test_several_spaces_hold_the_same_rows_and_neighbours():
    """The neighbours are those of the first space; noise differs between spaces."""
    spaces = {"clip": ArrayRows(_numbered(11), _ring(11, 5)), "text": ArrayRows(torch.arange(11.0)[:, None])}
    for batch in RowSource(spaces, Pairing(5), 3, CPU).batches(_plan(11), 0):
        assert list(batch.views) == ["clip", "text"]
        assert batch.views["clip"][..., 0].equal(batch.views["text"][..., 0])
    noisy = RowSource({"a": spaces["clip"], "b": spaces["clip"]}, Pairing(5, noise=0.1), 3, CPU)
    batch = next(iter(noisy.batches(_plan(11), 0)))
    assert not batch.views["a"].equal(batch.views["b"])


def test_fewer_rows_than_a_batch_still_make_steps():
    assert [len(batch.rows) for batch in _batches(3, Pairing(2), batch_size=512, epochs=2)] == [3, 3]


def test_a_resumed_epoch_has_the_batches_it_would_have_had():
    whole, rest = (
        list(_batches(20, Pairing(5, noise=0.1), steps=7)),
        list(_batches(20, Pairing(5, noise=0.1), 3, steps=7)),
    )
    assert [batch.step for batch in whole] == list(range(7))
    assert [(batch.step, batch.epoch) for batch in rest] == [(3, 0), (4, 0), (5, 1), (6, 1)]
    for mine, expected in zip(rest, whole[3:], strict=True):
        assert mine.x.equal(expected.x)


def test_neighbours_depend_on_seed_epoch_and_row_only():
    neighbors, rows = _ring(1000, 7), torch.randperm(1000)
    drawn = draw_neighbors(neighbors, rows, seed=1, epoch=2)
    one_by_one = torch.cat([draw_neighbors(neighbors, row[None], seed=1, epoch=2) for row in rows])
    assert drawn.equal(one_by_one)
    assert not drawn.equal(draw_neighbors(neighbors, rows, seed=1, epoch=3))
    assert not drawn.equal(draw_neighbors(neighbors, rows, seed=2, epoch=2))


def test_neighbours_are_uniform_over_columns_rows_and_epochs():
    neighbors = torch.arange(5).repeat(20_000, 1)
    counts = torch.bincount(draw_neighbors(neighbors, torch.arange(20_000), seed=0, epoch=0), minlength=5)
    assert (counts - 4000).abs().max() < 5 * 4000**0.5
    over_epochs = [int(draw_neighbors(neighbors, torch.tensor([17]), seed=0, epoch=epoch)) for epoch in range(2000)]
    assert (torch.bincount(torch.tensor(over_epochs), minlength=5) - 400).abs().max() < 5 * 400**0.5


def test_rows_with_few_neighbours_draw_among_those_and_a_row_with_none_draws_itself():
    neighbors = torch.tensor([[1, -1, -1], [-1, -1, -1], [0, 1, -1]])
    drawn = {tuple(draw_neighbors(neighbors, torch.arange(3), 0, epoch).tolist()) for epoch in range(50)}
    assert drawn == {(1, 1, 0), (1, 1, 1)}
    assert draw_neighbors(torch.empty(3, 0, dtype=torch.long), torch.arange(3), 0, 0).tolist() == [0, 1, 2]


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

    rows, seed = torch.tensor([0, 1, 2, 12345, 2**40]), derive_seed(7, 8)
    assert 0 <= seed < 2**63
    assert derive_seed(7, 8) != derive_seed(8, 7)
    assert row_hash(seed, rows).tolist() == [plain(seed, int(row)) for row in rows]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_parts_of_any_number_of_workers_are_one_batch(workers: int):
    def parts(world: int, rank: int) -> list[Batch]:
        with data_parallel(ProcessGroup(world, rank)):
            return list(_batches(22, Pairing(5, noise=0.1, repeats=2), batch_size=7, epochs=2))

    whole, divided = parts(1, 0), [parts(workers, rank) for rank in range(workers)]
    for batch, *mine in zip(whole, *divided, strict=True):
        for rank, part in enumerate(mine):
            assert part.x.equal(batch.x[:, rank::workers])
            assert part.rows.equal(batch.rows[rank::workers])
        assert sum(part.weight for part in mine) == pytest.approx(workers)


def test_noise_has_its_deviation_and_differs_between_repeated_views():
    def batch() -> Batch:
        return next(_batches(4000, Pairing(5, noise=0.1, repeats=2), batch_size=4000))

    found = batch()
    assert found.x.shape == (4, 4000, 2)
    for view in found.x[:2]:
        assert (view - found.rows.float()[:, None]).std().item() == pytest.approx(0.1, rel=0.05)
    assert not found.x[0].equal(found.x[1])
    assert batch().x.equal(found.x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_of_any_dtype_become_what_the_method_computes_in(dtype: torch.dtype):
    rows = ArrayRows(torch.randn(8, 3).to(dtype))
    for wanted in (torch.float32, torch.float64):
        assert next(iter(RowSource(rows, Pairing(), 0, CPU, wanted).batches(_plan(8), 0))).x.dtype == wanted


def test_array_rows_split_into_even_slices():
    rows, slices = ArrayRows(np.arange(10.0)[:, None]), []
    for rank in range(3):
        with data_parallel(ProcessGroup(3, rank)):
            slices += list(rows.blocks())
    assert torch.cat(slices).equal(rows.tensor())
    assert {len(part) for part in slices} == {3, 4}


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


@pytest.mark.parametrize(("size", "host", "place"), [(50, 0, "gpu"), (51, 102, "pinned"), (52, 102, "mapped")])
def test_rows_go_to_the_first_place_that_holds_them_well(
    size: int, host: int, place: str, monkeypatch: pytest.MonkeyPatch
):
    """Half of 100 bytes of a GPU, of those of the host; no GPU is needed to tell where they went."""
    _with_memory(monkeypatch, 100, host)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: "gpu")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: "pinned")
    x = torch.zeros(size, dtype=torch.uint8)
    found = place_on_device(x, torch.device("cuda", 0))
    assert found is x if place == "mapped" else found == place


def _with_memory(monkeypatch: pytest.MonkeyPatch, gpu: int, host: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu, gpu))
    monkeypatch.setattr(sampling, "free_host_bytes", lambda: host)


def test_workers_on_the_cpu_take_rows_from_where_they_are():
    x = torch.arange(12.0).view(4, 3)
    assert place_on_device(x, CPU) is x
    assert gather_rows(x, torch.tensor([2, 0, 2]), CPU).equal(x[[2, 0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["gpu", "pinned", "mapped"])
def test_the_same_rows_reach_the_gpu_from_every_place(place: str, monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    _with_memory(monkeypatch, 1 << 30 if place == "gpu" else 0, 1 << 30 if place == "pinned" else 0)
    device, x = torch.device("cuda", 0), torch.randn(1000, 7)
    kept = place_on_device(x, device)
    assert (kept.is_cuda, kept.is_pinned()) == (place == "gpu", place == "pinned")
    rows = torch.randint(1000, (64,))
    found = gather_rows(kept, rows.to(kept.device), device)
    assert found.device == device
    assert found.cpu().equal(x[rows])


def test_a_workers_memory_is_its_part_of_what_node_and_container_have_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampling, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(sampling, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_host_bytes() == 0
    (tmp_path / "meminfo").write_text("MemTotal:  64 kB\nMemAvailable:   48 kB\n")
    assert free_host_bytes() == 48 * 1024
    for name, content in (("max", "40960"), ("current", "30000"), ("stat", "anon 9\ninactive_file 40")):
        (tmp_path / f"memory.{name}").write_text(content + "\n")
    assert free_host_bytes() == 11_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_bytes() == 2750
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes() == 12 * 1024


def test_rows_in_several_spaces_come_side_by_side_or_one_by_one():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    rows = ArrayRows({"a": a, "b": b.numpy()})
    assert (rows.spaces, rows.dimensions, rows.dimension, rows.count) == (("a", "b"), {"a": 2, "b": 3}, 5, 2)
    half = 2**-0.5
    joint = half * torch.tensor([[0.6, 0.8, 0, 1, 0], [1, 0, 1, 0, 0]])
    torch.testing.assert_close(rows.tensor(), joint)
    torch.testing.assert_close(torch.cat(list(rows.blocks("b"))), b)
    plan = _plan(2, 2, epochs=1)
    (batch,) = RowSource(rows, Pairing(), 0, CPU).batches(plan, 0)
    torch.testing.assert_close(batch.x[0], joint[batch.rows])
    (batch,) = RowSource(rows, Pairing(), 0, CPU, each=True).batches(plan, 0)
    assert list(batch.views) == ["a", "b"]
    torch.testing.assert_close(batch.views["b"][0], b[batch.rows])
    with pytest.raises(ShapeError, match=r"different numbers of rows \(a 2, b 1\)"):
        ArrayRows({"a": a, "b": b[:1]})
