"""The whole job through Ray on one GPU: stages, rates, memory, and the same clusters as without a GPU.

    python benchmarks/gpu_job.py [--images 12000] [--budget 600] [--out FILE] [--small]

Photographs are drawn: textures of ten groups, as JPEG files in a folder a group. The encoder is open_clip/ViT-B-32 with
random weights, whose rows tell textures apart. Every run is `rayclust quick` in a process of its own: k-means on the
GPU; the same without a GPU on the embeddings of that run; other methods on the GPU, which find encode and neighbours
done; and k-means without a GPU from the images.

While a run goes on, `nvidia-smi` tells ten times a second which processes hold memory on the GPU and how busy it is.
Ray names its workers by what they do, so that a stage has used the GPU if a worker was there that was not idle.

Claims. With the default settings encode, neighbors, train and assign compute on the GPU that is there. k-means on the
same embeddings gives the same clusters with and without it, up to rounding: at least 99.5 % of the rows.
`--small` takes few images and a small encoder and needs no GPU: it shows that every part works.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu  # noqa: E402 - its lines on the hardware

GROUPS = 10
VERSIONS = ("ray", *gpu.VERSIONS, "timm", "pyarrow", "faiss-cpu")
SIZES = (320, 240)
"""Width and height of an image, pixels."""
USES_GPU = ("encode", "neighbors", "train", "assign")
"""Stages of which it is claimed."""
SAMPLED = "100"
"""Milliseconds between two looks at the GPU."""
SAME_ROWS = 0.995
LEAST = 20.0
"""Seconds that must be left for another run to begin."""
NO_GPU = "resources.gpus_per_worker=0"


def draw(task: tuple[str, int, int]) -> None:
    """Write one group's images from `first` to `last`: noise of the group's grain and colours."""
    import numpy as np
    from PIL import Image

    folder, first, last = task
    group = int(Path(folder).name[-1])
    style = np.random.default_rng(group)
    colours, grain = style.integers(0, 256, (4, 3)).astype(np.float32), int(style.choice([4, 8, 16, 32, 64]))
    for number in range(first, last):
        noise = np.random.default_rng([group, number])
        picks = colours[noise.integers(0, 4, (grain * 3 // 4, grain))] + noise.normal(0, 12, 3)
        small = Image.fromarray(picks.clip(0, 255).astype(np.uint8))
        small.resize(SIZES, Image.Resampling.BILINEAR).save(Path(folder) / f"{number:06d}.jpg", quality=85)


def photographs(folder: Path, count: int) -> Path:
    """Draw `count` images in as many folders as there are groups."""
    tasks, each = [], count // GROUPS
    for group in range(GROUPS):
        place = folder / f"group{group}"
        place.mkdir(parents=True, exist_ok=True)
        tasks += [(str(place), first, min(first + 250, each)) for first in range(0, each, 250)]
    with multiprocessing.get_context("fork").Pool() as pool:
        pool.map(draw, tasks, chunksize=1)
    return folder


def random_weights(file: Path, encoder: str) -> Path:
    """Write a network as it is before training."""
    import open_clip
    import safetensors.torch
    import timm
    import torch

    torch.manual_seed(0)
    family, _, name = encoder.partition("/")
    network = timm.create_model(name, num_classes=0) if family == "timm" else open_clip.create_model(name)
    safetensors.torch.save_file(network.state_dict(), file)
    return file


@dataclass
class Seen:
    """What was seen on the GPU in one stage."""

    workers: set[str] = field(default_factory=set)
    """Names of Ray's workers that held memory there and were not idle."""
    megabytes: float = 0.0
    """Most memory in use, all processes."""
    busy: list[float] = field(default_factory=list)
    """Percent of the time since the look before in which a kernel ran."""


