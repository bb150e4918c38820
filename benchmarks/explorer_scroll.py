"""Scrolling through a cluster of 100,000 images in the explorer.

    python benchmarks/explorer_scroll.py [--images 100000] [--report FILE]

Claim: while every image of a cluster of 100,000 is scrolled past, the server's process stays below 300 MB.

A run of ready embeddings, whose pictures are placeholders, is made of the stages that a list of images needs; all pages
of its largest cluster are asked for in order, with every tenth picture, as a page that is scrolled fast does. That is
done in a process of its own, as the server is one, which first makes the files of rows.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

MOST_MB = 300


def resident() -> dict[str, int]:
    """Memory of this process in MB: all of it, and what is its own and no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))
    }
    return {"all": found["VmRSS"], "own": found["RssAnon"]}


def scroll(images: int) -> tuple[str, int]:
    """Make a run with a large cluster, scroll through it in another process; return what it says, and its exit code."""
    from rayclust.config import validate
    from rayclust.runtime.pipeline import run_stage
    from rayclust.stages import encode

    encode.DRIVER_ROWS = 1 << 20  # made in this process: what is measured is the explorer
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        x = np.concatenate([np.eye(8)[np.zeros(images, int)], np.eye(8)[np.full(images // 100, 4)]])
        np.save(f"{folder}/rows.npy", (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32))
        groups = {"method": {"name": "kmeans", "clusters": 2}, "label": {"vocabulary": "none"}}
        config = validate({"run": f"{folder}/run", "images": {"uri": f"{folder}/rows.npy"}, **groups})
        for stage in ("encode", "train", "assign", "label"):  # the others show nothing in a list of images
            run_stage(stage, config)
        command = [sys.executable, __file__, "--run", config.run]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    return done.stdout, done.returncode


def pages(run: str) -> None:
    """Ask for every page of a run's largest cluster and for the pictures on it."""
    from rayclust.runtime.api import load_run
    from rayclust.web.explorer import Explorer

    before = resident()
    explorer = Explorer(load_run(run))
    [first, *_] = explorer.clusters()["clusters"]
    opened, started, most = resident(), time.perf_counter(), 0
    slowest = 0.0
    for offset in range(0, first["size"], 100):
        asked = time.perf_counter()
        page = explorer.images(first["number"], offset=offset, limit=100)
        slowest = max(slowest, time.perf_counter() - asked)
        for image in page["images"][:: 10 if offset else 1]:
            explorer.picture(image["row"], 160)
        most = max(most, resident()["all"]) if offset % 1000 == 0 else most
    taken, after = time.perf_counter() - started, resident()
    print(f"{first['size']:,} images in the cluster; MB of the process, all (its own):")
    for name, found in (("before it opens the run", before), ("opened", opened), ("all scrolled", after)):
        print(f"  {name}: {found['all']:,} ({found['own']:,})")
    print(f"  most while scrolling: {most:,}, {'below' if most < MOST_MB else 'ABOVE'} {MOST_MB}")
    print(
        f"{taken:.1f} s for all pages; the slowest took {1e3 * slowest:.0f} ms; torch loaded: {'torch' in sys.modules}"
    )
    sys.exit(most >= MOST_MB)


def main() -> None:
    """Print what was measured, and write it; exit code 1 above the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--run", help="a run to scroll through, in this process")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.run:
        pages(given.run)
    found, code = scroll(given.images)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("faiss-cpu", "numpy", "pyarrow"))
    head = f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    text = f"{head}\npython benchmarks/explorer_scroll.py --images {given.images}\n\n{found}"
    print(text)
    if given.report:
        given.report.write_text(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
