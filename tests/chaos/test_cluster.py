"""Real processes killed on a cluster of two nodes: drivers, workers and raylets, at moments drawn by a seed."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from rayclust.config import parse
from rayclust.runtime.pipeline import run_all
from tests.chaos.faults import artefacts
from tests.chaos.nodes import Nodes, start
from tests.chaos.trial import LAST
from tests.stages.in_process import without_ray
from tests.stages.runs import kill, tree, write_folder, write_yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FAULTS = ("driver", "worker", "raylet", "worker")
"""Of one trial, in an order drawn by its seed."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "images", 60, size=12)


def config(inputs: Path, run: Path) -> Path:
    method = {"name": "temi", "clusters": 3, "preset": "none", "heads": 2, "hidden": 16}
    method |= {"steps": 500, "batch_size": 32}
    resources = {"checkpoint_seconds": 0.1, "workers": 1, "decode_workers": 1}
    images = {"shard_size": 9}
    content = tree(str(run), str(inputs), method=method, resources=resources, images=images)
    return write_yaml(run.with_suffix(".yaml"), content)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same work without a cluster: its nodes have a CPU each, so that sums are taken in the same order."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    return alone(config(inputs, run), run, LAST)


def alone(line: Path, run: Path, last: str) -> dict[str, bytes]:
    """What a run in this process gives."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(parse(line.read_text()), stop_after=last)
    return artefacts(str(run))


def progress(run: Path) -> int:
    """Files that only come and never go: markers, seals and checkpoints."""
    steps = [int(path.parent.name[5:]) for path in (run / "checkpoints").glob("*/step-*/state.json")]
    return len(list((run / "manifests").rglob("part-*.json"))) + max(steps, default=0) // 100


def wait(process: subprocess.Popen[str], run: Path, until: int) -> bool:
    """Whether the run has come so far before it ended."""
    deadline = time.monotonic() + 180
    while progress(run) < until and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process.poll() is None


@pytest.mark.parametrize("seed", range(1))
def test_after_real_kills_the_bytes_are_the_same(
    seed: int, nodes: Nodes, inputs: Path, undisturbed: dict[str, bytes], tmp_path: Path
):
    draw, run, happened = random.Random(seed), tmp_path / "run", list[str]()
    line = config(inputs, run)
    process = start(nodes, line)
    for fault in draw.sample(FAULTS, len(FAULTS)):
        if not wait(process, run, progress(run) + draw.randrange(1, 7)):
            happened.append(f"ended with {process.returncode}")
            process = start(nodes, line)
        elif fault == "driver":
            kill(process.pid)
            process.communicate()
            happened.append("driver")
            process = start(nodes, line)
        else:
            happened.append(nodes.kill_raylet() if fault == "raylet" else nodes.kill_worker(draw))
    output = process.communicate(timeout=240)[0]
    for _ in range(2):  # more may have been lost at once than one command makes up for
        if process.returncode:
            process = start(nodes, line)
            output += process.communicate(timeout=240)[0]
    assert process.returncode == 0, f"{happened}: {output}"
    assert artefacts(str(run)) == undisturbed, happened
    assert len(happened) == len(FAULTS), happened


def test_more_pixels_than_the_object_store_holds_are_spilled(nodes: Nodes, inputs: Path, tmp_path: Path):
    """180 images of 150 KB and as many rows of 300 KB go through 100 MiB."""
    pixels = {"image_size": 224, "batch_size": 90}
    lines = {}
    for name in ("alone", "small"):
        run = tmp_path / name
        content = tree(str(run), str(inputs), encoder=pixels, images={"shard_size": 90}, resources={"workers": 1})
        lines[name] = write_yaml(run.with_suffix(".yaml"), content)
    with nodes.driver():
        run_all(parse(lines["small"].read_text()), stop_after="encode")
    assert artefacts(str(tmp_path / "small")) == alone(lines["alone"], tmp_path / "alone", "encode")
