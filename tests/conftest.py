"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real photographs and encoders, where they are at hand: tests skip without them."""


SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for each other leave the core to others
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # tests without Ray, beside these, would take the cores first
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the controller sees the end of a training as late as this
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each training that asks clouds what they plan
    "RAY_num_workers_soft_limit": "8",  # workers that have imported torch stay for the next task
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
"""Environment of this process and of all that tests start."""


def pytest_configure() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.fsync = lambda handle: None  # no test takes the power away, and the disk would take a tenth of the time


SESSION, CLUSTERS = "tests that share a local Ray", "tests of clusters and drivers of their own"
"""Two groups of tests with Ray. Either stays in one process; together they take longest, so that they come first."""
_WHOLE_FILE = re.compile(r"^pytestmark = .*pytest\.mark\.ray\b", re.MULTILINE)
_RAY_TEST = re.compile(r"^@pytest\.mark\.ray\n(?:@.*\n)*def (\w+)\([^)]*\)", re.MULTILINE)


@lru_cache
def _text(path: str) -> str:
    return (Path(__file__).resolve().parents[1] / path).read_text()


@lru_cache
def _group(test: str) -> str:
    """The group of a test with Ray, else its file; read from the file's text, since the scheduler has only names."""
    path, _, name = test.partition("[")[0].partition("::")
    text = _text(path)
    if not _WHOLE_FILE.search(text):
        text = next((found[0] for found in _RAY_TEST.finditer(text) if found[1] == name), "")
        if not text:
            return path
    return SESSION if "ray_session" in text else CLUSTERS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Send whole groups of tests to a process, those with Ray one after the other.

    Two Rays beside each other are slower than one after the other, and their tests wait for deadlines.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            running = any(False in work.get(CLUSTERS, {}).values() for work in self.assigned_work.values())
            if SESSION in self.workqueue and CLUSTERS not in self.workqueue:
                self.workqueue.move_to_end(SESSION, last=running)
            super()._assign_work_unit(node)

    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the groups with Ray first."""
    order = [CLUSTERS, SESSION]
    items.sort(key=lambda item: order.index(group) if (group := _group(item.nodeid)) in order else len(order))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the Ray of a group with its last test: idle, it would take a tenth of a core from all others."""
    group = _group(item.nodeid)
    if group in (CLUSTERS, SESSION) and (nextitem is None or _group(nextitem.nodeid) != group):
        while _stops:
            _stops.pop()()


_stops = list[Callable[[], Any]]()
"""What stops the Ray that fixtures have started."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real photographs and encoders is not beside this checkout")
    return SHARED_DATA


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 server on loopback, in its own process; the standard AWS variables point to it."""
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_REGION", "us-east-1")
    try:
        _wait_until_up(endpoint)
        yield endpoint
    finally:
        patch.undo()
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


def _wait_until_up(endpoint: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(endpoint, timeout=2):  # noqa: S310 - loopback
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="session")
def flaky_endpoint(s3_endpoint: str) -> Iterator[str]:
    """The same server behind a proxy that has accidents when `tests.chaos.proxy.control` tells it to."""
    port = _free_port()
    command = [sys.executable, "-m", "tests.chaos.proxy", str(port), s3_endpoint.rpartition(":")[2]]
    proxy = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1])
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/-/faults")
        yield f"http://127.0.0.1:{port}"
    finally:
        proxy.terminate()
        proxy.wait(timeout=10)


@pytest.fixture
def flaky(flaky_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The AWS variables point to the proxy, which behaves; the value is its endpoint, to set a plan of faults."""
    from tests.chaos.proxy import control

    control(flaky_endpoint, {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", flaky_endpoint)
    yield flaky_endpoint
    control(flaky_endpoint, {})


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """The URI of a fresh, empty bucket."""
    import botocore.session

    name = f"test-{uuid.uuid4().hex[:12]}"
    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_session(s3_endpoint: str) -> None:
    """One local Ray for all tests; its workers know the mock store."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    _stops.append(ray.shutdown)


@pytest.fixture(scope="session")
def nodes() -> Any:
    """A cluster of two `tests.chaos.nodes.Nodes`, which tests kill; drivers of their own work there."""
    from tests.chaos.nodes import Nodes

    found = Nodes()
    _stops.append(found.cluster.shutdown)
    return found


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One headless browser for all tests of pages; the value is the address of its protocol."""
    from tests.browser import CHROMIUM, WITHOUT, chromium

    if CHROMIUM is None:
        pytest.skip(WITHOUT)
    with chromium(tmp_path_factory.mktemp("chromium")) as endpoint:
        yield endpoint


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages work in this process instead of a cluster."""
    from tests.stages.in_process import without_ray

    without_ray(monkeypatch)


@pytest.fixture(scope="session")
def pictures_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `Sealed` run over pictures; read only."""
    from tests.sealed import sealed_pictures

    yield from sealed_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def vectors_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `Sealed` run over ready embeddings; read only."""
    from tests.sealed import sealed_vectors

    yield from sealed_vectors(tmp_path_factory.mktemp("vectors"))
