"""Fixed costs of commands on small sets: seconds and CPU seconds by stage, with Ray's workers and in the driver.

    python benchmarks/fixed_costs.py [--rounds 2] [--routes never auto] [--only k-means] [--report FILE]

Rows are planted: 3,000 of width 128 around 20 directions; images are 30 coloured patches, whose network has random
weights. Routes alternate, `resources.in_driver` never and auto. CPU seconds are of the command and of every process
that it starts, wherever these end up. The first line is the first that the command writes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROWS, WIDTH, CLUSTERS = 3_000, 128, 20
IMAGES = 30
CANDIDATES = (5, 8, 12, 16, 20, 25, 30, 40)
ROUTES = ("never", "auto")
RUNS = ("k-means", "select-k", "images")
PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Cost:
    """Of a command, or of one of its stages."""

    seconds: float
    cpu: float


@dataclass
class Measured:
    """One command."""

    total: Cost
    first_line: float
    first_rate: float
    """Seconds until the first line with images a second; 0 where there was none."""
    stages: dict[str, Cost] = field(default_factory=dict)


def tree_cpu() -> float:
    """CPU seconds of all descendants, also of those that have ended: a subreaper inherits orphans."""
    parents, used = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)], used[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15])) / TICKS
    found, last = {os.getpid()}, 0
    while len(found) > last:
        last = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(used[pid] for pid in found - {os.getpid()}) + reaped.ru_utime + reaped.ru_stime


def measure(*arguments: str) -> Measured:
    """Run a command of rayclust to its end."""
    before, started = tree_cpu(), time.monotonic()
    command = [sys.executable, "-m", "rayclust", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    found, first, rate, since = dict[str, Cost](), 0.0, 0.0, (started, before)
    for line in process.stderr or ():
        first = first or time.monotonic() - started
        if "images a second" in line or "images/s" in line:
            rate = rate or time.monotonic() - started
        for stage, separator, _ in [line.partition(": done in ")]:
            if separator:
                now = time.monotonic(), tree_cpu()
                found[stage.rpartition(" ")[2]] = Cost(now[0] - since[0], now[1] - since[1])
                since = now
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.monotonic() - started
    with suppress(ChildProcessError):
        while True:  # Ray's own processes end a moment after the driver
            os.waitpid(-1, 0)
    return Measured(Cost(seconds, tree_cpu() - before), first, rate, found)


def prepare(folder: Path) -> dict[str, Path]:
    """Write rows, images, a network and their configs; return each config by name."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    draw = np.random.default_rng(0)
    labels = draw.integers(0, CLUSTERS, ROWS)
    rows = draw.normal(size=(CLUSTERS, WIDTH))[labels] + 0.9 * draw.normal(size=(ROWS, WIDTH))
    (folder / "rows").mkdir()
    np.save(folder / "rows" / "rows.npy", rows.astype(np.float32))
    for number in range(IMAGES):
        colour = np.eye(3)[number % 3] * 160 + 40
        path = folder / "images" / str(number % 3) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy = np.clip(colour + draw.normal(0, 25, (160, 160, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path)
    torch.manual_seed(0)
    weights = folder / "net.safetensors"
    save_file(timm.create_model("mobilenetv2_050", pretrained=False, num_classes=0).state_dict(), weights)
    network = {"name": "timm/mobilenetv2_050", "pretrained": str(weights), "image_size": 160}
    rows_at, images_at = {"uri": str(folder / "rows")}, {"uri": str(folder / "images")}
    trees: dict[str, dict[str, Any]] = {
        "k-means": {"images": rows_at, "method": {"name": "kmeans", "clusters": CLUSTERS}},
        "select-k": {"images": rows_at, "method": {"name": "kmeans", "clusters": list(CANDIDATES)}},
        "images": {"images": images_at, "method": {"name": "kmeans", "clusters": 3}, "encoder": network},
    }
    configs = {}
    for name, tree in trees.items():
        configs[name] = folder / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump({"run": str(folder / name), "label": {"vocabulary": "none"}, **tree}))
    return configs


def one_round(folder: Path, configs: dict[str, Path], route: str, number: int) -> dict[str, Measured]:
    """Run every command on one route, in folders of its own."""
    found, image = {}, str(folder / "images" / "0" / "0.jpg")
    for name, config in configs.items():
        run = str(folder / f"{name}-{route}-{number}")
        found[f"run, {name}"] = measure("run", str(config), f"run={run}", f"resources.in_driver={route}")
        if name == "k-means":
            again = measure("run", str(config), f"run={run}", f"resources.in_driver={route}")
            found["the same line again"] = again
        if name == "images":
            found["search, one image"] = measure("search", run, "--image", image)
            out = str(folder / "table.parquet")
            found[f"predict, {IMAGES} images"] = measure("predict", run, str(folder / "images"), "--out", out)
    if route == "auto" and len(configs) == len(RUNS):
        found["demo"] = measure("demo", "--out", str(folder / f"demo-{number}"))
    return found


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--routes", nargs="+", default=list(ROUTES), choices=ROUTES)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    found: dict[str, dict[str, list[Measured]]] = defaultdict(lambda: {route: [] for route in ROUTES})
    with tempfile.TemporaryDirectory() as scratch:
        configs = {name: path for name, path in prepare(Path(scratch)).items() if name in arguments.only}
        for number in range(arguments.rounds):
            for route in arguments.routes:
                for name, measured in one_round(Path(scratch), configs, route, number).items():
                    found[name][route].append(measured)
    lines = [
        described(),
        f"python benchmarks/fixed_costs.py --rounds {arguments.rounds} --routes {' '.join(arguments.routes)}"
        f" --only {' '.join(arguments.only)}",
        f"{ROWS:,} planted rows of width {WIDTH}, K = {CLUSTERS}; {IMAGES} patches, MobileNetV2 of random weights",
        "",
        f"{'':<28}{'Ray workers':>24}{'driver':>24}",
        f"{'least of the rounds':<28}" + 2 * f"{'seconds':>12}{'CPU s':>12}",
    ]
    for name, routes in found.items():
        lines.append(row(name, [[measured.total for measured in routes[route]] for route in ROUTES]))
        first = min(measured.first_line for route in ROUTES for measured in routes[route])
        lines.append(f"  first line after {first:.2f} s")
        measured = [[run.stages for run in routes[route]] for route in ROUTES]
        stages = next(some for some in measured if some)[0] if name.startswith("run, ") else {}
        lines += [row(f"  {stage}", [[run[stage] for run in some] for some in measured]) for stage in stages]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.report:
        arguments.report.write_text(text)


def described() -> str:
    """Hardware and versions."""
    flags = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")), "")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "scikit-learn"))
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores, load {load:.1f} at the end; Python {platform.python_version()}, {versions}"
    )


def row(name: str, costs: list[list[Cost]]) -> str:
    """A line of the table: the least seconds and CPU seconds of each route."""
    cells = [
        f"{min(cost.seconds for cost in some):>12.2f}{min(cost.cpu for cost in some):>12.2f}" if some else " " * 24
        for some in costs
    ]
    return (f"{name:<28}" + "".join(cells)).rstrip()


if __name__ == "__main__":
    main()
