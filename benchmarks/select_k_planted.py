"""The number of planted groups, found by select-k through Ray Tune.

Claim: K orthogonal one-dimensional groups with a little noise give the true K of the candidates 2 … 12 on every seed.

    python benchmarks/select_k_planted.py [--method kmeans|cpp] [--seeds 10] [--rows 600]

Every seed is a run of its own: ready embeddings, encode, neighbors, select-k with one Ray Tune trial per candidate.
"""

from __future__ import annotations

import argparse
import os
import platform
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
METHODS: dict[str, dict[str, Any]] = {
    "kmeans": {"name": "kmeans"},
    "cpp": {"name": "cpp", "preset": "none", "hidden": 64, "width": 32, "steps": 100, "batch_size": 256}
    | {"expansion_steps": 10, "learning_rate": 1e-3},
}


def groups(clusters: int, rows: int, seed: int) -> np.ndarray:
    """Float32[N 16+2·K]: rows along K orthogonal directions."""
    rng = np.random.default_rng(seed)
    width = 16 + 2 * clusters
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0][:clusters]
    x = np.repeat(directions, rows // clusters, axis=0)
    return rng.permutation(x + 0.02 * rng.normal(size=x.shape)).astype(np.float32)


def choice(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What select-k wrote for one seed."""
    (folder / "rows").mkdir()
    np.save(folder / "rows" / "rows.npy", groups(TRUE[seed % len(TRUE)], options.rows, seed))
    tree = {"run": str(folder / "run"), "seed": seed, "images": {"uri": str(folder / "rows")}, "neighbors": {"k": 10}}
    run_all(validate(tree | {"method": METHODS[options.method] | {"clusters": CANDIDATES}}), stop_after="select-k")
    found: dict[str, Any] = storage.read_json(Run(str(folder / "run")).selection)
    return found


def main() -> None:
    """Prints a line a seed and how many were right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=list(METHODS), default="kmeans")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=600)
    options = parser.parse_args()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__}
    print(f"{platform.machine()}, {os.cpu_count()} CPUs,", ", ".join(f"{name} {v}" for name, v in versions.items()))
    print("command: python", " ".join(sys.argv))
    right = 0
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            found, true = choice(Path(folder), seed, options), TRUE[seed % len(TRUE)]
            right += found["chosen"] == true
            picks = ", ".join(f"{name} {k}" for name, k in found["picks"].items())
            print(
                f"seed {seed}: true {true}, chosen {found['chosen']}, {time.perf_counter() - started:.0f} s ({picks})"
            )
    print(f"{options.method}: {right} of {options.seeds} right")


if __name__ == "__main__":
    main()
