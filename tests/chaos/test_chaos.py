"""Seeded accidents over encode, neighbors, select-k, train and assign; `make chaos N=500` has more of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayclust.errors import ArtefactError, DataError
from rayclust.runtime.pipeline import StageContext, StageResult, run_all, run_stage
from rayclust.stages import train
from tests.chaos.faults import DAMAGES, Fault, artefacts, damage, rot, storage_with, unseal
from tests.chaos.proxy import control
from tests.chaos.trial import LAST, Work, finish, prepared, suffer, try_seed

SEEDS = 36
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


ROTTEN = {
    "embeddings/part-00001.parquet": "neighbors",
    "neighbors/part-00000.parquet": "evaluate",
    "selection/k-*/weights.safetensors": "train",
    "selection/k-*/config.json": "train",
    "selection/k-*/metrics.parquet": "train",
    "model/weights.safetensors": "assign",
    "model/config.json": "figures",
    "assignments/part-00001.parquet": "label",
    "clusters.parquet": "report",
    "metrics.json": "report",
    "selection.json": "report",
    "figures/summary.json": "report",
    "model/metrics.parquet": "report",
}
"""Files, each with a stage that reads it."""


@pytest.fixture(scope="module")
def whole(works: list[Work], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end; read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_all(works[0].config(run))
    return run


def rotten(whole: Path, run: Path, file: str) -> tuple[Path, str, bytes]:
    """A copy with its stamps in which a bit of the file has turned; the file, who reads it, what it was."""
    shutil.copytree(whole, run, copy_function=shutil.copy2)
    path = next(run.glob(file.replace("k-*", f"k-{json.loads((run / 'selection.json').read_text())['chosen']:05d}")))
    unseal(run, ROTTEN[file])
    return path, ROTTEN[file], rot(path)


@pytest.mark.parametrize("file", ROTTEN)
def test_bits_that_turn_and_change_no_stamp_are_found_by_whoever_reads_them_and_mended(
    file: str, works: list[Work], whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path, _, data = rotten(whole, tmp_path / "run", file)
    run_all(works[0].config(tmp_path / "run"))
    assert f"{path}: is damaged, its checksum is another than was written: made again" in caplog.text
    assert path.read_bytes() == data
    found, expected = (artefacts(str(run)) for run in (tmp_path / "run", whole))
    assert {name for name in {*found, *expected} if found.get(name) != expected.get(name)} <= {"report/index.html"}


def test_a_stage_by_itself_removes_what_has_rotted_and_says_how_to_mend_it(
    works: list[Work], whole: Path, tmp_path: Path
):
    config = works[0].config(tmp_path / "run")
    path, reader, data = rotten(whole, tmp_path / "run", "model/weights.safetensors")
    with pytest.raises(ArtefactError, match=r"assign: .*weights.safetensors was damaged .*`rayclust train ") as error:
        run_stage(reader, config)
    assert "\n" not in str(error.value)
    run_stage("train", config)
    assert path.read_bytes() == data
    run_stage(reader, config)


def test_a_file_that_rots_again_and_again_ends_the_run(
    works: list[Work], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, _, _ = rotten(whole, tmp_path / "run", "model/weights.safetensors")
    before = train.run

    def and_rot(context: StageContext) -> StageResult:
        result = before(context)
        rot(path)
        return result

    monkeypatch.setattr(train, "run", and_rot)
    with pytest.raises(ArtefactError, match="was damaged and is removed"):
        run_all(works[0].config(tmp_path / "run"))


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


@pytest.mark.parametrize("seed", range(3))
def test_over_a_store_that_has_accidents_the_bytes_are_the_same(
    seed: int, works: list[Work], flaky: str, s3_bucket: str
):
    work, run = works[seed], f"{s3_bucket}/run"
    control(flaky, {"seed": seed, "rate": 0.15, "cut_at": 40 + 20 * seed, "cut_seconds": 1.0})
    run_all(work.config(run), stop_after=LAST)
    happened = control(flaky)["happened"]
    control(flaky, {})
    assert artefacts(run) == work.expected
    assert happened["cut"]
    assert len(happened) >= 5, happened


def test_no_accident_is_no_accident(works: list[Work], tmp_path: Path):
    assert suffer(works[0], tmp_path / "run", Fault("before", 10**6)) == "done"
