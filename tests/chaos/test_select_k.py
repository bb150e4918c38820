"""Ray Tune's trials killed on a cluster of two nodes: only candidates without a marker are done again."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayclust.config import parse
from rayclust.runtime.pipeline import run_all
from tests.chaos.faults import artefacts
from tests.chaos.nodes import Nodes, start
from tests.stages.in_process import without_ray
from tests.stages.planted import planted, planted_tree
from tests.stages.runs import kill, write_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CANDIDATES = (2, 3, 4, 5, 6)
ROWS = planted(4, seed=3, per_cluster=50)


def prepared(folder: Path, name: str, last: str) -> Path:
    """The config of a run of that name that has come as far as `last` in this process."""
    method = {"name": "temi", "preset": "none", "heads": 2, "steps": 150, "batch_size": 64}
    method |= {"clusters": list(CANDIDATES)}
    resources = {"checkpoint_seconds": 0.05}
    content = planted_tree(folder, ROWS, method=method, select_k={"seeds": 1}, resources=resources)
    line = write_yaml(folder / f"{name}.yaml", content | {"run": str(folder / name)})
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(parse(line.read_text()), stop_after=last)
    return line


def marks(run: Path) -> dict[str, int]:
    """When each candidate was marked."""
    return {path.name: path.stat().st_mtime_ns for path in (run / "manifests" / "select-k").glob("part-*.json")}


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits for what must come while the candidates are under way."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the awaited state never came"
        time.sleep(0.01)


def under_way(run: Path) -> bool:
    """Whether some candidates are marked, others are not, and one of these has a checkpoint."""
    begun = (run / "checkpoints").glob("*/step-*/state.json")
    return 1 <= len(marks(run)) <= 2 and any(begun)


def trials(nodes: Nodes) -> list[int]:
    """Processes in which candidates are tried, as Tune names them."""
    return [pid for pid, title in nodes.processes().items() if title.startswith("ray::ImplicitFunc")]


def kill_trials(nodes: Nodes, process: subprocess.Popen[str], run: Path) -> None:
    """Every trial dies with a candidate half done; Tune puts others in their place, which go on."""
    wait(process, lambda: under_way(run))
    before, victims = marks(run), trials(nodes)
    assert victims
    kill(*victims)
    wait(process, lambda: len(marks(run)) > len(before))
    assert marks(run).items() >= before.items(), "what was marked is not done again"


def test_trials_and_their_driver_are_killed_and_only_missing_candidates_are_tried_again(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    prepared(tmp_path, "undisturbed", "train")
    line, run = prepared(tmp_path, "killed", "neighbors"), tmp_path / "killed"
    process = start(nodes, line, "train")
    try:
        kill_trials(nodes, process, run)
    finally:
        kill(process.pid)
        process.communicate()
    before = marks(run)
    assert len(before) < len(CANDIDATES)
    monkeypatch.setattr(logging.getLogger("rayclust"), "propagate", True)
    with caplog.at_level(logging.INFO, "rayclust"), nodes.driver():
        run_all(parse(line.read_text()), stop_after="train")
    assert f"select-k: {len(before)} of {len(CANDIDATES)} parts were finished before" in caplog.text
    assert "as fitted by select-k" in caplog.text
    assert marks(run).items() >= before.items(), "what was marked is not done again"
    assert not list((run / "checkpoints").glob("*/*"))
    assert artefacts(str(run)) == artefacts(str(tmp_path / "undisturbed"))
