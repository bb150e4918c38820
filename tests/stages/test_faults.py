"""Killed at any moment and run again: nothing is lost, nothing comes twice, and the bytes are the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

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
        method={"name": "temi", "clusters": 3, "preset": "none", "heads": 2, "steps": 600, "batch_size": 32},
        resources={"checkpoint_seconds": 0.5, "workers": 1},
    )
    return write_yaml(run.with_suffix(".yaml"), content)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = command("run", config(inputs, run))
    assert done.returncode == 0, done.stderr
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


def checkpoints(run: Path) -> int:
    return len(list((run / "checkpoints").glob("*/step-*/state.json")))


def workers(process: subprocess.Popen[str], *titles: str) -> list[int]:
    """Ray workers below the driver whose title holds one of `titles`."""
    return [
        pid
        for pid, title in descendants(process.pid).items()
        if title.startswith("ray::") and any(t in title for t in titles)
    ]


def test_a_killed_driver_and_a_killed_session_go_on_where_they_were(inputs: Path, undisturbed: Path, tmp_path: Path):
    run = tmp_path / "run"
    line = ("run", config(inputs, run))

    first = start(*line)
    wait_until(lambda: markers(run) >= 3, first)
    kill(first.pid)
    first.wait()
    done_before = markers(run)
    assert done_before < 3 * PER_CLASS // 16

    second = start(*line)
    wait_until(lambda: checkpoints(run) >= 1, second)
    everything = [second.pid, *descendants(second.pid)]
    kill(*everything)
    output = second.communicate()[0]
    assert "parts were finished before" in output

    third = command(*line)
    assert third.returncode == 0, third.stderr
    assert "encode: done before, skipped" in third.stderr
    assert "neighbors: done before, skipped" in third.stderr
    assert_same(run, undisturbed)


def test_killed_workers_are_replaced_within_the_same_command(inputs: Path, undisturbed: Path, tmp_path: Path):
    run = tmp_path / "run"
    process = start("run", config(inputs, run))
    wait_until(lambda: markers(run) >= 2, process)
    encoders = workers(process, "EncodeChunks", "ReadAndDecode", "ShardWriter", "MapWorker")
    assert encoders
    kill(*encoders)
    wait_until(lambda: checkpoints(run) >= 1, process)
    trainers = workers(process, "RayTrainWorker")
    assert trainers
    kill(*trainers)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert_same(run, undisturbed)


def test_a_finished_run_is_a_no_op_in_seconds(inputs: Path, undisturbed: Path):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    again = command("run", config(inputs, undisturbed), env={**os.environ, "RAY_ADDRESS": "ray://127.0.0.1:1"})
    # The address answers nobody: a no-op does not even look for a cluster.
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before, skipped") == 9
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()} == before


def test_rows_and_bytes_do_not_depend_on_the_number_of_workers(inputs: Path, undisturbed: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = command("encode", config(inputs, run), "resources.workers=2", "resources.decode_workers=2")
    assert done.returncode == 0, done.stderr
    assert files(run, "embeddings/*.parquet") == files(undisturbed, "embeddings/*.parquet")
    assert np.isfinite(np.stack(embeddings(run)["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)).all()
