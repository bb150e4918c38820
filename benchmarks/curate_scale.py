"""Curation of many rows: time and memory of each step, and the recall of the search for near-duplicates.

Claim: 1 M rows of width 64 are curated (duplicates with measured recall, three levels of clusters, a sample) below 3 GB
on two cores; each step's time grows with a power of the rows well below 2.

    python benchmarks/curate_scale.py [--rows 10000 100000 1000000] [--threads 2] [--probes 4] [--folder PATH]

Rows lie around 1,000 planted centres (cosine 0.8 within one); 2 % of them repeat another row and 18 % are near one, at
1 − cos from 0.001 to 0.06. They are mapped from a file, as the stage's are. Each size has a process of its own; seconds
are CPU time, with the wall clock beside it, as other programs may run on the machine. Exponents are between
neighbouring sizes, of CPU time. Tables of neighbours are the stage neighbors' work and not part of this.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayclust.clustering.balanced_sampling import Points, allocate, draw, fit_levels, key_hashes
from rayclust.clustering.duplicates import (
    MOST_NEAR,
    Edges,
    cluster_pairs,
    decide,
    even_ranges,
    first_of_equal,
    ranks,
    recall,
)
from rayclust.clustering.row_stats import even_sample
from rayclust.search.ivf import train_centers

WIDTH, CENTERS, BLOCK = 64, 1000, 8192
LARGEST, EPSILON = 0.1, 0.03
RECALL_ROWS = 1000


def make(path: Path, rows: int) -> torch.Tensor:
    """Float32[N D] unit rows, mapped."""
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, WIDTH))
    centers = np.random.default_rng(0).normal(size=(CENTERS, WIDTH)).astype(np.float32)
    for start in range(0, rows, BLOCK):
        random, count = np.random.default_rng(start + 1), min(BLOCK, rows - start)
        block = centers[random.integers(CENTERS, size=count)] + 0.5 * random.standard_normal((count, WIDTH), np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        # Copies of rows in the first four fifths.
        copied = np.arange(int(0.8 * count), count)
        noise = random.standard_normal((len(copied), WIDTH), np.float32) / WIDTH**0.5
        size = random.uniform(0.05, 0.35, (len(copied), 1)).astype(np.float32)
        size[random.random(len(copied)) < 0.1] = 0
        source = block[random.integers(int(0.8 * count), size=len(copied))]
        near = source + size * noise
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        block[copied] = np.where(size == 0, source, near)
        x[start : start + count] = block
    return torch.from_numpy(x)


class Steps:
    """CPU and wall seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures what is done inside."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.seconds[name] = (time.process_time() - cpu, time.perf_counter() - wall)


