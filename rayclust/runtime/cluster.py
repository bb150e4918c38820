"""The Ray cluster a run uses: the one it is submitted to, else one of its own on this machine."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayclust.config import PlacementConfig, format_labels, has_labels
from rayclust.errors import ConfigError, RayclustError
from rayclust.runtime import progress

# Placement by node label: what the nodes of a cluster offer, and which labels the tasks of a stage carry.


logger = logging.getLogger(__name__)

OWN = "rayclust-own"
"""Namespace of a cluster that this process has started on its machine: no node will ever join it."""
_tasks: ContextVar[dict[str, str]] = ContextVar("tasks", default={})  # noqa: B039 - never changed in place


@contextmanager
def scheduling(placement: PlacementConfig) -> Iterator[None]:
    """Within it, tasks that are sent off through `cluster` and `units` carry the labels of `placement.tasks`."""
    token = _tasks.set(placement.tasks)
    try:
        yield
    finally:
        _tasks.reset(token)


def task_labels() -> dict[str, str]:
    """The labels of tasks here and now; {} outside `placed`."""
    return _tasks.get()


def label_selector(key: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Options of a Ray task or actor that goes to nodes with these labels.

    Args:
        key: what wants it, below `resources.placement`.
        labels: that a node must carry.

    Returns:
        {} where any node will do, so that Ray is asked what it was asked without labels.

    Raises:
        ConfigError: as `require`.
    """
    require_label(key, labels)
    return {"label_selector": dict(labels)} if labels else {}


