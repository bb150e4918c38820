"""Where work runs: small work in the driver's own process, other work on the nodes of a Ray cluster.

A run uses the cluster it is submitted to, or one of its own on this machine. Which work is small follows from the
config and from counts alone: starting Ray and its workers would take longer. It gets as many threads as a Ray worker
has, so that the results are the same, to the bit, wherever it runs. torch is imported where it is asked: not by a run
with nothing to do, nor by work that needs none.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from rayclust.config import PlacementConfig, RunConfig
from rayclust.errors import ConfigError, RayclustError
from rayclust.runtime.progress import context_value, timed_section

logger = logging.getLogger(__name__)

OWN = "rayclust-own"
"""Namespace of a cluster that this process has started on its machine: no node will ever join it."""
SMALL = 2**37
"""Products N²·D in the comparison of all rows with each other, up to which a run is small: seconds of one core."""
_GPU_DEVICES = ("nvidia*", "nvhost*", "kfd", "dxg")
"""Files in /dev that are there with a GPU: of NVIDIA, of its boards, of AMD, of Windows below Linux."""
_in_driver: ContextVar[bool] = ContextVar("in_driver", default=False)
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Description of a cluster that `ray up` has started, on its head."""
_IDLE_GPU = "a GPU of this machine lies idle: torch {} sees no CUDA device; install a CUDA build"
CONNECT_SECONDS = 10.0
"""How long a server may take to accept a connection."""
TaskKind = Literal["tasks", "train"]
"""Key of `resources.placement` that says on which nodes a task runs."""
task_labels: ContextVar[dict[str, dict[str, str]]] = ContextVar("task_labels", default={})  # noqa: B039 - stays as it is
"""Labels of the tasks that are submitted here, by kind; {} outside of a stage."""


def connect() -> None:
    """Join the cluster named by RAY_ADDRESS (a job has it set), else start one on this machine; once a process.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    # A laptop's cluster serves this process only: no dashboard, nothing left behind.
    target: dict[str, Any] = {"address": "local", "namespace": OWN, "include_dashboard": False}
    if address:
        # 1. Refuse an address where nobody answers; words such as `auto` pass.
        place = urlsplit("//" + address.rpartition("://")[2])
        try:
            host, port = place.hostname, place.port
        except ValueError:
            raise ConfigError(
                f"RAY_ADDRESS = {address}: is no address; write HOST:PORT, ray://HOST:PORT or auto"
            ) from None
        if host is not None and port is not None and (refusal := unreachable(host, port)) is not None:
            raise ConfigError(
                f"RAY_ADDRESS = {address}: no Ray cluster answers there ({refusal}); unset it to work on this machine"
            )
        target = {"address": address}
    # 2. Join.
    try:
        with _without_core_messages():
            ray.init(**target, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(f"RAY_ADDRESS = {address}: no Ray cluster answers there ({error})") from None
    # 3. Say what is there: the GPUs such as "2 × NVIDIA H100".
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = sum(node.get("CPU", 0) for node in nodes), Counter[str]()
    for node in nodes:
        kinds = [key.partition(":")[2] for key in node if key.startswith("accelerator_type:")]
        kind = kinds[0] if kinds else "GPU"
        maker = "" if kind.startswith(("AMD", "Intel", "GPU")) else "NVIDIA "  # Ray names these alone by their maker
        gpus[maker + kind] += int(node.get("GPU", 0))
    described = ", ".join(f"{count} × {kind}" for kind, count in gpus.items() if count) or "CPU only"
    logger.info("ray: %d node(s), %g CPUs, %s", len(nodes), cores, described)


def unreachable(host: str, port: int) -> OSError | None:
    """Return why a connection to an address fails, None if it is accepted; Ray's clients would retry for minutes."""
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        return error
    return None


@contextmanager
def _without_core_messages() -> Iterator[None]:
    """Silence Ray's C++ core while it starts, whose lines about its actors help no user. -v shows them."""
    if logger.isEnabledFor(logging.DEBUG) or "RAY_BACKEND_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # at this level the core still announces the level itself
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
        del os.environ["RAY_BACKEND_LOG_LEVEL"]


def task_options(gpus: float, kind: TaskKind = "tasks") -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return where Ray places a task, as options, and the labels: those of `train` are on the nodes with GPUs."""
    kind = "train" if gpus else kind
    labels = task_labels.get().get(kind, {})
    return label_selector(kind, labels), labels


def label_selector(key: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return options of a Ray task or actor that runs on nodes with these labels only; see `require_label`."""
    require_label(key, labels)
    return {"label_selector": dict(labels)} if labels else {}


def require_label(key: str, labels: Mapping[str, str]) -> None:
    """Warn if no live node carries the labels of a kind of work, `key`: it waits, silently, until one joins.

    A driver cannot find out from Ray whether an autoscaler could add one. Only in a cluster that this process has
    started will none join: there a `ConfigError` is raised.
    """
    import ray

    if not labels or live_nodes(labels):
        return
    shown = set[str]()
    for node in ray.nodes():
        if node["Alive"]:
            given = {name: value for name, value in node["Labels"].items() if not name.startswith("ray.io/")}
            shown.add(format_labels(given) or "no labels")
    text = f"resources.placement.{key} = {format_labels(labels)}: no node of the cluster carries it; the nodes carry "
    text += "; ".join(sorted(shown))
    if is_own():
        raise ConfigError(
            f"{text}. A cluster on this machine has no labels: leave the placement out, or set RAY_ADDRESS"
        )
    _warn_once(f"{text}. The work waits until such a node joins; where none is to come, stop and mend the label")