def curate(rows: int, probes: int, folder: Path) -> dict[str, Any]:
    """All steps on so many rows."""
    step, x = Steps(), make(folder / f"{rows}.npy", rows)
    with step("identical rows"):
        first = first_of_equal(block.numpy() for block in torch.split(x, BLOCK))
        unique = np.flatnonzero(first == np.arange(rows))
    with step("lists"):
        lists = round(len(unique) ** 0.5)
        ids = torch.from_numpy(unique)
        centers = train_centers(x[ids[even_sample(len(unique), 64 * lists, 0)]], lists)
        assigned = torch.cat([centers.assign(x[some]) for some in torch.split(ids, BLOCK)]).numpy()
        order = unique[np.argsort(assigned, kind="stable")]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(assigned, minlength=len(centers.centers)))])
    with step("sorted file"):
        held = np.lib.format.open_memmap(folder / f"{rows}-sorted.npy", "w+", np.float32, (len(order), WIDTH))
        for start in range(0, len(order), BLOCK):
            held[start : start + BLOCK] = x[torch.from_numpy(order[start : start + BLOCK])].numpy()
    wanted = compared = 0
    saturated = np.zeros(rows, bool)
    with step("near pairs"):
        parts = []
        for some in even_ranges(bounds, max(BLOCK, len(unique) // 64)):
            found = cluster_pairs(
                torch.from_numpy(held), bounds, centers.centers, some, epsilon=LARGEST, probes=probes or None
            )
            wanted, compared, pairs = wanted + found.wanted, compared + found.compared, found.pairs
            counts = np.bincount(pairs.first, minlength=len(order))
            saturated[order[np.flatnonzero(counts >= MOST_NEAR)]] = True
            parts.append(Edges.merge([Edges(order[pairs.first], order[pairs.second], pairs.cosine)]))
        edges = Edges.merge(parts)
    hashes = key_hashes(map(str, range(rows)), 0)
    with step("recall"):
        drawn = np.sort(unique[np.argsort(hashes[unique])[:RECALL_ROWS]])
        share = recall(x, edges, drawn, LARGEST, unique)
        at_epsilon = recall(x, edges, drawn, EPSILON, unique)
    with step("policy and curve"):
        decision = decide(
            x, edges, first, ranks(None, rows), saturated, policy="greedy", largest=LARGEST, epsilon=EPSILON
        )
    left = np.flatnonzero(decision.kept)
    sizes = [len(left) // 10**power for power in (2, 3, 4) if len(left) >= 2 * 10**power]
    with step("levels"):
        levels = fit_levels(Points(x, left), sizes, steps=[0] + [10] * (len(sizes) - 1))
    with step("sample"):
        quota = allocate(levels, rows // 5, hashes[left])
        copies = draw(levels, quota[0], hashes[left])
    assert copies.sum() == rows // 5
    return {
        "seconds": step.seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "identical": rows - len(unique),
        "lists": len(centers.centers),
        "wanted": wanted / len(unique),
        "compared": compared,
        "edges": len(edges.first),
        "saturated": int(saturated.sum()),
        "recall": [share, at_epsilon],
        "kept": int(decision.kept.sum()),
        "levels": sizes,
    }


def main() -> None:
    """Prints the machine and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--probes", type=int, default=4, help="0: all that are wanted")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.one:
            print(json.dumps(curate(arguments.rows[0], arguments.probes, Path(folder))))
            return
    command = f"python benchmarks/curate_scale.py --threads {arguments.threads} --probes {arguments.probes}"
    print(f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}, torch ", end="")
    print(f"{torch.__version__}, numpy {np.__version__}\n{command}\n")
    found = []
    for rows in arguments.rows:
        line = [sys.executable, __file__, "--one", "--rows", str(rows), "--threads", str(arguments.threads)]
        line += ["--probes", str(arguments.probes)] + (["--folder", str(arguments.folder)] if arguments.folder else [])
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
        one = found[-1]
        shares = ", ".join("none" if share is None else f"{share:.4f}" for share in one["recall"])
        print(
            f"{rows:,} × {WIDTH}: peak {one['memory']:.2f} GB; {one['identical']:,} identical; {one['lists']:,} lists, "
            f"{one['wanted']:.1f} probes wanted, {one['compared'] / 1e6:,.0f} M pairs compared, {one['edges']:,} near, "
            f"{one['saturated']:,} rows saturated; recall at ε = {LARGEST} and {EPSILON}: {shares}; "
            f"{one['kept']:,} kept at {EPSILON}; levels {one['levels']}",
            flush=True,
        )
    heads = " | ".join(f"{rows:,}" for rows in arguments.rows)
    print(f"\n| step, CPU seconds (wall) | {heads} | exponents |\n|---|{'---|' * (len(found) + 1)}")
    for name in found[0]["seconds"]:
        cells = [f"{cpu:.2f} ({wall:.2f})" for cpu, wall in (one["seconds"][name] for one in found)]
        powers = [
            math.log(late["seconds"][name][0] / max(early["seconds"][name][0], 1e-3)) / math.log(many / few)
            for (few, early), (many, late) in pairwise(zip(arguments.rows, found, strict=True))
        ]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(f'{power:.2f}' for power in powers)} |")


if __name__ == "__main__":
    main()