class Watch:
    """Looks at the GPU while a run goes on; `stage` is what goes on now. Sees nothing without `nvidia-smi`."""

    def __init__(self) -> None:
        self.stage, self.seen = "start", defaultdict[str, Seen](Seen)
        self._processes: list[subprocess.Popen[str]] = []
        self._read("--query-compute-apps=pid,used_memory", self._of_process)
        self._read("--query-gpu=memory.used,utilization.gpu", self._of_card)

    def _read(self, query: str, take: Callable[[str, str], None]) -> None:
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", SAMPLED]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return
        self._processes.append(process)

        def follow() -> None:
            for line in process.stdout or ():
                parts = line.strip().split(", ")
                if len(parts) == 2:
                    take(*parts)

        threading.Thread(target=follow, daemon=True).start()

    def _of_process(self, pid: str, _: str) -> None:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
        except OSError:
            return
        if name.startswith("ray::") and "IDLE" not in name:
            self.seen[self.stage].workers.add(name.removeprefix("ray::"))

    def _of_card(self, megabytes: str, busy: str) -> None:
        seen = self.seen[self.stage]
        seen.megabytes = max(seen.megabytes, float(megabytes))
        seen.busy.append(float(busy))

    def stop(self) -> None:
        """Look no more."""
        for process in self._processes:
            process.kill()
            process.wait()


@dataclass
class Job:
    """One command, and what was seen on the GPU by stage."""

    lines: list[str]
    seen: dict[str, Seen]
    seconds: float
    code: int


def rayclust(arguments: list[str], say: Callable[[str], None], limit: float) -> Job:
    """Run a command, watch the GPU, and show the command's lines with the second that they came at."""
    say(f"\n$ rayclust {shlex.join(arguments)}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    watch, lines, began = Watch(), list[str](), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "rayclust", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    timers = [threading.Timer(limit, process.send_signal, [signal.SIGINT]), threading.Timer(limit + 10, process.kill)]
    for timer in timers:
        timer.start()
    try:
        for line in process.stdout or ():
            lines.append(re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line.rstrip()))
            stage, started, _ = lines[-1].partition(": started")
            if started:
                watch.stage = stage
            say(f"  {time.monotonic() - began:6.1f} s  {lines[-1][:160]}")
        code = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        watch.stop()
    if code:
        say(
            f"  FAILED with exit code {code}"
            + (f", after its limit of {limit:.0f} s" if time.monotonic() - began > limit else "")
        )
    return Job(lines, dict(watch.seen), time.monotonic() - began, code)


def table(run: Path, job: Job, say: Callable[[str], None]) -> None:
    """Show each stage that a command ran: seconds, rows a second, busy workers, and the GPU."""
    say("  stage       seconds    rows/s    GPU MB   busy, mean and most   workers on the GPU")
    for line in job.lines:
        stage, done, _ = line.partition(": done in ")
        if not done:
            continue
        manifest = json.loads((run / "manifests" / f"{stage}.json").read_text())
        seconds, seen = manifest["seconds"], job.seen.get(stage, Seen())
        rows, busy = manifest["counts"].get("rows", 0), seen.busy or [0.0]
        say(
            f"  {stage:<10}{seconds:9.2f} {rows / max(seconds, 1e-3):9,.0f} {seen.megabytes:9,.0f}"
            f" {sum(busy) / len(busy):9.1f} {max(busy):9.1f} %   {', '.join(sorted(seen.workers)) or 'none'}"
        )
        for part in manifest["measured"]:
            kinds = ", ".join(f"{kind} {busy:.2f} s" for kind, busy in part["busy"].items())
            say(f"    {part['name']}: {part['workers']} for {part['seconds']:.2f} s, of these {kinds}")


def column(run: Path, folder: str, name: str) -> Any:
    """A column of a table of all rows."""
    import numpy as np
    import pyarrow.parquet as pq

    files = sorted((run / folder).glob("*.parquet"))
    return np.concatenate([np.array(pq.read_table(file)[name].to_pylist()) for file in files])


def compare(one: Path, other: Path, say: Callable[[str], None]) -> float:
    """Show how far embeddings, neighbours and clusters of two runs agree; the clusters' share of equal rows."""
    import numpy as np

    from rayclust.metrics.external import accuracy, ari

    x, y = (column(run, "embeddings", "embedding").astype(np.float64) for run in (one, other))
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    some, others = (column(run, "neighbors", "neighbors") for run in (one, other))
    shared = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(some, others, strict=True)]
    clusters = [column(run, "assignments", "cluster") for run in (one, other)]
    same = accuracy(*clusters)
    say(f"  cosine of a row with the other run's: least {cosines.min():.6f}, mean {cosines.mean():.6f}")
    say(f"  neighbours that both runs have: {np.mean(shared):.4%}; equal lists: {np.mean((some == others).all(1)):.2%}")
    say(f"  clusters: {same:.3%} of the rows, ARI {ari(*clusters):.4f}")
    return same


