"""A cluster of several processes on this machine, with a token and labels, as the others have them; Ctrl-C ends it.

    python cluster_configs/local.py --cpu-workers 2 --cpus 4
    rayclust submit jobs/smoke.yaml run=runs/smoke      with the variables that it prints

Only processes that it started are ended, and what others start on this machine does not find it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

START_SECONDS = 60.0
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
"""`ray`, whatever the PATH holds."""


def head_command(port: int, folder: Path) -> list[str]:
    """The head: no CPUs, so that only drivers run there, and a dashboard that only this machine reaches."""
    dashboard = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    return ["--head", "--port=0", "--num-cpus=0", "--num-gpus=0", f"--temp-dir={folder}", *dashboard, *_labels("head")]


def worker_command(address: str, pool: str, cpus: int, gpus: int) -> list[str]:
    """A worker of a pool."""
    return [f"--address={address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", *_labels(pool)]


def _labels(pool: str) -> list[str]:
    return [f"--labels=pool={pool},market=on-demand"]


def start(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a node that lives as long as its process; its ports are whatever is free."""
    ports = ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    line = [*RAY, "start", "--block", "--disable-usage-stats", *ports, *arguments]
    return subprocess.Popen(  # noqa: S603
        line, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )


def address_of(folder: Path, head: subprocess.Popen[bytes]) -> str:
    """Where the head listens, which Ray leaves below its folder."""
    place, deadline = folder / "ray_current_cluster", time.monotonic() + START_SECONDS
    while not place.exists() or not place.read_text().strip():
        if head.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the head did not start: see {folder}/session_latest/logs")
        time.sleep(0.1)
    return place.read_text().strip()


def end(nodes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the nodes, the head last."""
    for node in reversed(nodes):
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)  # the group of this node, which is ours
            node.wait()


def _parse(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8265, help="of the dashboard, on loopback")
    parser.add_argument("--cpu-workers", type=int, default=1, help="nodes that decode, and compute where no GPU is")
    parser.add_argument("--gpu-workers", type=int, default=0, help="nodes with one GPU each")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="of each worker")
    parser.add_argument("--folder", type=Path, default=None, help="for Ray's sockets and logs; a short path")
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> None:
    """Starts the cluster, says how to reach it, and ends it with a signal or when its standard input ends."""
    asked = _parse(line)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="rc-"))
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # a job's `python` is this one
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": path}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # else a node waits for work that ends with it anyway
    nodes: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        nodes.append(start(head_command(asked.port, folder), environment))
        address = address_of(folder, nodes[0])
        pools = [("cpu", 0)] * asked.cpu_workers + [("gpu", 1)] * asked.gpu_workers
        nodes += [start(worker_command(address, pool, asked.cpus, gpus), environment) for pool, gpus in pools]
        sys.stdout.write(
            f"export RAY_API_SERVER_ADDRESS=http://127.0.0.1:{asked.port} RAY_AUTH_MODE=token RAY_AUTH_TOKEN={token}\n"
        )
        sys.stdout.flush()
        sys.stdin.read() if not sys.stdin.isatty() else signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        end(nodes)


if __name__ == "__main__":
    main()
