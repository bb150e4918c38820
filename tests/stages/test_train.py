"""Checkpoints that survive damage, and a training's artefacts, without a cluster."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

from rayclust.config import validate
from rayclust.errors import ConfigError, RayclustError
from rayclust.runtime.pipeline import run_all, run_stage
from rayclust.stages.train import (
    CHECKPOINTS_KEPT,
    Job,
    StoredCheckpoints,
    _check_every_worker_count,
)
from rayclust.store.run import Run
from rayclust.training.loop import CLOCK_STEPS
from tests.stages.conftest import Sealed
from tests.stages.runs import tree


@pytest.fixture
def store(tmp_path: Path) -> StoredCheckpoints:
    return StoredCheckpoints(Run(str(tmp_path)), "digest")


def save(store: StoredCheckpoints, *steps: int) -> None:
    for step in steps:
        store.save(step, {"w": torch.full((2, 2), float(step))}, {"step": step, "rng": [1, 2]})


def step_of(store: StoredCheckpoints) -> int | None:
    found = store.latest()
    if found is None:
        return None
    tensors, state = found
    assert state["rng"] == [1, 2]
    assert torch.equal(tensors["w"], torch.full((2, 2), float(state["step"])))
    return int(state["step"])


def file(tmp_path: Path, step: int, name: str) -> Path:
    return tmp_path / "checkpoints" / "digest" / f"step-{step:09d}" / name


def test_the_newest_is_read_and_only_the_last_few_are_kept(store: StoredCheckpoints, tmp_path: Path):
    assert store.latest() is None
    save(store, 5, 10, 200, 1000)
    assert step_of(store) == 1000
    kept = sorted(path.name for path in (tmp_path / "checkpoints" / "digest").iterdir())
    assert kept == ["step-000000200", "step-000001000"]
    assert len(kept) == CHECKPOINTS_KEPT


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[str, Any]] = {
    "no state": ("state.json", Path.unlink),
    "no tensors": ("tensors.safetensors", Path.unlink),
    "tensors cut": ("tensors.safetensors", cut),
    "one bit of the tensors": ("tensors.safetensors", flip),
    "state cut": ("state.json", lambda path: path.write_bytes(path.read_bytes()[:20])),
    "state of another kind": ("state.json", lambda path: path.write_text("[1]")),
    "state without its digest": ("state.json", lambda path: path.write_text('{"state": {}}')),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(name: str, store: StoredCheckpoints, tmp_path: Path):
    save(store, 10, 20)
    which, damage = DAMAGE[name]
    damage(file(tmp_path, 20, which))
    assert step_of(store) == 10
    damage(file(tmp_path, 10, which))
    assert step_of(store) is None


def test_killed_between_tensors_and_state_the_older_one_counts_and_is_kept(store: StoredCheckpoints, tmp_path: Path):
    save(store, 10, 20)
    file(tmp_path, 30, "x").parent.mkdir()
    shutil.copy(file(tmp_path, 20, "tensors.safetensors"), file(tmp_path, 30, "tensors.safetensors"))
    assert step_of(store) == 20
    save(store, 30)
    assert step_of(store) == 30
    assert file(tmp_path, 20, "state.json").exists()


def test_trainings_with_other_settings_do_not_see_each_other(store: StoredCheckpoints, tmp_path: Path):
    save(store, 10)
    assert StoredCheckpoints(Run(str(tmp_path)), "another").latest() is None


def test_more_clusters_than_rows_is_said_before_anything_starts(vectors_run: Sealed, in_process: None, tmp_path: Path):
    settings = vectors_run.config.model_copy(update={"run": str(tmp_path / "run")})
    run_all(settings, stop_after="neighbors")
    many = settings.model_copy(update={"method": settings.method.model_copy(update={"clusters": 8})})
    with pytest.raises(ConfigError, match=r"method\.clusters = 8: must be at most the number of rows, 7"):
        run_stage("train", many)
    as_many = settings.model_copy(update={"method": settings.method.model_copy(update={"clusters": 7})})
    run_all(as_many)


def test_kmeans_of_the_run_finds_the_two_directions(vectors_run: Sealed):
    weights = safetensors.numpy.load_file(vectors_run.folder / "model" / "weights.safetensors")
    centers = weights["centers"][np.argsort(weights["centers"][:, 0])]
    x = np.array([[0, 2], [1, 5], [0, 4]]) / np.array([[2], [26**0.5], [4]])
    np.testing.assert_allclose(centers[0], x.mean(0) / np.linalg.norm(x.mean(0)), atol=2e-3)
    assert not list((vectors_run.folder / "checkpoints").glob("**/*.json"))


TRAINED: dict[str, dict[str, Any]] = {
    "temi": {"heads": 2},
    "cpp": {"variant": "two_head", "hidden": 8, "width": 4, "expansion_steps": CLOCK_STEPS + 5},
}


def trained(name: str, sealed: Sealed, run: Path) -> Any:
    method = {"name": name, "clusters": 3, "preset": "none", "steps": 4 * CLOCK_STEPS, "batch_size": 8}
    method |= TRAINED[name]
    content = tree(str(run), sealed.config.images.uri, resources={"checkpoint_seconds": 1e-9})
    return validate(content | {"method": method})


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_stopped_at_any_checkpoint_ends_in_the_same_bytes(
    name: str, pictures_run: Sealed, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    whole, stopped = (trained(name, pictures_run, tmp_path / folder) for folder in ("whole", "stopped"))
    run_all(whole, stop_after="train")
    save_as_before, saved = StoredCheckpoints.save, list[int]()

    def save_and_die(self: StoredCheckpoints, step: int, *content: Any) -> None:
        save_as_before(self, step, *content)
        saved.append(step)
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(StoredCheckpoints, "save", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                run_all(stopped, stop_after="train")
    assert saved == [CLOCK_STEPS, 2 * CLOCK_STEPS], "the second try did not go on from the first"
    run_all(stopped, stop_after="train")
    for name in ("weights.safetensors", "config.json", "metrics.parquet"):
        assert (tmp_path / "whole/model" / name).read_bytes() == (tmp_path / "stopped/model" / name).read_bytes(), name
    history = pq.read_table(tmp_path / "stopped" / "model" / "metrics.parquet")
    assert history["epoch"].to_pylist() == list(range(history.num_rows))
    assert "seconds" not in history.column_names


def test_a_division_for_some_number_of_workers_only_is_refused_before_one_is_lost(pictures_run: Sealed):
    def require(parallel: str, fewest: int) -> None:
        method = {"name": "temi", "clusters": 3, "preset": "none", "heads": 4, "parallel": parallel}
        content = tree("run", "images", resources={"workers": 4, "min_workers": fewest})
        job = Job("train", validate(content | {"method": method}), "digest", pictures_run.manifest("encode"), "model")
        _check_every_worker_count(job, fewest, 4)

    for parallel in ("auto", "data", "heads"):
        require(parallel, 1)
    with pytest.raises(
        ConfigError, match=r"min_workers = 2: 2 workers cannot go on \(method\.parallel = 2x2"
    ) as caught:
        require("2x2", 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("clusters", [2, [2, 3]])
def test_a_refused_training_or_search_leaves_no_rows_in_scratch(
    clusters: Any, vectors_run: Sealed, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path / "scratch"))
    method = {"name": "temi", "preset": "none", "heads": 1, "steps": 20, "batch_size": 8, "learning_rate": 1e30}
    content = vectors_run.config.model_dump(mode="json", exclude_unset=True)
    content |= {"run": str(tmp_path / "run"), "method": method | {"clusters": clusters}}
    with pytest.raises(RayclustError, match="loss = nan"):
        run_all(validate(content))
    assert not list((tmp_path / "scratch").rglob("*.npy"))
