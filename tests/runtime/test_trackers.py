"""Trackers: TensorBoard's files, MLflow's local store and W&B's offline mode get settings, losses, scores, page."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError
from rayclust.runtime import trackers as module
from rayclust.runtime.pipeline import run_all
from rayclust.runtime.trackers import Trackers, flat_numbers, flat_settings, refuse_missing
from rayclust.store import storage
from rayclust.store.manifest import read_manifest
from rayclust.store.run import Run
from tests.sealed import Sealed
from tests.stages.planted import planted_tree
from tests.stages.runs import tree

ROW = {"epoch": 3, "step": 40, "loss": 0.5, "head_losses": [0.25, 0.75], "note": "text"}
NUMBERS = {"loss": 0.5, "head_losses/0": 0.25, "head_losses/1": 0.75}
SCORES = {"accuracy": 0.9, "rows": 24, "sizes": [8, 8, 8], "test": {"accuracy": 0.8, "sizes": [1]}, "name": "text"}
FINAL = {"final/accuracy": 0.9, "final/rows": 24, "final/test/accuracy": 0.8}
PAGE = "<!doctype html><title>Clusters</title>"
FILES = {"index.html": PAGE, "data/points.js": 'rayclust("points",[]);'}


def _config(folder: Path, *to: str) -> RunConfig:
    return validate(tree(str(folder / "run"), str(folder / "images"), tracking={"to": list(to)}))


def _track(config: RunConfig) -> None:
    """Track a training that is resumed, and then the report, as three processes do."""
    for step in (40, 80):
        trackers = Trackers(config, "fit")
        trackers.log(ROW | {"step": step})
        trackers.close()
    run = Run(config.run)
    for name, text in FILES.items():
        storage.write_bytes(run.at("report", *name.split("/")), text.encode())
    Trackers(config, "fit").finish(SCORES, run.report)


def test_settings_have_the_keys_of_a_config(tmp_path: Path):
    settings = flat_settings(_config(tmp_path))
    assert settings["method.clusters"] == 3
    assert (settings["features.center"], settings["tracking.to"]) == (True, [])
    assert flat_numbers({"final": SCORES}) == FINAL


def _events(file: Path) -> list[tuple[str, int, float]]:
    from tensorboardX.proto.event_pb2 import Event

    data, found, at = file.read_bytes(), [], 0
    while at < len(data):  # records: length, its checksum, content, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += size + 16
    return found


def test_tensorboards_events_lie_below_the_run(tmp_path: Path):
    _track(_config(tmp_path, "tensorboard"))
    folder = tmp_path / "run" / "tensorboard"
    found = [event for file in folder.rglob("*tfevents*") for event in _events(file)]
    losses = [(name, step, value) for name, step, value in found if name in NUMBERS]
    assert sorted(losses) == sorted((name, step, value) for step in (40, 80) for name, value in NUMBERS.items())
    assert {name: value for name, _, value in found if name.startswith("final/")} == pytest.approx(FINAL)
    identity = storage.read_json(str(tmp_path / "run" / "tracking.json"))["id"]
    [table] = (folder / identity).iterdir()
    assert b"method.clusters" in table.read_bytes(), "settings stand beside the scores"


def test_mlflows_store_has_one_run_with_settings_losses_scores_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(None)  # what another test of this process has used
    config = _config(tmp_path, "mlflow")
    _track(config)
    [run] = mlflow.search_runs(experiment_names=["rayclust"], output_format="list")
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.runName"] == config.run
    assert run.data.params == {key: str(value) for key, value in flat_settings(config).items()}
    assert run.data.metrics == NUMBERS | FINAL
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(40, 0.5), (80, 0.5)]
    folder = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="report"))
    assert {name: (folder / name).read_text() for name in FILES} == FILES
    Trackers(config, "another fit").close()
    assert len(mlflow.search_runs(experiment_names=["rayclust"], output_format="list")) == 2


def test_wandbs_offline_files_have_one_run_with_settings_losses_scores_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb")
    folders = dict.fromkeys(("DIR", "CACHE_DIR", "DATA_DIR"), str(tmp_path))
    for name, value in ({"MODE": "offline", "SILENT": "true"} | folders).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = _config(tmp_path, "wandb")
    _track(config)
    identity = storage.read_json(str(tmp_path / "run" / "tracking.json"))["id"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{identity}.wandb"}, "sync makes one run of them"
    records, deadline = list[Any](), time.monotonic() + 30
    while not any("final" in str(each.summary) for each in records) and time.monotonic() < deadline:
        time.sleep(0.1)  # the service writes on after the run has ended
        records = [record for file in files for record in _wandb_records(file)]
    settings = [item for each in records if each.WhichOneof("record_type") == "run" for item in each.run.config.update]
    assert {item.key for item in settings} >= {"method", "features", "seed"}
    rows = [
        {"/".join(item.nested_key) or item.key: item.value_json for item in each.history.item}
        for each in records
        if each.WhichOneof("record_type") == "history"
    ]
    losses = [row for row in rows if "loss" in row]  # runs of one second are numbered in no order
    assert sorted((row["step"], row["loss"], row["head_losses/1"]) for row in losses) == [
        ("40", "0.5", "0.75"),
        ("80", "0.5", "0.75"),
    ]
    summary = {"/".join(i.nested_key) or i.key: i.value_json for each in records for i in each.summary.update}
    assert {name: float(summary[name]) for name in FINAL} == FINAL
    [page] = tmp_path.glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert page.read_text() == PAGE
    [artifact] = [each.artifact for each in records if each.WhichOneof("record_type") == "artifact"]
    assert {entry.path for entry in artifact.manifest.contents} == set(FILES), "the page and what lies beside it"


def _wandb_records(file: Path) -> list[Any]:
    """LevelDB's log format behind seven bytes: blocks of 32 KiB with checksum, length, kind (1 whole, 4 last), data."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, at, record = file.read_bytes(), [], 7, b""
    while at + 7 <= len(data):
        if -at % 2**15 < 7:  # too short for a header: filled up
            at += -at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(record))
            record = b""
    return found


