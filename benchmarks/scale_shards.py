"""Tar shards by the thousand over a cluster of many simulated nodes: the driver's memory, speed, and a second run.

Claim: none beyond that it ends right: every image has a row, rows are dense, and a second run does nothing.

    python benchmarks/scale_shards.py [--shards 1000] [--images 100] [--nodes 20] [--folder PATH]

Nodes are Ray's own simulation (`ray.cluster_utils.Cluster`): a raylet, agents and worker processes each, one CPU by
name, all on the cores of this machine, so that times are this machine's and not those of so many. The images are 8 × 8
PNGs, the encoder is `pixels`. The driver is this process; its peak is the kernel's own (VmHWM).
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import shutil
import struct
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from ray.cluster_utils import Cluster

from rayclust import config
from rayclust.runtime import pipeline
from rayclust.runtime.cluster import connect
from rayclust.store.run import Run

SIDE = 8
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def png(number: int) -> bytes:
    """An RGB image that depends on `number`."""
    row = b"\0" + bytes((number >> (8 * (i % 4)) & 255) ^ i for i in range(3 * SIDE))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * SIDE)) + chunk(b"IEND", b"")
    )


def make(folder: Path, shards: int, images: int) -> None:
    """Writes the tars."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for image in range(images):
                data = png(shard * images + image)
                member = tarfile.TarInfo(f"{image:04d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def memory(name: str) -> float:
    """A line of this process's status, such as VmHWM or VmRSS, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def measured(title: str, images: int, work: Callable[[], object]) -> None:
    """One row of the table."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(f"| {title} | {images:,} | {seconds:.2f} | {images / seconds:,.0f} | {memory('VmHWM'):.0f} |", flush=True)


def check(run: Run, shards: int, images: int) -> None:
    """Every image has a row of its own, and rows are dense and in order."""
    expected = 0
    for shard in range(shards):
        rows = pq.read_table(run.embeddings(shard), columns=["row"])["row"]
        if rows.to_pylist() != list(range(expected, expected + images)):
            raise SystemExit(f"part {shard}: rows {pc.min_max(rows)} where {expected} was to be the first")
        expected += images
    print(f"\n{expected:,} rows, dense and in order; no rejects: {not list(Path(run.uri).glob('rejects/*'))}")


def encode(arguments: argparse.Namespace, folder: Path) -> None:
    """Encodes over the simulated nodes, twice."""
    content = {
        "run": str(folder / "run"),
        "images": {"uri": str(folder / "input"), "format": "webdataset"},
        "encoder": {"name": "pixels", "image_size": SIDE},
        "method": {"name": "kmeans", "clusters": 10},
        "resources": {"workers": arguments.workers, "decode_workers": arguments.workers},
    }
    run, total = config.validate(content), arguments.shards * arguments.images
    connect()
    alive = sum(node["Alive"] for node in ray.nodes())
    print(f"{alive} nodes, {memory('VmRSS'):.0f} MB in the driver before the first stage\n")
    print("| what | images | seconds | images/s | driver's peak memory, MB |")
    print("|---|---|---|---|---|")
    measured("encode", total, lambda: pipeline.run_stage("encode", run))
    measured("the same again, skipped", total, lambda: pipeline.run_stage("encode", run))
    (folder / "run" / "manifests" / "encode.json").unlink()
    measured("again without the stage's seal", total, lambda: pipeline.run_stage("encode", run))
    check(Run(run.run), arguments.shards, arguments.images)


def main() -> None:
    """Prints the machine, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--images", type=int, default=100, help="images of a shard")
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4, help="decoders, and encoders: each takes some 400 MB")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the scratch folder goes"
    )
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"Ray {ray.__version__}"
    )
    print(
        f"python benchmarks/scale_shards.py --shards {arguments.shards} --images {arguments.images} "
        f"--nodes {arguments.nodes} --workers {arguments.workers}"
    )
    folder = Path(tempfile.mkdtemp(prefix="scale-shards-", dir=arguments.folder))
    make(folder / "input", arguments.shards, arguments.images)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        for _ in range(arguments.nodes - 1):
            cluster.add_node(wait=False, **NODE)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        encode(arguments, folder)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
