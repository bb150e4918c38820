"""Which work is small enough for the driver, and that nothing is started for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from rayclust.config import validate
from rayclust.runtime import cluster, tasks
from rayclust.runtime.cluster import OWN, cores, in_driver, is_small, may_use_driver, threads, use_driver
from rayclust.runtime.pipeline import run_all
from rayclust.stages import encode, select_k, train
from tests.stages.runs import tree


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests have started here, these find a laptop without Ray and GPU."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def may(**resources: Any) -> bool:
    return may_use_driver(validate(tree("run", "images", resources=resources)))


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, True), ({"workers": 1}, True), ({"gpus_per_worker": 0}, True), ({"decode_workers": 3}, True),
        ({"workers": 2}, False), ({"min_workers": 1}, False), ({"gpus_per_worker": 1}, False),
        ({"placement": {"tasks": {"pool": "cpu"}}}, False), ({"in_driver": "never"}, False),
    ],
)  # fmt: skip
def test_whoever_asks_for_more_than_this_process_gets_workers(resources: dict[str, Any], expected: bool):
    assert may(**resources) == expected


def test_a_cluster_or_a_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "head:6379")
        assert not may()
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        assert not may()
        assert may(gpus_per_worker=0)
    for namespace, expected in (("of the program", False), (OWN, True)):
        with monkeypatch.context() as patch:
            patch.setattr("ray.is_initialized", lambda: True)
            context = type("Context", (), {"namespace": namespace})()
            patch.setattr("ray.get_runtime_context", lambda found=context: found)
            assert may() == expected


def test_small_is_a_question_of_rows_and_width():
    assert is_small(3_000, 128)
    assert is_small(32_768, 128)
    assert not is_small(32_769, 128)
    assert not is_small(32_768, 512)
    assert is_small(10_000, 1280)


def test_the_driver_has_a_workers_threads_only_within_the_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads(1):
            assert torch.get_num_threads() == 1
            assert {library["num_threads"] for library in threadpool_info()} == {1}
            assert os.environ["OMP_NUM_THREADS"] == "1"
        assert torch.get_num_threads() == 2
        assert "OMP_NUM_THREADS" not in os.environ
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with threads(2):  # as Ray leaves the variable alone where it is set
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "torch")  # as where a worker's task brings it
            with threads(2):
                patch.setitem(sys.modules, "torch", torch)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert cores() >= 1


def test_what_is_said_for_a_block_ends_with_it():
    assert not in_driver()
    with use_driver(True):
        assert in_driver()
        assert list(tasks.map_tasks(lambda item: item + 1, [1, 2])) == [(1, 2), (2, 3)]
        assert cluster.run_remotely(sum, [1, 2, 3]) == 6
    assert not in_driver()


@pytest.mark.parametrize("clusters", [3, [2, 3]])
def test_a_small_run_of_ready_embeddings_connects_to_nothing(
    clusters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module in (cluster, encode, select_k, tasks, train):
        monkeypatch.setattr(module, "connect", lambda: pytest.fail("Ray is started"))
    (tmp_path / "table").mkdir()
    draw = np.random.default_rng(0)
    rows = np.eye(3, 8)[np.arange(60) % 3] + 0.1 * draw.normal(size=(60, 8))
    np.save(tmp_path / "table" / "rows.npy", rows.astype(np.float32))
    method = {"name": "kmeans", "clusters": clusters}
    done = run_all(validate(tree(str(tmp_path / "run"), str(tmp_path / "table"), method=method)))
    assert sum(done["assign"].extra["sizes"]) == 60
    assert (tmp_path / "run" / "report" / "index.html").exists()
