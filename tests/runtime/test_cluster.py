from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray._private.state
from ray.exceptions import RayTaskError

from rayclust.config import PlacementConfig, validate
from rayclust.errors import ConfigError, DataError, RayclustError
from rayclust.runtime import cluster
from rayclust.runtime.cluster import (
    connect,
    cpus,
    plain_errors,
    run_remotely,
    training_workers,
    worker_count,
)
from rayclust.runtime.pipeline import run_all
from rayclust.runtime.progress import context_value
from tests.chaos.nodes import Nodes
from tests.stages.runs import tree, write_folder


def raised(error: Exception) -> Exception:
    """What the block of `plain_errors` lets out."""
    with pytest.raises(Exception) as caught, plain_errors():
        raise error
    return caught.value


def wrapped(cause: Exception) -> Exception:
    """As Ray raises a worker's error in the driver."""
    return RayTaskError("work", f"Traceback (most recent call last):\n  ...\n{cause!r}", cause).as_instanceof_cause()


def test_an_error_raised_on_purpose_in_a_worker_keeps_its_one_line():
    error = wrapped(DataError("photos: no such bucket"))
    assert isinstance(error, DataError)
    assert str(error) != "photos: no such bucket"
    assert str(raised(error)) == "photos: no such bucket"
    assert type(raised(error)) is DataError


def test_an_error_deep_in_causes_and_contexts_is_found():
    try:
        try:
            raise wrapped(ConfigError("method.clusters = 9: too many"))
        except Exception as inner:
            raise RuntimeError("the job failed") from inner
    except RuntimeError as outer:
        error = outer
    assert str(raised(error)) == "method.clusters = 9: too many"


def test_failures_of_training_workers_are_looked_into():
    error = RuntimeError("training failed on 2 workers")
    error.worker_failures = {0: OSError("lost"), 1: wrapped(ConfigError("K above N"))}  # type: ignore[attr-defined]
    assert str(raised(error)) == "K above N"


def test_other_errors_pass_as_they_are():
    error = ValueError("a bug")
    assert raised(error) is error
    own = DataError("from the driver itself")
    assert raised(own) is own
    looped = RuntimeError("its own cause")
    looped.__cause__ = looped
    assert raised(looped) is looped


