"""Placement by node label: what the nodes of a cluster offer, and which labels the tasks of a stage carry."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from rayclust.errors import ConfigError
from rayclust.placement import PlacementConfig, carries, shown

logger = logging.getLogger(__name__)

OWN = "rayclust-own"
"""Namespace of a cluster that this process has started on its machine: no node will ever join it."""
_tasks: ContextVar[dict[str, str]] = ContextVar("tasks", default={})  # noqa: B039 - never changed in place


@contextmanager
def placed(placement: PlacementConfig) -> Iterator[None]:
    """Within it, tasks that are sent off through `cluster` and `units` carry the labels of `placement.tasks`."""
    token = _tasks.set(placement.tasks)
    try:
        yield
    finally:
        _tasks.reset(token)


def task_labels() -> dict[str, str]:
    """The labels of tasks here and now; {} outside `placed`."""
    return _tasks.get()


def selector(key: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Options of a Ray task or actor that goes to nodes with these labels.

    Args:
        key: what wants it, below `resources.placement`.
        labels: that a node must carry.

    Returns:
        {} where any node will do, so that Ray is asked what it was asked without labels.

    Raises:
        ConfigError: as `require`.
    """
    require(key, labels)
    return {"label_selector": dict(labels)} if labels else {}


def nodes(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """Resources of the live nodes that carry these labels."""
    import ray

    return [n["Resources"] for n in ray.nodes() if n["Alive"] and carries(n["Labels"], labels)]


def total(resource: str, labels: Mapping[str, str]) -> float:
    """How much of a resource the live nodes with these labels have together."""
    return float(sum(node.get(resource, 0) for node in nodes(labels)))


def require(key: str, labels: Mapping[str, str]) -> None:
    """Says it where no live node carries the labels: work for such a node waits, in silence, until one comes.

    Ray does not tell a driver whether an autoscaler could bring one, or of which labels. Only of a cluster that this
    process has started is it known that none will.

    Raises:
        ConfigError: none does, and the cluster is our own.
    """
    import ray

    if not labels or nodes(labels):
        return
    there = sorted({_own_labels(node["Labels"]) for node in ray.nodes() if node["Alive"]})
    text = f"resources.placement.{key} = {shown(labels)}: no node of the cluster carries it; the nodes carry "
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
    return shown({key: value for key, value in labels.items() if not key.startswith("ray.io/")}) or "no labels"


def plan(placement: PlacementConfig) -> str:
    """Where each kind of work goes, in a line."""
    kinds = {name: getattr(placement, name) for name in PlacementConfig.model_fields}
    where = [f"{name} on {shown(labels) if labels else 'any node'}" for name, labels in kinds.items()]
    placed_work = ", ".join(where) if any(kinds.values()) else "all work on any node"
    return (
        f"{placed_work}; the driver, with Tune's and Train's controllers, on the head of a cluster it is submitted to"
    )
