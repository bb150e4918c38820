"""Candidates over a real Ray Tune: chosen rightly, refused in one line, and finished after a kill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayclust.cli import run_command
from rayclust.config import validate
from rayclust.errors import ConfigError, RayclustError
from rayclust.runtime import pipeline
from rayclust.runtime.pipeline import run_all
from rayclust.stages.select_k import _refuse_failed, _room
from rayclust.store import filesystem
from rayclust.store.layout import Run
from tests.stages.planted import planted, planted_tree
from tests.stages.runs import tree, write_yaml
from tests.stages.test_select_k import SEEDS


def ended(**what: Any) -> Any:
    return SimpleNamespace(**({"error": None, "metrics": {"refused": None}} | what))


def test_a_trial_that_ended_well_is_no_failure():
    _refuse_failed(7, ended())


def test_a_refusal_keeps_its_kind_and_names_the_candidate():
    with pytest.raises(ConfigError, match=r"^select-k: the candidate k = 7 failed: method\.beta = 0: too low$"):
        _refuse_failed(7, ended(metrics={"refused": "method.beta = 0: too low", "kind": "ConfigError"}))


CRASHES = {
    "Traceback (most recent call last):\n  File x\nMemoryError: 9 GB\n\n": "MemoryError: 9 GB",
    "The actor died.\nValueError: x\nAn internal error occurred.": "ValueError: x",
    "The actor died.\n\tname: f\n\tpid: 3": "The actor died.",
    "": "RuntimeError",
}


@pytest.mark.parametrize("text", CRASHES)
def test_a_crash_is_one_line(text: str):
    with pytest.raises(RayclustError) as caught:
        _refuse_failed(7, ended(error=RuntimeError(text), metrics=None))
    assert str(caught.value) == f"select-k: the candidate k = 7 failed: {CRASHES[text]}"


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "room"),
    [
        ({"CPU": 8}, 1, 0, 8),
        ({"CPU": 8}, 3, 0, 2),
        ({"CPU": 2}, 3, 0, 0),
        ({"CPU": 8, "GPU": 2}, 1, 1, 2),
        ({"CPU": 8, "GPU": 2}, 1, 0.25, 8),
        ({"CPU": 8}, 1, 1, 0),
    ],
)
def test_a_node_holds_as_many_trials_as_its_scarcest_resource_allows(
    node: dict[str, float], cpus: int, gpus: float, room: int
):
    assert _room(node, cpus, gpus) == room


def chosen(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = filesystem.read_json(Run(str(folder / "run")).selection)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_planted_groups_are_counted_through_tune(tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]):
    for seed in (0, 1):
        rows = planted(SEEDS[seed], seed, per_cluster=600 // SEEDS[seed])
        run_all(validate(planted_tree(tmp_path / str(seed), rows, seed=seed)), stop_after="select-k")
        assert chosen(tmp_path / str(seed))["chosen"] == SEEDS[seed]
    said = capfd.readouterr()
    assert said.out == "", "Tune talks"


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_finds_its_own_number_and_goes_on_to_the_page(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    content = tree(
        str(tmp_path / "run"),
        "dataset:digits",
        images={"shard_size": 512},
        encoder={"batch_size": 256},
        method={"name": "kmeans", "clusters": "auto"},
        select_k={"least": 4, "most": 30, "seeds": 1, "rounds": 1, "max_concurrent": 1},
    )
    config = write_yaml(tmp_path / "RUN.yaml", content)
    assert run_command(["run", str(config)]) == 0
    found = chosen(tmp_path)
    assert 10 / 1.5 <= found["chosen"] <= 10 * 1.5, "scanned digits are ten classes"
    metrics = filesystem.read_json(str(tmp_path / "run" / "metrics.json"))
    assert metrics["clusters"] == found["chosen"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Number of clusters" in page
    assert f"{found['chosen']} clusters were chosen" in page
    assert "clusters: auto" in page
    capsys.readouterr()
    assert run_command(["status", str(tmp_path / "run")]) == 0
    assert f"kmeans, {found['chosen']} clusters by select-k" in capsys.readouterr().out
    monkeypatch.setattr(pipeline.Stage, "module", property(lambda stage: pytest.fail(f"{stage.name} ran again")))
    assert run_command(["run", str(config)]) == 0


@pytest.mark.ray
def test_a_refused_trial_ends_the_stage_in_one_line(
    tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
):
    rows = planted(3, seed=0, per_cluster=20)
    method = {"name": "temi", "preset": "none", "heads": 1, "steps": 20, "batch_size": 32, "learning_rate": 1e30}
    content = planted_tree(tmp_path, rows, method=method | {"clusters": [2, 3]})
    config = write_yaml(tmp_path / "RUN.yaml", content)
    assert run_command(["neighbors", str(config)]) == 2  # encode comes first
    run_all(validate(content), stop_after="neighbors")
    capsys.readouterr()
    assert run_command(["select-k", str(config)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rayclust: select-k: the candidate k = ")
    assert "training loss = nan" in error
