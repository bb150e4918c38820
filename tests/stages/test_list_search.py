from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rayclust.errors import ArtefactError
from rayclust.runtime.tasks import Task
from rayclust.search.packed import pack
from rayclust.stages import neighbors_ivf
from rayclust.stages.neighbors_ivf import (
    IvfLayout,
    ListSearch,
    collect,
    found_records,
    put_records,
    put_tensors,
    read_records,
    row_records,
)
from rayclust.store.layout import Run

ROWS, LISTS, WIDTH = 60, 7, 2


def sorted_groups(tmp_path: Path, homes: np.ndarray, shard_rows: int) -> tuple[IvfLayout, ListSearch]:
    """Files of three groups of rows, as the sorting leaves them, of rows whose features are their numbers."""
    starts = [0, 10, 10, 35, ROWS]
    layout = IvfLayout(Run(str(tmp_path)), "d", starts, [(0, 1), (2,), (3,)], shard_rows, WIDTH, k=1)
    for group in range(3):
        first, end = layout.span(group)
        order = np.argsort(homes[first:end], kind="stable")
        records = np.empty(end - first, row_records(WIDTH))
        records["row"], records["unit"] = first + order, (first + order)[:, None]
        bounds = np.searchsorted(homes[first:end][order], np.arange(LISTS + 1))
        put_records(layout.run, layout.at("sorted", group), records, bounds)
    sizes = np.bincount(homes, minlength=LISTS)
    bounds = torch.from_numpy(np.concatenate([[0], sizes.cumsum()]))
    written = put_tensors(layout.run, layout.at("lists"), {"bounds": bounds})
    digest = next(iter(written.values()))["digest"]
    return layout, ListSearch(layout, digest, LISTS, reach=LISTS, nprobe=2)


HOMES = {
    "spread": np.random.default_rng(0).integers(0, LISTS, ROWS),
    "one long list": np.full(ROWS, 3),
    "gaps": np.where(np.arange(ROWS) % 3 == 0, 6, 1),
}


@pytest.mark.parametrize("shard_rows", [1, 7, 25, 60, 99])
@pytest.mark.parametrize("homes", HOMES.values(), ids=HOMES)
def test_shards_hold_all_rows_in_order_of_list_and_row(homes: np.ndarray, shard_rows: int, tmp_path: Path):
    layout, lists = sorted_groups(tmp_path, homes, shard_rows)
    found = []
    for shard in range(layout.shards):
        low, high = layout.places(shard)
        assert lists.shard(shard).counts == {"rows": high - low}
        found.append(read_records(layout.at("shard", shard), row_records(WIDTH), 0, high - low))
    records = np.concatenate(found)
    assert records["row"].tolist() == np.lexsort((np.arange(ROWS), homes)).tolist()
    assert np.array_equal(records["unit"][:, 1], records["row"].astype(np.float16))


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_each_pair_of_a_row_and_a_list_sees_all_rows_of_the_list(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(neighbors_ivf, "BLOCK_BYTES", block * row_records(WIDTH).itemsize)
    homes = HOMES["spread"]
    layout, lists = sorted_groups(tmp_path, homes, 13)
    for shard in range(layout.shards):
        lists.shard(shard)
    bounds = lists._tensors()["bounds"]
    own = neighbors_ivf._read(layout, *layout.places(2))
    pairs = [(4, 0), (12, 0), (3, 1), (0, 2), (1, 2), (5, 4), (5, 5), (9, 6)]
    places, opened = torch.tensor(pairs).T
    seen: dict[tuple[int, int], list[int]] = {}
    for some, rows, units in neighbors_ivf._blocks(layout, own, places, opened, bounds):
        assert units[:, 0].tolist() == rows.tolist()
        assert len(rows) <= max(block, 1)
        for place in some.tolist():
            for row in rows.tolist():
                seen.setdefault((place, int(homes[row])), []).append(row)
    assert seen == {pair: np.flatnonzero(homes == pair[1]).tolist() for pair in pairs}


def test_lists_side_by_side_are_read_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layout, lists = sorted_groups(tmp_path, HOMES["spread"], 13)
    for shard in range(layout.shards):
        lists.shard(shard)
    reads, read = [], neighbors_ivf._read
    monkeypatch.setattr(neighbors_ivf, "_read", lambda *arguments: reads.append(arguments[1:]) or read(*arguments))
    bounds = lists._tensors()["bounds"]
    opened = torch.tensor([0, 1, 2, 5])
    own = read(layout, *layout.places(4))
    assert len(list(neighbors_ivf._blocks(layout, own, torch.zeros(4).long(), opened, bounds))) == 4
    assert reads == [(int(bounds[0]), int(bounds[3])), (int(bounds[5]), int(bounds[6]))]


def test_a_row_that_no_shard_has_found_is_an_error(tmp_path: Path):
    layout = IvfLayout(Run(str(tmp_path)), "d", [0, 3], [(0,)], shard_rows=9, width=WIDTH, k=1)
    records = np.zeros(2, found_records(1))
    records["row"], records["keys"] = [0, 2], pack(torch.zeros(2, 1), torch.ones(2, 1).long())
    put_records(layout.run, layout.at("found", 0), records, np.array([0, 2]))
    with pytest.raises(ArtefactError, match="neighbors: 2 rows are there for the rows 0 to 2"):
        collect(layout, {}, Task(0, "d", (0,), 3))


def test_rows_outside_a_shard_are_counted_once():
    bounds = torch.tensor([0, 4, 4, 10, 12])
    assert neighbors_ivf._outside(torch.tensor([0, 1, 2, 3]), bounds, 0, 12) == 0
    assert neighbors_ivf._outside(torch.tensor([0, 1, 2, 3]), bounds, 3, 6) == 3 + 4 + 2
    assert neighbors_ivf._outside(torch.tensor([0, 3]), bounds, 4, 10) == 6