def only_encoded(run: Path, copy: Path) -> Path:
    """Copy a run of which encode alone is done."""
    shutil.copytree(run, copy, ignore=lambda folder, names: [] if Path(folder) != run else sorted(
        set(names) - {"embeddings", "rejects", "manifests"}))  # fmt: skip
    for path in (copy / "manifests").iterdir():
        if not path.name.startswith("encode"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


class Bench:
    """The runs, one after the other, and what was claimed of them."""

    def __init__(self, scratch: Path, encoder: str, say: Callable[[str], None], deadline: float) -> None:
        self.scratch, self.encoder, self.say, self.deadline = scratch, encoder, say, deadline
        self.weights = random_weights(scratch / "weights.safetensors", encoder)
        self.claims: dict[str, bool] = {}

    def quick(self, images: Path, out: Path, method: str, *overrides: str) -> Job | None:
        """Run all stages and show them; None where one failed or no time is left."""
        left = self.deadline - time.monotonic()
        if left < LEAST:
            self.say(f"\n{out.name}, {method}: left out, the time is over")
            return None
        options = ["--out", str(out), "--clusters", str(GROUPS), "--method", method, "--encoder", self.encoder]
        weights = [f"encoder.pretrained={self.weights}", "label.vocabulary=none"]
        job = rayclust(["quick", str(images), *options, *weights, *overrides], self.say, left)
        table(out, job, self.say)
        self.claims[f"{out.name}, {method}: ends well"] = not job.code
        return None if job.code else job

    def on_gpu(self, images: Path, method: str) -> bool:
        """Run a method in the run on the GPU; return whether it ended well."""
        job = self.quick(images, self.scratch / "gpu", method)
        if job is None:
            return False
        for stage in USES_GPU:
            if f"{stage}: started" in job.lines:
                self.claims[f"gpu, {method}: {stage} on the GPU"] = bool(job.seen.get(stage, Seen()).workers)
        return True

    def run(self, images: Path) -> None:
        """Run everything; each run that comes later matters less."""
        if not self.on_gpu(images, "kmeans"):
            return
        first = Path(shutil.copytree(self.scratch / "gpu", self.scratch / "gpu-kmeans"))
        copy = only_encoded(first, self.scratch / "cpu-copy")
        if self.quick(images, copy, "kmeans", NO_GPU):
            same = compare(first, copy, self.say)
            self.claims[f"kmeans: {SAME_ROWS:.1%} of the rows are as without a GPU"] = same >= SAME_ROWS
        for method in ("auto", "temi"):
            self.on_gpu(images, method)
        if self.quick(images, self.scratch / "cpu", "kmeans", NO_GPU):
            compare(first, self.scratch / "cpu", self.say)


def main() -> None:
    """Run all of it and say which claims hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all; a command that is late is ended")
    parser.add_argument("--out", help="a file that gets the same lines")
    parser.add_argument("--small", action="store_true", help="few images, a small encoder")
    arguments = parser.parse_args()
    began = time.monotonic()
    say = gpu.report("gpu_job.py", arguments.out, VERSIONS)
    count = 200 if arguments.small else arguments.images
    encoder = "timm/test_vit" if arguments.small else "open_clip/ViT-B-32"
    with tempfile.TemporaryDirectory(prefix="gpu-job-") as folder:
        images = photographs(Path(folder) / "images", count)
        size = sum(path.stat().st_size for path in images.rglob("*.jpg")) / count / 1000
        say(f"{count:,} JPEG files of {SIZES[0]} x {SIZES[1]}, {size:.0f} kB each; {encoder} with random weights")
        bench = Bench(Path(folder), encoder, say, began + arguments.budget)
        bench.run(images)
    say("\nclaims")
    for claim, holds in bench.claims.items():
        say(f"  {'holds' if holds else 'FAILS'}  {claim}")
    say(f"all: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
