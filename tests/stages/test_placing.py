from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from rayclust.config import PlacementConfig
from rayclust.errors import ConfigError
from rayclust.runtime import cluster
from tests.stages.runs import tree, write_folder, write_yaml

CPU, GPU = {"pool": "cpu"}, {"pool": "gpu"}


def node(labels: dict[str, str], cpus: float = 2, alive: bool = True) -> dict[str, Any]:
    return {"Labels": labels | {"ray.io/node-id": "x"}, "Resources": {"CPU": cpus}, "Alive": alive}


@pytest.fixture
def cluster_nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray says of the nodes."""
    found = [node({"pool": "head"}, 0), node(CPU), node(CPU, 3), node(CPU, 9, alive=False)]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    return found


def in_namespace(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    context = type("Context", (), {"namespace": name})()
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


def test_only_live_nodes_with_the_labels_count(cluster_nodes: list[dict[str, Any]]):
    assert cluster.total_resource("CPU", CPU) == 5
    assert cluster.total_resource("CPU", {}) == 5
    assert cluster.total_resource("GPU", CPU) == 0
    assert len(cluster.live_nodes(CPU)) == 2


def test_without_labels_ray_is_asked_what_it_was(cluster_nodes: list[dict[str, Any]]):
    assert cluster.label_selector("tasks", {}) == {}
    assert cluster.label_selector("tasks", CPU) == {"label_selector": CPU}


def test_a_label_that_no_node_carries_is_said_with_those_that_they_do(
    cluster_nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    in_namespace(monkeypatch, "anonymous")
    cluster._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cluster.label_selector("encode", GPU) == {"label_selector": GPU}
        cluster.require_label("encode", GPU)
    assert "resources.placement.encode = pool=gpu: no node of the cluster carries it" in caplog.text
    assert "the nodes carry pool=cpu; pool=head" in caplog.text
    assert len(caplog.records) == 1, "once, however many tasks ask"


def test_a_cluster_of_our_own_will_never_have_the_label(
    cluster_nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    in_namespace(monkeypatch, cluster.OWN)
    with pytest.raises(ConfigError, match=r"placement\.train = pool=gpu.*leave the placement out"):
        cluster.require_label("train", GPU)


def test_tasks_carry_the_labels_of_the_run_that_sends_them():
    assert cluster.task_labels() == {}
    with cluster.scheduling(PlacementConfig(tasks=CPU)):
        assert cluster.task_labels() == CPU
    assert cluster.task_labels() == {}


def test_the_plan_names_every_kind_of_work():
    assert cluster.describe_placement(PlacementConfig()).startswith("all work on any node; the driver")
    text = cluster.describe_placement(PlacementConfig(decode=CPU, encode=GPU))
    assert text.startswith("decode on pool=cpu, encode on pool=gpu, train on any node, trials on any node")


DRIVER = (
    "import json, sys, ray, ray._private.state; from ray.cluster_utils import Cluster; "
    "from rayclust.config import parse; from rayclust.runtime.pipeline import run_all\n"
    "small = {'object_store_memory': 100 << 20}\n"
    "nodes = Cluster(initialize_head=True, head_node_args={'num_cpus': 0, 'include_dashboard': False} | small)\n"
    "for pool in ('cpu', 'gpu'): nodes.add_node(num_cpus=2, labels={'pool': pool}, **small)\n"
    "ray.init(nodes.address, log_to_driver=False)\n"
    "sealed = run_all(parse(open(sys.argv[1]).read()), stop_after='train')\n"
    "pools = {node['NodeID']: node['Labels'].get('pool', 'head') for node in ray.nodes()}\n"
    "actors = ray._private.state.actors().values()\n"
    "places = [[actor['ActorClassName'], pools.get(actor['Address']['NodeID'])] for actor in actors]\n"
    "print('PLACES', json.dumps(places))\n"
    "ray.shutdown(); nodes.shutdown()"
)
"""A run on a cluster whose head computes nothing, and where its actors were."""


@pytest.mark.ray
@pytest.mark.slow
def test_decoders_run_on_cpu_nodes_and_encoders_and_training_on_gpu_nodes(tmp_path: Path):
    images = write_folder(tmp_path / "images", 4)
    placement = {"decode": CPU, "encode": GPU, "train": GPU, "tasks": CPU}
    line = write_yaml(
        tmp_path / "run.yaml", tree(str(tmp_path / "run"), str(images), resources={"placement": placement})
    )
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(line)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = [row.removeprefix("PLACES ") for row in done.stdout.splitlines() if row.startswith("PLACES ")]
    places = {(kind, pool) for kind, pool in json.loads(found)}
    assert {pool for kind, pool in places if "ReadAndDecode" in kind} == {"cpu"}
    assert {pool for kind, pool in places if "EncodeChunks" in kind} == {"gpu"}
    assert {pool for kind, pool in places if "RayTrainWorker" in kind} == {"gpu"}
    assert {pool for kind, pool in places if "ShardWriter" in kind} == {"cpu"}
