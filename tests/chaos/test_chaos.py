"""Seeded accidents over encode, neighbors, select-k, train and assign; `make chaos N=500` has more of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayclust.errors import ArtefactError, DataError
from rayclust.stages.pipeline import run_all, run_stage
from tests.chaos.faults import DAMAGES, Fault, artefacts, damage, storage_with
from tests.chaos.proxy import control
from tests.chaos.trial import LAST, Work, finish, prepared, suffer, try_seed

SEEDS = 60
PER_TEST = 12


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Work]]:
    with prepared(tmp_path_factory.mktemp("chaos")) as found:
        yield found


@pytest.mark.parametrize("first", range(0, SEEDS, PER_TEST))
def test_after_the_accidents_of_a_seed_the_bytes_are_the_same(first: int, works: list[Work], tmp_path: Path):
    for seed in range(first, first + PER_TEST):
        happened, differing = try_seed(works, seed, tmp_path / f"run-{seed}")
        assert not differing, f"seed {seed}: {happened}"


@pytest.mark.parametrize("kind", DAMAGES)
def test_harm_to_a_finished_run_is_found_and_mended(kind: str, works: list[Work], tmp_path: Path):
    work = works[0]
    for number in range(4):
        run = tmp_path / f"{kind}-{number}"
        run_all(work.config(run), stop_after=LAST)
        done = damage(run, random.Random(f"{kind}-{number}"), kind)
        assert not finish(work, run), done


def test_a_stage_by_itself_refuses_what_is_damaged_and_says_how_to_mend_it(works: list[Work], tmp_path: Path):
    config = works[2].config(tmp_path / "run")
    run_all(config, stop_after=LAST)
    part = tmp_path / "run" / "embeddings" / "part-00001.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    with pytest.raises(ArtefactError, match=r"neighbors: a file of the stage encode .* run `rayclust encode RUN.yaml`"):
        run_stage("neighbors", config, force=True)
    run_stage("encode", config)
    assert part.read_bytes() == data
    run_stage("neighbors", config, force=True)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(works: list[Work], tmp_path: Path):
    work = works[2]
    config = work.config(tmp_path / "run")
    with storage_with(Fault("full", 12)), pytest.raises(DataError, match="no space left on the device") as caught:
        run_all(config, stop_after=LAST)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not finish(work, tmp_path / "run")


def test_a_run_that_was_copied_is_read_once_and_not_made_again(works: list[Work], tmp_path: Path):
    work, run = works[0], tmp_path / "run"
    run_all(work.config(run), stop_after=LAST)
    for file in run.rglob("*.parquet"):  # as a copy over the network has it: other times, same bytes
        file.write_bytes(file.read_bytes())
    with storage_with(None) as first:
        run_all(work.config(run), stop_after=LAST)
    with storage_with(None) as second:
        run_all(work.config(run), stop_after=LAST)
    assert 0 < first.count <= 5, "manifests, with new stamps"
    assert second.count == 0
    assert artefacts(str(run)) == work.expected


@pytest.mark.parametrize("seed", range(4))
def test_over_a_store_that_has_accidents_the_bytes_are_the_same(
    seed: int, works: list[Work], flaky: str, s3_bucket: str
):
    work, run = works[seed % 3], f"{s3_bucket}/run"
    control(flaky, {"seed": seed, "rate": 0.15, "cut_at": 40 + 20 * seed, "cut_seconds": 1.0})
    run_all(work.config(run), stop_after=LAST)
    happened = control(flaky)["happened"]
    control(flaky, {})
    assert artefacts(run) == work.expected
    assert happened["cut"]
    assert len(happened) >= 5, happened


def test_no_accident_is_no_accident(works: list[Work], tmp_path: Path):
    assert suffer(works[0], tmp_path / "run", Fault("before", 10**6)) == "done"
