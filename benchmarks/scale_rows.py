"""Rows by the million through the real stages on one machine: the driver's memory must not grow with them.

Claim: the driver's peak memory at 10 M rows is at most 1.2 times that at 1 M.

    python benchmarks/scale_rows.py [--rows 1000000 10000000] [--stages encode neighbors train assign] [--folder PATH]

Rows are 64 float16 numbers around 1,000 planted centres, in Parquet files of 131,072 rows, made by another process.
Each size runs in a process of its own, which is the driver of all its stages; workers are Ray's, on the cores of this
machine. A stage's peak is the kernel's own (VmHWM, set back before each stage), of the driver alone; beside it stands
the largest of a worker, of those still there when the stage ends. Both count what they use of Ray's shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from rayclust import config
from rayclust.runtime import pipeline
from rayclust.runtime.cluster import connect
from rayclust.store import manifest
from rayclust.store.run import Run

WIDTH = 64
FILE_ROWS = 131_072
GROUP_ROWS = 16_384
STAGES = ("encode", "neighbors", "train", "assign")


def make(folder: Path, rows: int, centers: int = 1000) -> None:
    """Writes planted embeddings, file by file, each from its own seed."""
    folder.mkdir(parents=True, exist_ok=True)
    planted = np.random.default_rng(0).normal(size=(centers, WIDTH)).astype(np.float32)
    for start in range(0, rows, FILE_ROWS):
        random, count = np.random.default_rng(start + 1), min(FILE_ROWS, rows - start)
        noise = random.standard_normal((count, WIDTH), np.float32)
        values = (planted[random.integers(centers, size=count)] + 0.5 * noise).astype(np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), WIDTH)
        path = folder / f"part-{start // FILE_ROWS:05d}.parquet"
        pq.write_table(pa.table({"embedding": column}), path, row_group_size=GROUP_ROWS, compression="none")


def settings(arguments: argparse.Namespace, folder: Path) -> config.RunConfig:
    """The run's config."""
    method = {"name": "kmeans", "clusters": arguments.clusters, "restarts": 1, "max_iterations": arguments.passes}
    return config.validate(
        {
            "run": str(folder / "run"),
            "images": {"uri": str(folder / "input"), "format": "embeddings", "labels": "none"},
            "neighbors": {"k": arguments.neighbors, "method": "ivf", "min_recall": arguments.min_recall},
            "method": method,
            "tracking": {"to": []},
        }
    )


def memory(name: str) -> float:
    """A line of this process's status, such as VmHWM or VmRSS, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def peak_of(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that a call takes, and the most memory that this process has during it, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, memory("VmHWM")


def workers_peak() -> float:
    """The most memory that one of this process's Ray workers has had, in MB, of those still there; 0 without any."""
    found: dict[int, tuple[int, str, int]] = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            own = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            found[int(path.parent.name)] = int(own["PPid"]), own["Name"].strip(), int(own["VmHWM"].split()[0])
        except (OSError, KeyError):
            continue

    def is_below(process: int) -> bool:
        while process in found and process != os.getpid():
            process = found[process][0]
        return process == os.getpid()

    peaks = [peak for process, (_, name, peak) in found.items() if name.startswith("ray::") and is_below(process)]
    return max(peaks, default=0) * 1024 / 1e6


def drive(arguments: argparse.Namespace) -> None:
    """One size in this process: a JSON line per stage, the first of them for the driver before any."""
    folder, rows = arguments.folder, arguments.rows[0]
    run = settings(arguments, folder)
    connect()
    up = {"stage": "(ray up, nothing read)", "rows": rows, "seconds": 0.0, "mb": memory("VmRSS"), "worker": 0.0}
    print(json.dumps(up), flush=True)
    for stage in [name for name in STAGES if name in arguments.stages]:
        seconds, mb = peak_of(lambda name=stage: pipeline.run_stage(name, run))  # type: ignore[misc]
        line = {"stage": stage, "rows": rows, "seconds": seconds, "mb": mb, "worker": workers_peak()}
        print(json.dumps(line | ({"said": searched(run)} if stage == "neighbors" else {})), flush=True)
    seconds, mb = peak_of(lambda: pipeline.run_stage("encode", run))
    line = {"stage": "encode, nothing to do", "rows": rows, "seconds": seconds, "mb": mb, "worker": 0.0}
    print(json.dumps(line), flush=True)
    ray.shutdown()


