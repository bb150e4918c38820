"""The number of planted groups, found by select-k, in the driver or through Ray Tune.

Claim: orthogonal groups with a little noise give the true K of the candidates 2 … 12 on every seed.

    python benchmarks/select_k_planted.py [--planted lines|subspaces] [--method kmeans|cpp] [--true K ...]
        [--seeds SEED ...] [--rows 600] [--tune] [--report FILE]

`lines`: K orthogonal directions, noise 0.02 a component. `subspaces`: K orthogonal subspaces of three dimensions among
64, normal coefficients, noise 0.03 a component; balls they are not, and what measures distances splits them. Every seed
of every true K is a run of its own: ready embeddings, encode, neighbors, select-k. With --tune fits and candidates go
through Ray Train and Ray Tune, all runs on one cluster; the results are those of the driver. With --report lines are
appended to a file as runs end, and what it has is not run again; the last line counts all that it has.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from rayclust.config import validate
from rayclust.runtime.pipeline import run_all
from rayclust.store import storage
from rayclust.store.run import Run

CANDIDATES = list(range(2, 13))
TRUE = (6, 4, 9, 3, 7, 5, 8, 10, 11, 6)
PLANTED = {"lines": (1, 0.02), "subspaces": (3, 0.03)}
"""Dimensions of a group, and noise of a component."""


def groups(planted: str, clusters: int, rows: int, seed: int) -> np.ndarray:
    """Float32[N D]: rows of orthogonal groups; of 64 dimensions, 16 + 2·K for lines."""
    rng = np.random.default_rng([seed, clusters])
    dimensions, noise = PLANTED[planted]
    width = 16 + 2 * clusters if dimensions == 1 else 64
    bases = np.linalg.qr(rng.normal(size=(width, width)))[0].T[: dimensions * clusters]
    group = rng.permutation(np.arange(rows) % clusters)
    coefficients = np.ones((rows, 1)) if dimensions == 1 else rng.normal(size=(rows, dimensions))
    x = np.einsum("nr,nrd->nd", coefficients, bases.reshape(clusters, dimensions, width)[group])
    return np.asarray(x + noise * rng.normal(size=x.shape), dtype=np.float32)


def choice(folder: Path, true: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What select-k wrote for one seed."""
    (folder / "rows").mkdir()
    np.save(folder / "rows" / "rows.npy", groups(options.planted, true, options.rows, seed))
    tree = {"run": str(folder / "run"), "seed": seed, "images": {"uri": str(folder / "rows")}}
    tree |= {"neighbors": {"k": 10}} if options.planted == "lines" else {}
    tree |= {"resources": {"in_driver": "never"}} if options.tune else {}
    run_all(validate(tree | {"method": {"name": options.method, "clusters": CANDIDATES}}), stop_after="select-k")
    found: dict[str, Any] = storage.read_json(Run(str(folder / "run")).selection)
    return found


def main() -> None:
    """Prints a line a seed and how many were right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planted", choices=list(PLANTED), default="lines")
    parser.add_argument("--method", choices=("kmeans", "cpp"), default="kmeans")
    parser.add_argument("--true", type=int, nargs="+", default=None, help="default: a K for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--tune", action="store_true", help="not in the driver")
    parser.add_argument("--report", type=Path, default=None)
    options = parser.parse_args()
    had = options.report.read_text() if options.report and options.report.exists() else ""
    lines = re.findall(r"^seed (\d+): true (\d+), chosen (\d+)", had, re.MULTILINE)
    found = {(int(true), int(seed)): int(chosen) for seed, true, chosen in lines}

    def say(line: str) -> None:
        print(line, flush=True)
        if options.report:
            with options.report.open("a") as file:
                file.write(line + "\n")

    cases = [(true, seed) for seed in options.seeds for true in options.true or [TRUE[seed % len(TRUE)]]]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__}
    say(f"{platform.machine()}, {os.cpu_count()} CPUs, " + ", ".join(f"{name} {v}" for name, v in versions.items()))
    say("command: python " + " ".join(sys.argv))
    for true, seed in (case for case in cases if case not in found):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            chosen = choice(Path(folder), true, seed, options)
            found[true, seed] = chosen["chosen"]
            weights = chosen["evidence"]
            picks = ", ".join(f"{name} {k} ({weights.get(name, 0.0):.2f})" for name, k in chosen["picks"].items())
            seconds = time.perf_counter() - started
            say(f"seed {seed}: true {true}, chosen {chosen['chosen']}, {seconds:.0f} s ({picks})")
    right = sum(true == k for (true, _), k in found.items())
    say(f"{options.planted}, {options.method}: {right} of {len(found)} right")


if __name__ == "__main__":
    main()
