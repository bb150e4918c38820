"""Trainings whose worker or node is lost in mid-epoch, on a cluster of two nodes with a CPU each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.numpy
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from rayclust.config import parse
from rayclust.errors import ArtefactError
from rayclust.methods.base import Batch
from rayclust.runtime.cluster import connect
from rayclust.runtime.pipeline import run_all
from rayclust.stages import train
from rayclust.store import manifest
from rayclust.store.storage import MissingError
from rayclust.training.sampling import RowSource
from tests.chaos.nodes import Nodes
from tests.stages.in_process import without_ray
from tests.stages.runs import files, kill, tree, write_folder, write_yaml
from tests.workers import on_two_workers

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS, BATCH, STEPS = 1000, 20, 600
"""50 steps an epoch, so that most checkpoints, one after every 20 steps, are within one."""
TOLERANCE = 2e-4
"""Of weights whose sums are taken in another order: 2e-5 apart in the end. Half of each batch left out from the middle
of the training on moves them by 6e-4."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows around four directions."""
    folder, draw = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    x = np.eye(4, 8)[np.arange(ROWS) % 4] + 0.3 * draw.normal(size=(ROWS, 8))
    column = pa.array(list(x.astype(np.float32)), pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": column}), folder / "0.parquet")
    return folder


def prepared(table: Path, run: Path, **resources: Any) -> Path:
    """The config of a run that has its rows and neighbours and trains next."""
    method = {"name": "temi", "clusters": 4, "preset": "none", "heads": 2, "hidden": 16, "parallel": "data"}
    method |= {"steps": STEPS, "batch_size": BATCH, "learning_rate": 5e-4}
    resources = {"workers": 2, "checkpoint_seconds": 1e-6} | resources
    line = write_yaml(run.with_suffix(".yaml"), tree(str(run), str(table), method=method, resources=resources))
    run_in_process(line, "neighbors")
    return line


def learning_from_pixels(images: Path, run: Path) -> Path:
    """The config of a run that learns from pixels next, 9 steps an epoch."""
    method = {"name": "propos", "clusters": 3, "backbone": "small", "features": 8, "hidden": 16, "batch_size": 20}
    method |= {"epochs": 5, "warmup_epochs": 1, "restarts": 1}
    resources = {"workers": 2, "checkpoint_seconds": 1e-6}
    content = tree(str(run), str(images), method=method, resources=resources)
    content |= {"encoder": {"name": "pixels", "image_size": 8, "normalize": False}, "features": {"normalize": False}}
    line = write_yaml(run.with_suffix(".yaml"), content)
    run_in_process(line, "encode")
    return line


def run_in_process(line: Path, last: str, *, workers: bool = False) -> None:
    """Run stages without a cluster; a training with `workers` in two processes."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        if workers:
            patch.setattr(train, "_train", lambda settings: on_two_workers(work, settings["job"])[0])
        run_all(parse(line.read_text()), stop_after=last)


def work(rank: int, world: int, job: train.Job) -> Any:
    return train._train({"job": job, "report": [].append})


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers do without a cluster."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_in_process(prepared(table, run), "train", workers=True)
    return run


def with_half_batches(table: Path, run: Path) -> Path:
    """What comes of it when the lost worker's share of the batches is lost as well."""
    line, whole = prepared(table, run), RowSource.batches

    def half(self: RowSource, plan: Any, rank: int, start: int = 0) -> Iterator[Batch]:
        for batch in whole(self, plan, rank, start):
            each = 2 if batch.step >= STEPS // 2 else 1
            views = {space: x[:, ::each] for space, x in batch.views.items()}
            yield replace(batch, views=views, rows=batch.rows[::each], weight=1.0)

    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        patch.setattr(RowSource, "batches", half)
        run_all(parse(line.read_text()), stop_after="train")
    return run


def newest(run: Path) -> dict[str, Any]:
    """The state in the newest checkpoint that can be read; they come and go."""
    for path in sorted((run / "checkpoints").glob("*/step-*/state.json"), reverse=True):
        try:
            return dict(manifest.read_checked(str(path))["state"])
        except (MissingError, ArtefactError):
            continue
    return {"step": 0, "workers": 0}


def wait(run: Path, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The state of the newest checkpoint once it is as awaited, while the training goes on."""
    deadline = time.monotonic() + 120
    while not until(state := newest(run)):
        assert not (run / "manifests" / "train.json").exists(), "the training has ended before"
        assert time.monotonic() < deadline, f"the awaited checkpoint never came, the newest is {state}"
        time.sleep(0.01)
    return state


def in_mid_epoch(state: dict[str, Any]) -> bool:
    return state["step"] >= 100 and state["step"] % 50 > 0


def weights(run: Path) -> np.ndarray:
    loaded = safetensors.numpy.load_file(run / "model" / "weights.safetensors")
    return np.concatenate([loaded[name].ravel() for name in sorted(loaded)])


@contextmanager
def counted_often() -> Iterator[None]:
    """Ray counts the places of the cluster before the training and twice a second, not every 20 s."""
    connect()
    counter, ended = get_or_create_autoscaling_coordinator(), threading.Event()
    ray.get(counter._tick.remote())

    def count() -> None:
        while not ended.wait(0.5):
            ray.get(counter._tick.remote())

    with ThreadPoolExecutor(1) as beside:
        counting = beside.submit(count)
        try:
            yield
        finally:
            ended.set()
        counting.result()


def test_a_worker_killed_in_mid_epoch_is_replaced_and_the_weights_are_the_same(nodes: Nodes, tmp_path: Path):
    images, run, other = write_folder(tmp_path / "images", 60, size=8), tmp_path / "run", tmp_path / "undisturbed"
    run_in_process(learning_from_pixels(images, other), "train", workers=True)
    line = learning_from_pixels(images, run)

    def kill_one() -> None:
        step = int(wait(run, lambda state: state["step"] >= 10 and state["step"] % 9 > 0)["step"])
        workers = [pid for pid, title in nodes.processes().items() if title.startswith("ray::RayTrainWorker")]
        assert len(workers) == 2
        kill(workers[step % 2])

    with nodes.driver(kill_one):
        run_all(parse(line.read_text()), stop_after="train")
    assert files(run, "model/*") == files(other, "model/*")


def test_a_node_lost_for_good_in_mid_epoch_leaves_one_worker_with_the_same_batches(
    nodes: Nodes, table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Ray may ask for the lost node's places once more before it counts again.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    run = tmp_path / "run"
    line = prepared(table, run, min_workers=1)

    def lose_one() -> None:
        assert wait(run, in_mid_epoch)["workers"] == 2
        nodes.lose()
        assert wait(run, lambda state: state["workers"] == 1)["step"] < STEPS

    try:
        with nodes.driver(lose_one), counted_often():
            run_all(parse(line.read_text()), stop_after="train")
    finally:
        nodes.regain()
    ours, theirs = (pq.read_table(folder / "model" / "metrics.parquet") for folder in (run, undisturbed))
    assert ours["step"].to_pylist() == theirs["step"].to_pylist()
    assert ours["loss"].to_pylist() == pytest.approx(theirs["loss"].to_pylist(), abs=TOLERANCE)
    np.testing.assert_allclose(weights(run), weights(undisturbed), rtol=0, atol=TOLERANCE)
    half = with_half_batches(table, tmp_path / "half")
    assert np.abs(weights(half) - weights(undisturbed)).max() > 2 * TOLERANCE