def live_nodes(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """Resources of the live nodes that carry these labels."""
    import ray

    return [n["Resources"] for n in ray.nodes() if n["Alive"] and has_labels(n["Labels"], labels)]


def total_resource(resource: str, labels: Mapping[str, str]) -> float:
    """How much of a resource the live nodes with these labels have together."""
    return float(sum(node.get(resource, 0) for node in live_nodes(labels)))


def require_label(key: str, labels: Mapping[str, str]) -> None:
    """Says it where no live node carries the labels: work for such a node waits, in silence, until one comes.

    Ray does not tell a driver whether an autoscaler could bring one, or of which labels. Only of a cluster that this
    process has started is it known that none will.

    Raises:
        ConfigError: none does, and the cluster is our own.
    """
    import ray

    if not labels or live_nodes(labels):
        return
    there = sorted({_own_labels(node["Labels"]) for node in ray.nodes() if node["Alive"]})
    text = f"resources.placement.{key} = {format_labels(labels)}: no node of the cluster carries it; the nodes carry "
    text += "; ".join(there)
    if ray.get_runtime_context().namespace == OWN:
        raise ConfigError(
            f"{text}. A cluster on this machine has no labels: leave the placement out, or set RAY_ADDRESS"
        )
    _warn(text)


@lru_cache(64)
def _warn(text: str) -> None:
    """Once, however many tasks ask."""
    logger.warning("%s. The work waits until such a node joins; where none is to come, stop and mend the label", text)


def _own_labels(labels: Mapping[str, str]) -> str:
    """Without those that Ray gives to every node."""
    return format_labels({key: value for key, value in labels.items() if not key.startswith("ray.io/")}) or "no labels"


def describe_placement(placement: PlacementConfig) -> str:
    """Where each kind of work goes, in a line."""
    kinds = {name: getattr(placement, name) for name in PlacementConfig.model_fields}
    where = [f"{name} on {format_labels(labels) if labels else 'any node'}" for name, labels in kinds.items()]
    placed_work = ", ".join(where) if any(kinds.values()) else "all work on any node"
    return (
        f"{placed_work}; the driver, with Tune's and Train's controllers, on the head of a cluster it is submitted to"
    )


if TYPE_CHECKING:  # workers that only read and write do without what the config brings: torch
    from rayclust.config import RunConfig


PATIENCE_SECONDS = 10.0
"""How long a cluster may take to answer at its address."""


def connect() -> None:
    """Joins the cluster named by RAY_ADDRESS (a job has it set), else starts one on this machine; once a process.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    _refuse_silent(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _without_core_chatter():
            if address:
                ray.init(address=address, **quiet)
            else:
                # A laptop's cluster serves this process only: no dashboard, nothing left behind.
                ray.init(address="local", namespace=OWN, include_dashboard=False, **quiet)
    except ConnectionError as error:
        raise ConfigError(f"RAY_ADDRESS = {address}: no Ray cluster answers there ({error})") from None
    logger.info("ray: %s", describe())


def _refuse_silent(address: str | None) -> None:
    """Ray itself goes on trying an address where nobody answers for longer than anybody waits."""
    place = urlsplit("//" + (address or "").rpartition("://")[2])
    try:
        host, port = place.hostname, place.port
    except ValueError:
        raise ConfigError(f"RAY_ADDRESS = {address}: is no address; write HOST:PORT, ray://HOST:PORT or auto") from None
    if host is None or port is None:  # auto, local
        return
    try:
        socket.create_connection((host, port), PATIENCE_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS = {address}: no Ray cluster answers there ({error}); unset it to work on this machine"
        ) from None


@contextmanager
def _without_core_chatter() -> Iterator[None]:
    """Starts Ray's C++ core without its lines about its own actors, which no user can act on; -v lets them through."""
    if logger.isEnabledFor(logging.DEBUG) or "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # the core says on stderr that it was told to be quiet
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


def describe() -> str:
    """The cluster in a line: nodes, CPUs, GPUs."""
    import ray

    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{nodes} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"


def cpus(labels: Mapping[str, str] | None = None) -> int:
    """Number of CPUs of the cluster, or of its nodes with some labels; at least 1."""
    return max(1, int(total_resource("CPU", labels or {})))


def cores_per_worker(workers: int, labels: Mapping[str, str] | None = None) -> int:
    """The most CPUs that each of so many workers on nodes with some labels can have; one worker's lie on one node."""
    return widest([int(node.get("CPU", 0)) for node in live_nodes(labels or {})], workers)


def widest(nodes: Sequence[int], workers: int) -> int:
    """The largest share of which `workers` fit on nodes with so many CPUs; 1 where even that does not fit yet."""
    shares = range(max(nodes, default=1), 1, -1)
    return next((share for share in shares if sum(cores // share for cores in nodes) >= workers), 1)


def encode_workers(config: RunConfig) -> int:
    """Number of encoder actors that `resources` asks for."""
    return _workers(config, config.resources.placement.encode)


def _workers(config: RunConfig, labels: Mapping[str, str]) -> int:
    resources = config.resources
    if resources.workers != "auto":
        return resources.workers
    if resources.gpus_per_worker:
        return max(1, int((total_resource("GPU", labels) or 1) / resources.gpus_per_worker))
    return cpus(labels)


def train_workers(config: RunConfig) -> int:
    """Number of training workers that `resources` asks for; without GPUs `auto` is one, which takes every core."""
    if config.resources.workers == "auto" and not config.resources.gpus_per_worker:
        return 1
    return _workers(config, config.resources.placement.train)


def worker_range(config: RunConfig) -> tuple[int, int]:
    """The fewest training workers that `resources` allows and the number that it asks for; the same by default."""
    most, fewest = train_workers(config), config.resources.min_workers
    return (most, most) if fewest is None else (fewest, max(fewest, most))


def run_remotely(function: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0) -> Any:
    """The result of one call in a Ray worker: whatever takes memory with N does not run in the driver."""
    import ray

    connect()

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=5, **label_selector("tasks", task_labels()))
    def call() -> tuple[Any, float]:  # bound methods cannot be remote themselves
        started = time.monotonic()
        return function(*arguments), time.monotonic() - started

    name = getattr(function, "__name__", "work").strip("_").replace("_", " ")
    with plain_errors(), progress.timed_section(name, 1) as measured:
        result, measured.busy["working"] = ray.get(call.remote())
        return result


def on_every_node(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function once on each node of the cluster; a node that is gone by then is passed over."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        function(*arguments)
        return
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    calls = [remote.options(scheduling_strategy=place).remote(*arguments) for place in places]
    ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_SECONDS)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Lets the error that a remote worker raised on purpose through, without Ray's wrapping."""
    try:
        yield
    except Exception as error:
        inner = _raised_on_purpose(error)
        if inner is None or inner is error:
            raise
        raise inner from error


def _raised_on_purpose(error: BaseException | None) -> RayclustError | None:
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RayclustError):
            # Ray's wrapper is a subclass of the cause's class as well: the cause itself has the clean message.
            cause = getattr(current, "cause", None)
            return cause if isinstance(cause, RayclustError) else current
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None