def test_a_service_that_fails_is_left_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    closed = list[str]()
    failing = module._Tracker(lambda *_: 1 / 0, lambda *_: None, lambda: closed.append("failing"))
    working = module._Tracker(lambda *_: None, lambda *_: None, lambda: closed.append("working"))

    def refuse(*_: Any) -> Any:
        raise ConnectionError("no\nroute")

    services = {"tensorboard": failing, "wandb": working}
    found = {name: ("json", lambda *_, tracker=tracker: tracker) for name, tracker in services.items()}
    monkeypatch.setattr(module, "_SERVICES", found | {"mlflow": ("json", refuse)})
    trackers = Trackers(_config(tmp_path, "tensorboard", "wandb", "mlflow"), "fit")
    trackers.log(ROW)
    trackers.log(ROW)
    trackers.close()
    assert closed == ["working"]
    assert [line.count("no more is sent there") for line in caplog.messages] == [1, 1]
    assert "tracking.to = mlflow: no route; no more" in caplog.text


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "wandb" else importlib.util.find_spec(name))
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        refuse_missing(_config(tmp_path, "tensorboard", "wandb"))


def test_a_run_sends_its_losses_and_then_its_scores(pictures_run: Sealed):
    assert "tensorboardX" in sys.modules
    manifest = read_manifest(pictures_run.run, "train")
    assert manifest is not None
    tracked = storage.read_json(pictures_run.run.tracking)
    assert tracked["fit"] == manifest.digest
    found = [event for file in (pictures_run.folder / "tensorboard").rglob("*tfevents*") for event in _events(file)]
    scores = {name: value for name, _, value in found if name.startswith("final/")}
    metrics = storage.read_json(pictures_run.run.metrics)
    assert scores["final/silhouette"] == pytest.approx(metrics["silhouette"])
    assert {name for name, _, _ in found} >= {"final/rows", "inertia"}


def test_a_run_shows_its_training_alone_and_not_the_fits_of_its_search(tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    method = {"name": "cpp", "clusters": [2, 3], "preset": "none", "steps": 6, "batch_size": 30}
    content = planted_tree(tmp_path, rows, method=method, tracking={"to": ["tensorboard"]})
    for group in ({"select_k": {"seeds": 1, "rounds": 0}}, {"method": method | {"clusters": 2, "steps": 8}}):
        config = validate(content | group)
        run_all(config, stop_after="train")
        shown = [event for file in (tmp_path / "run").rglob("*tfevents*") for event in _events(file)]
        history = pq.read_table(Run(config.run).at("model", "metrics.parquet"))
        losses = zip(history["step"].to_pylist(), history["loss"].to_pylist(), strict=True)
        # The chosen candidate's model is copied; what is trained afterwards is shown step by step.
        wanted = [] if config.needs_selection else [("loss", step, pytest.approx(loss)) for step, loss in losses]
        assert sorted(event for event in shown if event[0] == "loss") == wanted
