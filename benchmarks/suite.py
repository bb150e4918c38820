"""What a run costs beside what a user would pick instead: one table a claim, with a floor that fails.

    python benchmarks/suite.py [PART ...] [--threads 2] [--rounds 3] [--small] [--report FILE]

Parts, each of which runs alone: neighbors, kmeans, kmeans-1000, kmeans-10000, and the scripts cpp_step,
temi_step, fixed_costs. Without a name all but kmeans-10000 run, which takes faiss ten minutes on two cores.
Contenders take turns; a table has the least, median and largest seconds of the rounds and CPU seconds of all threads.
The floor is on the ratio of the medians. `--small` takes tiny sizes and no floors: it shows that every part works.

Exit status: the number of floors that were missed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import faiss
import torch
from baselines import faiss_kmeans, faiss_neighbors
from cases import planted_rows
from threadpoolctl import threadpool_limits

from rayclust.clustering import kmeans
from rayclust.search.knn import top_k
from rayclust.settings import KMeansOptions

HERE = Path(__file__).resolve().parent
SCRIPT_LIMIT = 300
"""Seconds that a script of its own may take."""


@dataclass
class Suite:
    """What parts share: the arguments, the lines of the report, and the floors that were missed."""

    rounds: int
    small: bool
    threads: int
    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def say(self, line: str = "") -> None:
        """Print a line, and keep it for the report."""
        print(line, flush=True)
        self.lines.append(line)

    def hold(self, claim: str, value: float, floor: float) -> None:
        """Print whether a value reaches its floor."""
        verdict = "not compared" if self.small else "holds" if value >= floor else "MISSED"
        self.say(f"{claim}: {value:.3f}, floor {floor:g}: {verdict}")
        if verdict == "MISSED":
            self.missed.append(claim)

    def alternate(self, contenders: dict[str, Callable[[], object]], rounds: int | None = None) -> dict[str, float]:
        """Let contenders take turns, print their seconds, and return the median of each."""
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        cpu: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds or self.rounds):
            for name, run in contenders.items():
                start, used = time.perf_counter(), time.process_time()
                run()
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
        self.say(f"{'':<28}{'min':>10}{'median':>10}{'max':>10}{'CPU s':>10}")
        for name, found in seconds.items():
            middle = statistics.median(found)
            cells = (min(found), middle, max(found), statistics.median(cpu[name]))
            self.say(f"{name:<28}" + "".join(f"{cell:>10.2f}" for cell in cells))
        return {name: statistics.median(found) for name, found in seconds.items()}


def neighbors(suite: Suite) -> None:
    """Exact neighbours of some of the rows among all."""
    count, queries, width, k = (4_000, 500, 64, 10) if suite.small else (100_000, 5_000, 512, 50)
    x = planted_rows(count, width, 200)
    suite.say(f"{k} exact neighbours of {queries:,} of {count:,} x {width} rows, {suite.threads} threads")
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        found["rayclust"] = top_k(x[:queries], x, k, query_ids=torch.arange(queries))[0]

    def theirs() -> None:
        found["faiss"] = torch.from_numpy(faiss_neighbors(x.numpy(), x[:queries].numpy(), k))

    medians = suite.alternate({"rayclust": ours, "faiss IndexFlatIP": theirs})
    own = found["faiss"] == torch.arange(queries)[:, None]
    own[~own.any(1), -1] = True
    same = float((found["rayclust"] == found["faiss"][~own].view(queries, k)).float().mean())
    suite.say(f"ids in the same place: {same:.5f}")
    suite.hold("neighbours, times faiss's rate", medians["faiss IndexFlatIP"] / medians["rayclust"], 1.0)
    suite.hold("neighbours, ids as faiss's", same, 0.999)


def _kmeans(suite: Suite, count: int, width: int, clusters: int, rounds: int, passes: int) -> None:
    """k-means to faiss's inertia, seeding included."""
    x = planted_rows(count, width, 2 * clusters)
    options = KMeansOptions(clusters=clusters, metric="euclidean", restarts=1, max_iterations=passes)
    suite.say(f"k-means of {count:,} x {width} rows, K = {clusters:,}, {suite.threads} threads; faiss makes 25 passes,")
    suite.say(f"rayclust at most {passes} over all rows after its seeds")
    centers: dict[str, torch.Tensor] = {}

    def ours() -> None:
        centers["rayclust"] = kmeans.fit(lambda: [x], options, seed=1).centers

    def theirs() -> None:
        centers["faiss.Kmeans"] = torch.from_numpy(faiss_kmeans(x.numpy(), clusters, seed=1))

    medians = suite.alternate({"rayclust": ours, "faiss.Kmeans": theirs}, rounds)
    inertia = {name: float(kmeans.assign(x, found)[1].sum(dtype=torch.float64)) for name, found in centers.items()}
    suite.say(", ".join(f"inertia of {name} {value:.1f}" for name, value in inertia.items()))
    name = f"k-means of {count:,} x {width}, K = {clusters:,}"
    suite.hold(f"{name}, times faiss's rate", medians["faiss.Kmeans"] / medians["rayclust"], 1.5)
    suite.hold(f"{name}, faiss's inertia to rayclust's", inertia["faiss.Kmeans"] / inertia["rayclust"], 0.995)


