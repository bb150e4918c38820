from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rayclust.errors import ArtefactError
from rayclust.stages.neighbors_ivf import (
    IvfLayout,
    found_records,
    kept_tensors,
    map_threads,
    put_records,
    put_tensors,
    read_bounds,
    read_records,
    read_tensors,
    row_records,
)
from rayclust.store.layout import Run


def layout(run: Run) -> IvfLayout:
    return IvfLayout(run, "d1", [0, 4, 4, 9, 10], [(0, 1), (2,), (3,)], shard_rows=4, width=3, k=2)


def test_a_layout_knows_its_shards_groups_and_files(tmp_path: Path):
    of = layout(Run(str(tmp_path)))
    assert (of.count, of.shards) == (10, 3)
    assert [of.span(group) for group in range(3)] == [(0, 4), (4, 9), (9, 10)]
    assert [of.places(shard) for shard in range(3)] == [(0, 4), (4, 8), (8, 10)]
    assert of.at("shard", 2) == f"{tmp_path}/neighbors/scratch/d1/shard-00002"


@pytest.mark.parametrize("place", ["local", "s3"])
def test_ranges_of_records_and_of_their_bounds(place: str, tmp_path: Path, request: pytest.FixtureRequest):
    run = Run(str(tmp_path) if place == "local" else request.getfixturevalue("s3_bucket"))
    kind = row_records(3)
    records = np.zeros(7, kind)
    records["row"], records["unit"] = np.arange(7) * 10, np.arange(21).reshape(7, 3) / 8
    bounds = np.array([0, 2, 2, 7])
    uri = run.at("neighbors", "scratch", "file")
    written = put_records(run, uri, records, bounds)
    assert written["neighbors/scratch/file"]["size"] == 4 * 8 + 7 * (8 + 6)
    assert read_bounds(uri, 0, 3).tolist() == [0, 2, 2, 7]
    assert read_bounds(uri, 1, 2).tolist() == [2, 2]
    assert np.array_equal(read_records(uri, kind, 2, 6, groups=3), records[2:6])
    assert len(read_records(uri, kind, 4, 4, groups=3)) == 0
    put_records(run, uri, records)
    assert np.array_equal(read_records(uri, kind, 0, 7), records)


def test_a_file_that_is_too_short_says_so(tmp_path: Path):
    run = Run(str(tmp_path))
    kind = found_records(2)
    put_records(run, run.at("file"), np.zeros(3, kind))
    with pytest.raises(ArtefactError, match="file: is shorter than was written"):
        read_records(run.at("file"), kind, 1, 4)


def test_arrays_are_what_was_written_or_an_error(tmp_path: Path):
    run = Run(str(tmp_path))
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.zeros(0, 4, dtype=torch.float16)}
    digest = put_tensors(run, run.at("file"), tensors)["file"]["digest"]
    found = read_tensors(run.at("file"), digest)
    assert {name: (own.dtype, own.tolist()) for name, own in found.items()} == {
        name: (own.dtype, own.tolist()) for name, own in tensors.items()
    }
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"file: is damaged .* `rayclust neighbors RUN.yaml`"):
        read_tensors(run.at("file"), digest)


def test_a_worker_that_lives_on_reads_arrays_of_another_digest_anew(tmp_path: Path):
    run = Run(str(tmp_path))
    for value in (1, 2):
        digest = put_tensors(run, run.at("file"), {"a": torch.tensor([value])})["file"]["digest"]
        assert kept_tensors(run.at("file"), digest)["a"].tolist() == [value]


def test_results_come_in_order():
    assert map_threads(lambda x: x * x, range(100)) == [x * x for x in range(100)]
