"""A cluster of two nodes on this machine whose processes can be killed, and drivers on it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.trial import LAST
from tests.stages.runs import descendants, kill

DRIVER = (
    "import logging, sys; from rayclust.config import parse; from rayclust.runtime.pipeline import run_all; "
    "logging.basicConfig(); logging.getLogger('rayclust').setLevel('INFO'); "
    "run_all(parse(open(sys.argv[1]).read()), stop_after=sys.argv[2])"
)
"""The first stages of `rayclust run`."""


HEALTH_CHECKS = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500}
"""That a node is lost is noticed after some of these, by default one in 3 s."""


class Nodes:
    """A cluster of a head and one node, whose processes can be killed; of either pool one."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 100 << 20}  # as little as Ray allows
        head = small | {"labels": {"pool": "cpu"}, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
        self._settings: dict[str, Any] = small | {"labels": {"pool": "gpu"}}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(**self._settings)

    @contextmanager
    def driver(self, meanwhile: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """This process is a driver of the cluster, which spares the imports of another; `meanwhile` runs beside it."""
        import ray

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as beside:
            patch.setenv("RAY_ADDRESS", self.cluster.address)
            done = beside.submit(meanwhile)
            try:
                yield
                done.result()
            finally:
                ray.shutdown()

    def lose(self) -> None:
        """The second node dies without a word."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def regain(self) -> None:
        """Another second node comes."""
        self.second = self.cluster.add_node(**self._settings)

    def kill_raylet(self) -> str:
        """The second node is lost and another one comes."""
        self.lose()
        self.regain()
        return "raylet"

    def processes(self) -> dict[int, str]:
        """Ids and titles of what the nodes run."""
        below = {}
        for node in self.cluster.list_all_nodes():
            below |= descendants(node.all_processes["raylet"][0].process.pid)
        return below

    def kill_worker(self, draw: random.Random) -> str:
        """A process that works for the run dies."""
        below = self.processes()
        busy = sorted(pid for pid, title in below.items() if title.startswith("ray::") and "IDLE" not in title)
        if not busy:
            return "no worker"
        victim = draw.choice(busy)
        kill(victim)
        return below[victim].split()[0]


def start(nodes: Nodes, config: Path, last: str = LAST) -> subprocess.Popen[str]:
    """Starts a driver, which can be killed."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(config), last],
        env={**os.environ, "RAY_ADDRESS": nodes.cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
