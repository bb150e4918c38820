"""Efficiency of the stages that work in parts: one Ray worker beside two.

    python benchmarks/worker_efficiency.py [--rows 20000 320000] [--stages neighbors] [--report FILE]

Claim: none. Rows are those of scale_rows.py, 64 float16 numbers around planted centres; Ray is told of one CPU, then of
two, and train gets as many workers. Costs are the difference between a large and a small input, so that the start of
workers is left out. Efficiency by seconds is t1 / (2 t2), by CPU seconds c1 / c2, of the driver and all that it starts;
the latter says what the work costs more in two processes, whatever else runs on the machine. Photographs are in
encode_cpu.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil
import ray
from fixed_costs import described
from scale_rows import make

from rayclust.config import validate
from rayclust.runtime.cluster import OWN
from rayclust.runtime.pipeline import run_stage

STAGES = ("encode", "neighbors", "train", "assign")
WORKERS = (1, 2)


class Clock:
    """CPU seconds of this process and of all that it has started, looked at several times a second.

    Ray's workers are nobody's to wait for when they end: what was seen of them last counts.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.seconds()
            time.sleep(0.2)

    def seconds(self) -> float:
        """So far."""
        with self._lock:
            own = psutil.Process()
            for process in [own, *own.children(recursive=True)]:
                try:
                    used = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = used.user + used.system
                except psutil.Error:
                    continue
            return sum(self._seen.values())


def costs(clock: Clock, folder: Path, workers: int, rows: int, stages: list[str]) -> dict[str, tuple[float, float]]:
    """Seconds and CPU seconds of each stage in a run of its own."""
    config = validate(
        {
            "run": str(folder / f"run-{workers}-{rows}"),
            "images": {"uri": str(folder / str(rows)), "format": "embeddings", "labels": "none"},
            "neighbors": {"k": 10, "method": "ivf", "min_recall": 0.9},
            "method": {"name": "kmeans", "clusters": 500, "restarts": 1, "max_iterations": 10},
            "resources": {"workers": workers, "in_driver": "never"},
            "tracking": {"to": []},
        }
    )
    found = {}
    for stage in stages:
        started, cpu = time.monotonic(), clock.seconds()
        run_stage(stage, config)
        found[stage] = time.monotonic() - started, clock.seconds() - cpu
    return found


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[20_000, 320_000])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    clock = Clock()
    slopes: dict[int, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, (small, large) = Path(scratch), arguments.rows
        for rows in (small, large):
            make(folder / str(rows), rows)
        for workers in WORKERS:
            ray.init("local", num_cpus=workers, namespace=OWN, include_dashboard=False, log_to_driver=False)
            least, most = (costs(clock, folder, workers, rows, arguments.stages) for rows in (small, large))
            slopes[workers] = {
                stage: (most[stage][0] - least[stage][0], most[stage][1] - least[stage][1])
                for stage in arguments.stages
            }
            ray.shutdown()
    lines = [
        described(),
        f"python benchmarks/worker_efficiency.py --rows {small} {large} --stages {' '.join(arguments.stages)}",
        f"{large - small:,} rows of width 64, k-means with K = 500 and 10 passes, 10 neighbours by ivf",
        "",
        f"{'':<12}{'1 worker':>20}{'2 workers':>20}{'efficiency':>20}",
        f"{'':<12}" + 3 * f"{'seconds':>10}{'CPU s':>10}",
    ]
    for stage in arguments.stages:
        (t1, c1), (t2, c2) = slopes[1][stage], slopes[2][stage]
        lines.append(f"{stage:<12}{t1:>10.1f}{c1:>10.1f}{t2:>10.1f}{c2:>10.1f}{t1 / (2 * t2):>10.2f}{c1 / c2:>10.2f}")
    text = "\n".join([*lines, "", f"load {os.getloadavg()[0]:.1f} at the end"]) + "\n"
    print(text)
    if arguments.report:
        arguments.report.write_text(text)


if __name__ == "__main__":
    main()
