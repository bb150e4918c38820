"""Killed at any moment and run again: nothing is lost, nothing comes twice, and the bytes are the same."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from ray._private.utils import get_num_cpus
from safetensors.torch import save_file

from rayclust.config import parse
from rayclust.runtime.pipeline import run_all
from tests.stages.in_process import without_ray
from tests.stages.runs import (
    command,
    descendants,
    embeddings,
    files,
    kill,
    start,
    tree,
    wait_until,
    write_folder,
    write_yaml,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PER_CLASS = 80


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and an encoder that is slow enough to be killed at work."""
    folder = tmp_path_factory.mktemp("inputs")
    write_folder(folder / "images", PER_CLASS, size=96)
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_050", pretrained=False, num_classes=0)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


def config(inputs: Path, run: Path) -> Path:
    content = tree(
        str(run),
        str(inputs / "images"),
        encoder={
            "name": "timm/mobilenetv2_050",
            "pretrained": str(inputs / "weights.safetensors"),
            "image_size": 96,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
        method={"name": "temi", "clusters": 3, "preset": "none", "heads": 2, "hidden": 16}
        | {"steps": 600, "batch_size": 32},
        resources={"checkpoint_seconds": 0.1, "workers": 1, "decode_workers": 1, "in_driver": "never"},
    )
    return write_yaml(run.with_suffix(".yaml"), content)


def run_here(line: Path) -> None:
    """Run without a cluster, with as many threads as that of a command gives: sums are in the same order."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch, threads=get_num_cpus())
        run_all(parse(line.read_text()))


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same work at one go."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_here(config(inputs, run))
    return run


def assert_same(run: Path, undisturbed: Path) -> None:
    table = embeddings(run)
    assert table["row"].to_pylist() == list(range(3 * PER_CLASS))
    assert len(set(table["key"].to_pylist())) == 3 * PER_CLASS
    for pattern in ("embeddings/*.parquet", "neighbors/*.parquet", "model/*", "assignments/*.parquet", "metrics.json"):
        ours, theirs = files(run, pattern), files(undisturbed, pattern)
        assert theirs
        assert ours == theirs, pattern
    assert not list((run / "checkpoints").glob("*/step-*"))


def markers(run: Path) -> int:
    return len(list((run / "manifests" / "encode").glob("part-*.json")))


def newest(run: Path) -> int:
    """The step of the newest checkpoint; 0 without any."""
    steps = [int(path.parent.name[5:]) for path in (run / "checkpoints").glob("*/step-*/state.json")]
    return max(steps, default=0)


def workers(process: subprocess.Popen[str], *titles: str) -> list[int]:
    """Ray workers below the driver whose title holds one of `titles`."""
    return [
        pid
        for pid, title in descendants(process.pid).items()
        if title.startswith("ray::") and any(t in title for t in titles)
    ]


def kill_session(driver: subprocess.Popen[str]) -> str:
    """Driver, Ray and workers end at once; returns what the driver had written."""
    kill(driver.pid, *descendants(driver.pid))
    return driver.communicate()[0]


def test_killed_workers_are_replaced_and_a_run_goes_on_where_its_killed_sessions_were(
    inputs: Path,
    undisturbed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    run = tmp_path / "run"
    line = ("run", config(inputs, run))

    first = start(*line)
    wait_until(lambda: markers(run) >= 2, first)
    encoders = workers(first, "EncodeChunks", "ReadAndDecode", "ShardWriter", "MapWorker")
    assert encoders
    kill(*encoders)
    before = markers(run)
    wait_until(lambda: markers(run) > before, first)
    kill_session(first)
    assert markers(run) < 3 * PER_CLASS // 16

    second = start(*line)
    wait_until(lambda: newest(run) > 0, second)
    trainers = workers(second, "ray::train")
    assert trainers
    kill(*trainers)
    before = newest(run)
    wait_until(lambda: newest(run) > before, second)
    assert "parts were finished before" in kill_session(second)

    monkeypatch.setattr(logging.getLogger("rayclust"), "propagate", True)
    with caplog.at_level(logging.INFO, "rayclust"):
        run_here(line[1])
    assert "train: resuming at step" in caplog.text
    assert caplog.text.count("done before, skipped") == 2
    assert_same(run, undisturbed)


def test_a_finished_run_is_a_no_op_in_seconds(inputs: Path, undisturbed: Path):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    again = command("run", config(inputs, undisturbed), env={**os.environ, "RAY_ADDRESS": "ray://127.0.0.1:1"})
    # The address answers nobody: a no-op does not even look for a cluster.
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before, skipped") == 10
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()} == before