def format_labels(labels: Mapping[str, str]) -> str:
    """Return labels in the form market=spot,pool=cpu."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


@lru_cache(64)
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def describe_placement(placement: PlacementConfig) -> str:
    """Return where each kind of work runs, in one line."""
    kinds = {name: getattr(placement, name) for name in PlacementConfig.model_fields}
    if not any(kinds.values()):
        return "all work on any node"
    where = [f"{name} on {format_labels(labels) if labels else 'any node'}" for name, labels in kinds.items()]
    driver = "the driver, with Tune's and Train's controllers, on the head of a cluster it is submitted to"
    return f"{', '.join(where)}; {driver}"


def live_nodes(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """Return the resources of each live node that carries these labels."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [node["Resources"] for node in nodes if all(node["Labels"].get(k) == v for k, v in labels.items())]


def cpus(labels: Mapping[str, str]) -> int:
    """Return the number of CPUs of the live nodes with these labels; at least 1."""
    return max(1, int(sum(node.get("CPU", 0) for node in live_nodes(labels))))


def with_gpus(config: RunConfig, kind: Literal["encode", "train", "trials"]) -> RunConfig:
    """Return the config with `resources.gpus_per_worker: auto` as a number for one kind of work; connects to find it.

    1 where the nodes for that work have GPUs or the cluster's autoscaler can add such nodes, else 0.
    """
    resources, labels = config.resources, getattr(config.resources.placement, kind)
    if resources.gpus_per_worker != "auto":
        return config
    if may_use_driver(config):  # no cluster is looked for, and torch sees no GPU here
        if has_idle_gpu():
            _warn_once(_IDLE_GPU.format(version("torch")))
        return config.model_copy(update={"resources": resources.model_copy(update={"gpus_per_worker": 0.0})})
    connect()
    nodes = live_nodes(labels)
    has_gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    if has_gpus and is_own() and not sees_gpu():
        _warn_once(_IDLE_GPU.format(version("torch")))
        has_gpus = False
    if not has_gpus and (not nodes or not labels):
        # Whether the cluster's autoscaler knows of nodes with GPUs, as far as it can be asked.
        from ray._private.state import state

        found: Any = {}
        with suppress(Exception):  # of a cluster of another version
            found = state.get_max_resources_from_cluster_config() or {}
        has_gpus = bool(found.get("GPU"))
        # Else the file that `ray up` leaves on the head, where a job's driver runs.
        with suppress(OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            tree = yaml.safe_load(Path(BOOTSTRAP).expanduser().read_text())
            kinds = tree["available_node_types"].values()
            has_gpus |= any((kind.get("resources") or {}).get("GPU") and kind.get("max_workers", 1) for kind in kinds)
    return config.model_copy(update={"resources": resources.model_copy(update={"gpus_per_worker": float(has_gpus)})})


def is_own() -> bool:
    """Return whether the cluster is one that this process has started on its machine."""
    import ray

    return bool(ray.get_runtime_context().namespace == OWN)


def worker_count(config: RunConfig, work: Literal["encode", "train"]) -> int:
    """Return the number of encoder actors or training workers that `resources` asks for.

    Without GPUs `auto` is an actor on every CPU, and one training worker with every core.
    """
    resources = config.resources
    labels: dict[str, str] = getattr(resources.placement, work)
    if resources.workers != "auto":
        return resources.workers
    if resources.gpus:
        gpus = sum(node.get("GPU", 0) for node in live_nodes(labels)) or 1
        return max(1, int(gpus / resources.gpus))
    return 1 if work == "train" else cpus(labels)


def training_workers(config: RunConfig) -> tuple[int, int, int]:
    """Return the smallest allowed and the wanted number of training workers, and the CPUs of each.

    The numbers are equal unless `min_workers` is set. With a GPU a worker has one CPU, else the most, at least 1, that
    each of the wanted ones can have on one node.
    """
    most, fewest = worker_count(config, "train"), config.resources.min_workers
    fewest, most = (most, most) if fewest is None else (fewest, max(fewest, most))
    if config.resources.gpus:
        return fewest, most, 1
    nodes = [int(node.get("CPU", 0)) for node in live_nodes(config.resources.placement.train)]
    shares = range(max(nodes, default=1), 1, -1)
    return fewest, most, next((share for share in shares if sum(cores // share for cores in nodes) >= most), 1)


def run_remotely(
    function: Callable[..., Any],
    *arguments: Any,
    cpus: int = 1,
    gpus: float = 0,
    kind: TaskKind = "tasks",
    retries: int = 5,
) -> Any:
    """Return the result of one call in a Ray worker: nothing that grows with N runs in the driver; small work does.

    The function may run twice, and must give the same result then.

    Args:
        function: its name is that of the timing and of Ray's task.
        arguments: of the call.
        cpus: of the worker, and threads of the call.
        gpus: of the worker, which sees no others.
        kind: on which nodes the worker may be.
        retries: times a lost worker is replaced.
    """

    def call() -> tuple[Any, float]:  # bound methods cannot be remote themselves
        started = time.monotonic()
        with threads(cpus):  # a worker that has done other tasks keeps the threads of its first
            result = function(*arguments)
        if gpus:
            free_cached_memory()
        return result, time.monotonic() - started

    name = getattr(function, "__name__", "work").strip("_").replace("_", " ")
    with plain_errors(), timed_section(name, 1) as timing:
        if in_driver():
            result, timing.busy["working"] = call()
            return result
        import ray

        connect()
        # max_calls: by default Ray ends a process after one task with a GPU.
        options = {"max_retries": retries, "max_calls": 0, **task_options(gpus, kind)[0]}
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, **options)(call)
        under_way = remote.options(name=name).remote()
        try:
            result, timing.busy["working"] = ray.get(under_way)
        except KeyboardInterrupt:
            ray.cancel(under_way)  # the process may go on, as a notebook does
            raise
        return result


def free_cached_memory() -> None:
    """Give back the GPU memory that torch keeps: a worker waits for more tasks, and others may need the memory."""
    import torch

    torch.cuda.empty_cache()


def on_every_node(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function once on each node of the cluster; a node that is gone by then is skipped."""
    ray = sys.modules.get("ray")
    if in_driver() or ray is None or not ray.is_initialized():
        function(*arguments)
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    calls = [remote.options(scheduling_strategy=strategy).remote(*arguments) for strategy in strategies]
    ray.wait(calls, num_returns=len(calls), timeout=CONNECT_SECONDS)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Re-raise the `RayclustError` of a remote worker without Ray's wrapping; other errors pass as they are."""
    try:
        yield
    except Exception as error:
        # Look for it among the causes, the contexts and the failures of training workers.
        seen, queue = set[int](), list[BaseException | None]([error])
        while queue:
            current = queue.pop()
            if current is None or id(current) in seen:
                continue
            seen.add(id(current))
            cause = getattr(current, "cause", None)
            if isinstance(current, RayclustError):
                # Ray's wrapper is a subclass of the cause's class as well: the cause itself has the clean message.
                inner = cause if isinstance(cause, RayclustError) else current
                if inner is error:
                    raise
                raise inner from error
            queue += [cause, current.__cause__, current.__context__]
            queue += list(getattr(current, "worker_failures", {}).values())
        raise


def may_use_driver(config: RunConfig) -> bool:
    """Return whether small work of a run may stay in the driver: no cluster, GPU, label or further worker is asked for.

    What `resources.in_driver: never` forbids, and a program that has connected Ray itself, goes to workers.
    """
    resources, ray = config.resources, sys.modules.get("ray")
    if resources.in_driver == "never" or os.environ.get("RAY_ADDRESS") or resources.workers not in ("auto", 1):
        return False
    if resources.min_workers is not None or any(resources.placement.model_dump().values()):
        return False
    if ray is not None and ray.is_initialized() and ray.get_runtime_context().namespace != OWN:
        return False
    return not (sees_gpu() if resources.gpus_per_worker == "auto" else resources.gpus)


def is_small(rows: int, dimension: int) -> bool:
    """Return whether all stages on N rows of width D are small work."""
    return rows * rows * dimension <= SMALL


def has_idle_gpu() -> bool:
    """Return whether this machine has a GPU that torch does not see."""
    return any(Path("/dev").glob("nvidia[0-9]*")) and not sees_gpu()


def sees_gpu() -> bool:
    """Return whether torch sees a GPU in this process; it is not loaded to say so where the machine has none."""
    if "torch" not in sys.modules and not any(next(Path("/dev").glob(kind), None) for kind in _GPU_DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


@contextmanager
def use_driver(is_used: bool) -> Iterator[None]:
    """Say for the block whether what it would send to workers is done in this process."""
    with context_value(_in_driver, is_used):
        yield


def in_driver() -> bool:
    """Return whether the stage under way works in this process."""
    return _in_driver.get()


def cores() -> int:
    """Return the number of cores that this process may use, at least 1; the quota of a container counts."""
    import joblib

    return int(joblib.cpu_count())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute in the block with the threads that Ray gives a worker of so many CPUs; the process's own come back."""
    from threadpoolctl import threadpool_limits

    given, torch = os.environ.get("OMP_NUM_THREADS"), sys.modules.get("torch")
    own = int(given) if given and given.isdecimal() else None
    before, wanted = torch.get_num_threads() if torch else own or cores(), own or count
    # The variable is for libraries that are first loaded in the block, which may be torch.
    os.environ["OMP_NUM_THREADS"] = str(wanted)
    try:
        with threadpool_limits(wanted):
            if torch:
                torch.set_num_threads(wanted)
            yield
    finally:
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(before)
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