def kmeans_500(suite: Suite) -> None:
    """A middling size, in several rounds."""
    sizes = (5_000, 64, 300) if suite.small else (280_000, 256, 512)
    _kmeans(suite, *sizes, suite.rounds, 8)


def kmeans_1000(suite: Suite) -> None:
    """The size of the claim, once."""
    sizes = (6_000, 64, 300) if suite.small else (500_000, 256, 1_000)
    _kmeans(suite, *sizes, 1, 8)


def kmeans_10000(suite: Suite) -> None:
    """The other size of the claim, once."""
    sizes = (7_000, 64, 600) if suite.small else (200_000, 768, 10_000)
    _kmeans(suite, *sizes, 1, 12)


def script(name: str, *arguments: str) -> Callable[[Suite], None]:
    """A part that is a script of its own; it fails with the script."""

    def run(suite: Suite) -> None:
        given = ("--help",) if suite.small else arguments
        command = [sys.executable, str(HERE / f"{name}.py"), *given]
        suite.say(shlex.join(["python", f"benchmarks/{name}.py", *given]))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SCRIPT_LIMIT, check=False)
        except subprocess.TimeoutExpired:
            suite.say(f"not ended in {SCRIPT_LIMIT} s")
            suite.missed.append(name)
            return
        suite.say(done.stdout.rstrip())
        if done.returncode:
            suite.say(done.stderr[-2_000:])
            suite.missed.append(name)

    return run


PARTS: dict[str, Callable[[Suite], None]] = {
    "neighbors": neighbors,
    "kmeans": kmeans_500,
    "kmeans-1000": kmeans_1000,
    "cpp_step": script("cpp_step", "--parts", "term", "step"),
    "temi_step": script("temi_step", "--device", "cpu"),
    "fixed_costs": script("fixed_costs", "--rounds", "1", "--routes", "auto"),
    "kmeans-10000": kmeans_10000,
}
ALONE = ("kmeans-10000",)
"""Parts that only run where they are named."""


def described(threads: int) -> str:
    """Hardware, versions and load."""
    information = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in information if line.startswith("model name")), "")
    tiles = ", amx_bf16" if any("amx_bf16" in line for line in information) else ""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "faiss-cpu", "scikit-learn", "numpy"))
    return (
        f"{model or platform.machine()}{tiles}, {os.cpu_count()} cores, {threads} threads, "
        f"load {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, {versions}"
    )


def main() -> int:
    """Run the parts and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny sizes, no floors")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    suite = Suite(arguments.rounds, arguments.small, arguments.threads)
    suite.say(described(arguments.threads))
    suite.say(f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}, python benchmarks/suite.py {shlex.join(sys.argv[1:])}")
    with threadpool_limits(arguments.threads):
        for name in arguments.parts or [name for name in PARTS if name not in ALONE]:
            start = time.perf_counter()
            suite.say(f"\n{name}")
            PARTS[name](suite)
            suite.say(f"({time.perf_counter() - start:.0f} s in all)")
    suite.say(f"\nfloors missed: {', '.join(suite.missed) or 'none'}")
    if arguments.report:
        arguments.report.write_text("\n".join(suite.lines) + "\n")
    return len(suite.missed)


if __name__ == "__main__":
    sys.exit(main())