def searched(run: config.RunConfig) -> str:
    """What the neighbors stage says of itself, in a line."""
    sealed = manifest.read_manifest(Run(run.run), "neighbors")
    if sealed is None:
        raise SystemExit("neighbors is not sealed")
    said = sealed.extra
    phases = ", ".join(f"{section.name} {section.seconds:.1f} s" for section in sealed.measured)
    opened = f"recall {said['recall']:.4f}, {said['nprobe']} of {said['nlist']:,} lists opened"
    return f"{opened}, {said['halo']:.2f} rows read from other shards for each; {phases}"


def table(found: list[dict[str, float | str]]) -> None:
    """One row per stage and size."""
    peaks: dict[str, list[float]] = {}
    for line in found:
        peaks.setdefault(str(line["stage"]), []).append(float(line["mb"]))
    for line in found:
        if "said" in line:
            print(f"\nneighbors of {line['rows']:,} rows: {line['said']}")
    print("\n| stage | driver's peak at each size, MB | ratio to the first |")
    print("|---|---|---|")
    for stage, own in peaks.items():
        ratios = ", ".join(f"{mb / own[0]:.3f}" for mb in own[1:])
        print(f"| {stage} | {', '.join(f'{mb:.0f}' for mb in own)} | {ratios} |")


def measure(arguments: argparse.Namespace, rows: int) -> list[dict[str, float | str]]:
    """One size in a process of its own; a row of the table as each stage ends."""
    folder = Path(tempfile.mkdtemp(prefix="scale-rows-", dir=arguments.folder))
    command = [sys.executable, __file__, "--folder", str(folder), "--rows", str(rows), "--stages", *arguments.stages]
    command += ["--clusters", str(arguments.clusters), "--passes", str(arguments.passes)]
    command += ["--neighbors", str(arguments.neighbors), "--min-recall", str(arguments.min_recall)]
    found = []
    environment = os.environ | {"RAYCLUST_SCRATCH": str(folder / "cache")}
    try:
        subprocess.run([*command, "--make"], check=True)
        with subprocess.Popen([*command, "--drive"], stdout=subprocess.PIPE, text=True, env=environment) as driver:
            for text in driver.stdout or ():
                line = json.loads(text)
                found.append(line)
                speed = f"{rows / line['seconds']:,.0f}" if line["seconds"] else ""
                worker = f"{line['worker']:.0f}" if line["worker"] else ""
                cells = (line["stage"], f"{rows:,}", f"{line['seconds']:.1f}", speed, f"{line['mb']:.0f}", worker)
                print(f"| {' | '.join(cells)} |", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def main() -> None:
    """Prints the machine, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the scratch folder goes"
    )
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--passes", type=int, default=3, help="most passes of k-means")
    parser.add_argument("--neighbors", type=int, default=10)
    parser.add_argument("--min-recall", type=float, default=0.9)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        return make(arguments.folder / "input", arguments.rows[0])
    if arguments.drive:
        return drive(arguments)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"Ray {ray.__version__}"
    )
    print(
        f"python benchmarks/scale_rows.py --rows {' '.join(map(str, arguments.rows))} "
        f"--stages {' '.join(arguments.stages)} --passes {arguments.passes}"
    )
    print(
        f"N × {WIDTH} float16; k-means with K = {arguments.clusters}, at most {arguments.passes} passes; "
        f"{arguments.neighbors} neighbours, recall {arguments.min_recall:g}\n"
    )
    print("| stage | rows | seconds | rows/s | driver's peak memory, MB | a worker's, MB |")
    print("|---|---|---|---|---|---|")
    table([line for rows in arguments.rows for line in measure(arguments, rows)])
    return None


if __name__ == "__main__":
    main()