def test_an_interrupt_is_no_error():
    with pytest.raises(KeyboardInterrupt), plain_errors():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [
        ([2], 1, 2), ([2], 2, 1), ([2], 5, 1), ([8, 8], 1, 8), ([8, 8], 2, 8), ([8, 8], 3, 4), ([8, 4], 2, 4),
        ([0, 16, 16], 4, 8), ([0], 1, 1), ([], 1, 1), ([7, 5], 4, 2),
    ],
)  # fmt: skip
def test_a_workers_cpus_lie_on_one_node(nodes: list[int], workers: int, cores: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "live_nodes", lambda labels: [{"CPU": cpus} for cpus in nodes])
    resources = {"workers": workers, "gpus_per_worker": 0}
    assert training_workers(validate(tree("run", "images", resources=resources))) == (workers, workers, cores)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that Ray joins; no cluster is there."""
    found = list[str]()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **options: found.append(address))
    monkeypatch.setattr(ray, "nodes", list)
    return found


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_one_line_at_once(
    scheme: str, joined: list[str], monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, so nobody else's; not listening, so nobody answers
        address = f"{scheme}127.0.0.1:{probe.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS = {address}: no Ray cluster answers there"):
            connect()
    assert joined == []


def test_an_address_that_is_none_is_refused_and_words_pass(joined: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:port")
    with pytest.raises(ConfigError, match="is no address"):
        connect()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        places = ["auto", "local", f"ray://127.0.0.1:{server.getsockname()[1]}"]
        for place in places:
            monkeypatch.setenv("RAY_ADDRESS", place)
            connect()
    assert joined == places


def test_the_fewest_workers_are_all_unless_fewer_are_allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "live_nodes", lambda labels: [{"CPU": 2}])

    def wanted(**resources: int) -> tuple[int, int]:
        return training_workers(validate(tree("run", "images", resources=resources)))[:2]

    assert wanted(workers=4) == (4, 4)
    assert wanted(workers=4, min_workers=1) == (1, 4)
    assert wanted(workers=4, min_workers=4) == (4, 4)
    assert wanted(min_workers=2) == (2, 2)  # without GPUs `auto` asks for one


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_local_cluster_is_joined_described_and_used():
    connect()
    assert cpus({}) == 2
    auto = validate(tree("run", "images"))
    auto = auto.model_copy(update={"resources": auto.resources.model_copy(update={"gpus_per_worker": 0.0})})
    assert (worker_count(auto, "encode"), training_workers(auto)) == (2, (1, 1, 2))
    three = validate(tree("run", "images", resources={"workers": 3}))
    assert (worker_count(three, "encode"), worker_count(three, "train")) == (3, 3)

    def fail(message: str) -> None:
        raise DataError(message)

    assert run_remotely(sum, [1, 2, 3]) == 6
    with pytest.raises(RayclustError) as caught:
        run_remotely(fail, "one line")
    assert str(caught.value) == "one line"


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
    assert cpus(CPU) == cpus({}) == 5
    assert cpus(GPU) == 1
    assert len(cluster.live_nodes(CPU)) == 2
    assert cluster.live_nodes(CPU | {"zone": "a"}) == []


def test_without_labels_ray_is_asked_what_it_was(cluster_nodes: list[dict[str, Any]]):
    assert cluster.label_selector("tasks", {}) == {}
    assert cluster.label_selector("tasks", CPU) == {"label_selector": CPU}


def test_a_label_that_no_node_carries_is_said_with_those_that_they_do(
    cluster_nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    in_namespace(monkeypatch, "anonymous")
    cluster._warn_once.cache_clear()
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
    assert cluster.task_labels.get() == {}
    with context_value(cluster.task_labels, {"tasks": CPU}):
        assert cluster.task_labels.get()["tasks"] == CPU
    assert cluster.task_labels.get() == {}


def test_tasks_with_gpus_go_where_trainings_go(cluster_nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    in_namespace(monkeypatch, "anonymous")
    with context_value(cluster.task_labels, {"tasks": CPU, "train": GPU}):
        assert cluster.task_options(0) == ({"label_selector": CPU}, CPU)
        assert cluster.task_options(0.5) == cluster.task_options(0, "train") == ({"label_selector": GPU}, GPU)
    assert cluster.task_options(1) == ({}, {})


def test_the_plan_names_every_kind_of_work():
    assert cluster.describe_placement(PlacementConfig()) == "all work on any node"
    text = cluster.describe_placement(PlacementConfig(decode=CPU, encode=GPU))
    assert text.startswith("decode on pool=cpu, encode on pool=gpu, train on any node, trials on any node")
    for labels in ({"pool": "cpu", "market": "spot"}, {"market": "spot", "pool": "cpu"}):  # in one order
        assert cluster.describe_placement(PlacementConfig(decode=labels)).startswith("decode on market=spot,pool=cpu,")


def gpu_node(labels: dict[str, str], kind: str = "H100", gpus: float = 1) -> dict[str, Any]:
    found = node(labels)
    found["Resources"] |= {"GPU": gpus, f"accelerator_type:{kind}": 1.0}
    return found


NVIDIA = [gpu_node({}), gpu_node({}, gpus=4)]


@pytest.mark.parametrize(
    ("nodes", "described"),
    [
        (NVIDIA, "2 node(s), 4 CPUs, 5 × NVIDIA H100"),
        (
            [*NVIDIA, gpu_node({}, "AMD-Instinct-MI300X-OAM")],
            "3 node(s), 6 CPUs, 5 × NVIDIA H100, 1 × AMD-Instinct-MI300X-OAM",
        ),
        ([{"Alive": True, "Resources": {"CPU": 4, "GPU": 2}}], "1 node(s), 4 CPUs, 2 × GPU"),
        ([{"Alive": True, "Resources": {"CPU": 4}}, {"Alive": False}], "1 node(s), 4 CPUs, CPU only"),
    ],
)
def test_gpus_are_said_by_their_kind(
    nodes: list[dict[str, Any]],
    described: str,
    joined: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with caplog.at_level(logging.INFO):
        connect()
    assert joined == ["local"]
    assert caplog.messages == [f"ray: {described}"]


@pytest.fixture
def auto_gpus(cluster_nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """What `gpus_per_worker: auto` becomes with these nodes."""
    in_namespace(monkeypatch, "anonymous")
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "may_use_driver", lambda config: False)
    monkeypatch.setattr(cluster, "BOOTSTRAP", "/nonexistent")

    def resolved(kind: Any = "encode", **resources: Any) -> float:
        config = validate(tree("run", "images", resources=resources))
        return cluster.with_gpus(config, kind).resources.gpus

    return resolved


def test_a_gpu_that_is_there_is_used(auto_gpus: Callable[..., float], cluster_nodes: list[dict[str, Any]]):
    assert auto_gpus() == 0
    cluster_nodes.append(gpu_node(GPU))
    assert auto_gpus() == 1
    assert auto_gpus(gpus_per_worker=0) == 0
    split = {"encode": GPU, "train": CPU}
    assert [auto_gpus(kind, placement=split) for kind in ("encode", "train", "trials")] == [1, 0, 1]
    assert auto_gpus("train", placement=split, gpus_per_worker=2) == 2
    cluster_nodes[-1]["Alive"] = False
    assert auto_gpus() == 0


def test_gpus_that_an_autoscaler_can_add_are_counted_on(
    auto_gpus: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "bootstrap.yaml"
    monkeypatch.setattr(cluster, "BOOTSTRAP", str(path))
    path.write_text("available_node_types: {head: {resources: {CPU: 4}}, gpu: {resources: {CPU: 4, GPU: 1}}}")
    assert auto_gpus() == auto_gpus(placement={"encode": GPU}) == 1
    assert auto_gpus(placement={"encode": CPU}) == 0, "such nodes are there, and have none"
    path.write_text("available_node_types: {head: {resources: {CPU: 4}}, gpu: {resources: {GPU: 1}, max_workers: 0}}")
    assert auto_gpus() == 0
    path.write_text("- no: [cluster")
    assert auto_gpus() == 0


@pytest.mark.parametrize("sees", [True, False])
def test_a_gpu_of_this_machine_is_used_where_torch_reports_it(
    sees: bool,
    auto_gpus: Callable[..., float],
    cluster_nodes: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    in_namespace(monkeypatch, cluster.OWN)
    cluster._warn_once.cache_clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: sees)
    cluster_nodes.append(gpu_node({}))
    assert auto_gpus() == sees
    assert ("lies idle" in caplog.text) == (not sees)


@pytest.mark.ray
@pytest.mark.slow
def test_decoders_run_on_cpu_nodes_and_encoders_and_training_on_gpu_nodes(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = write_folder(tmp_path / "images", 4)
    placement = {"decode": CPU, "encode": GPU, "train": GPU, "tasks": CPU}
    place = tmp_path / "place"

    def train_and_tell(settings: dict[str, Any]) -> Any:
        from rayclust.stages import train

        place.write_text(ray.get_runtime_context().get_node_id())
        return train._train(settings)

    monkeypatch.setattr("rayclust.stages.train._train", train_and_tell)
    config = validate(tree(str(tmp_path / "run"), str(images), resources={"placement": placement}))
    with nodes.driver():
        run_all(config, stop_after="train")
        pools = {node["NodeID"]: node["Labels"]["pool"] for node in ray.nodes()}
        own = ray.get_runtime_context().get_job_id()
        actors = [actor for actor in ray._private.state.actors().values() if actor["JobID"] == own]
    places = {(actor["ActorClassName"], pools.get(actor["Address"]["NodeID"])) for actor in actors}
    assert {pool for kind, pool in places if "ReadAndDecode" in kind} == {"cpu"}
    assert {pool for kind, pool in places if "EncodeChunks" in kind} == {"gpu"}
    assert pools[place.read_text()] == "gpu", "where the training was"
    assert {pool for kind, pool in places if "ShardWriter" in kind} == {"cpu"}
