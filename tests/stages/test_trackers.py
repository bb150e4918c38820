from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError
from rayclust.stages.train import Trackers
from tests.stages.runs import tree

ROW = {"epoch": 3, "step": 40, "loss": 0.5, "head_losses": [0.25, 0.75], "note": "text"}
NUMBERS = {"loss": 0.5, "head_losses/0": 0.25, "head_losses/1": 0.75}


def _config(folder: Path, *to: str) -> RunConfig:
    return validate(tree(str(folder / "run"), str(folder / "images"), tracking={"to": list(to)}))


def test_tensorboards_events_lie_below_the_run(tmp_path: Path):
    from tensorboardX.proto.event_pb2 import Event

    trackers = Trackers(_config(tmp_path, "tensorboard"))
    trackers.log(ROW)
    trackers.close()
    [file] = (tmp_path / "run" / "tensorboard").iterdir()
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):  # records: length, its checksum, content, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += size + 16
    assert found == {name: (40, value) for name, value in NUMBERS.items()}


class Recorder:
    """Stands for either service."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, float], int]] = []
        self.over = False

    def init(self, **settings: Any) -> Recorder:
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.sent.append((numbers, step))

    def finish(self) -> None:
        self.over = True


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_services_get_the_same_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    service = Recorder()
    nothing = lambda *_, **__: None  # noqa: E731
    mlflow = SimpleNamespace(set_experiment=nothing, start_run=nothing, log_params=nothing)
    mlflow.log_metrics, mlflow.end_run = service.log, service.finish
    monkeypatch.setitem(sys.modules, name, service if name == "wandb" else mlflow)
    trackers = Trackers(_config(tmp_path, name))
    trackers.log(ROW)
    trackers.close()
    assert service.sent == [(NUMBERS, 40)]
    assert service.over


def test_a_service_that_fails_is_left_and_the_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    service = Recorder()
    monkeypatch.setattr(service, "log", lambda *_, **__: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", service)
    trackers = Trackers(_config(tmp_path, "wandb"))
    trackers.log(ROW)
    trackers.log(ROW)
    trackers.close()
    assert caplog.text.count("no more is sent there") == 1
    assert not service.over


def test_a_package_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        Trackers(_config(tmp_path, "wandb"))
