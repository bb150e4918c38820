"""Nouns and counterparts of 1 M images at 120,000 nouns: memory and time of the stage `counterparts` on two cores.

Claim: below 3 GB, over all workers of two cores, at any time.

    python benchmarks/counterparts_scale.py [--rows 1000000 ...] [--nouns 120000] [--phases choose retrieve]
        [--workers 2] [--report FILE]

The phases run as in the stage, each in a process of its own with one thread: one worker chooses the nouns on a sample
of 64 rows for each of N / 300 centres, from one start; then two workers make the counterparts of all rows, in parts of
8,192. With --measured they make those of some rows, and the time of all is extrapolated, and said to be. Rows and nouns
are drawn at random around common directions, which counts in the time of the whole alone. Of several numbers of rows
CPU seconds are printed beside each other, with the exponents between neighbouring ones.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from fixed_costs import described
from torch import Tensor
from torch.nn import functional

from rayclust.clustering import kmeans
from rayclust.language import nouns
from rayclust.settings import KMeansOptions

WIDTH, PART, GROUPS = 512, 8192, 2000
ROWS_PER_CENTER = 64


def drawn(count: int, seed: int) -> Tensor:
    """Unit rows around 2,000 directions that images and nouns share."""
    directions = torch.randn(GROUPS, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    x = directions[torch.randint(GROUPS, (count,), generator=generator)]
    x += torch.randn(count, WIDTH, generator=generator)
    return functional.normalize(x, dim=1, out=x)


def choose(rows: int, words: int) -> dict[str, Any]:
    """Find the semantic centres, score all nouns, and choose."""
    centers = nouns.center_count(rows, 1)
    sample, vocabulary = drawn(min(rows, ROWS_PER_CENTER * centers), 1), drawn(words, 2)
    options = KMeansOptions(clusters=centers, restarts=1)
    started, spent = time.perf_counter(), time.process_time()
    result = kmeans.fit(lambda: [sample], options)
    found, spent_on_centers = time.perf_counter(), time.process_time()
    scores = nouns.score_nouns(result.centers, vocabulary)
    chosen = nouns.choose_nouns(scores)
    scored = time.perf_counter()
    return {
        "sample": len(sample),
        "passes": result.n_iter,
        "chosen": len(chosen),
        "confidences": len(scores.confidence.unique()),
        "kmeans": found - started,
        "score": scored - found,
        "cpu": [spent_on_centers - spent, time.process_time() - spent_on_centers],
    }


def retrieve(count: int, chosen: int) -> dict[str, Any]:
    """Make the counterparts of so many rows, part by part."""
    words, spent, cpu = drawn(chosen, 3), 0.0, 0.0
    for part in range(-(-count // PART)):
        x = drawn(PART, 10 + part)
        started, before = time.perf_counter(), time.process_time()
        texts = nouns.counterparts(x, words).half()
        spent, cpu = spent + time.perf_counter() - started, cpu + time.process_time() - before
        assert texts.shape == x.shape
    return {"seconds": spent, "cpu": cpu, "rows": -(-count // PART) * PART}


def measured(pipe: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    """Run a phase and send what it returns with the peak of this process's memory, GB."""
    torch.set_num_threads(1)
    found = function(*arguments)
    pipe.send(found | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9})


def run(workers: int, function: Callable[..., dict[str, Any]], *arguments: Any) -> list[dict[str, Any]]:
    """Run a phase in so many processes at once."""
    context, found = multiprocessing.get_context("spawn"), []
    pairs = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=measured, args=(end, function, arguments)) for _, end in pairs]
    for process, (_, end) in zip(processes, pairs, strict=True):
        process.start()
        end.close()  # so that a process that dies ends the wait for it
    for (pipe, _), process in zip(pairs, processes, strict=True):
        found.append(pipe.recv())
        process.join()
    return found


def measure(rows: int, options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, float], float]:
    """Run the phases for so many rows; CPU seconds of each step, and the most memory at a time in GB."""
    centers, memory, seconds = nouns.center_count(rows, 1), [0.0], dict[str, float]()
    say(f"{rows:,} rows × {WIDTH}, {options.nouns:,} nouns, {centers:,} centres")
    chosen = 5 * centers
    if "choose" in options.phases:
        [choice] = run(1, choose, rows, options.nouns)
        chosen, memory = choice["chosen"], [choice["memory"]]
        seconds |= dict(zip(("centres", "all nouns scored"), choice["cpu"], strict=True))
        say(
            f"k-means of {choice['sample']:,} rows, {choice['passes']} passes: {choice['kmeans']:.0f} s; "
            f"all nouns scored, {choice['confidences']:,} different confidences: {choice['score']:.0f} s; "
            f"{choice['memory']:.2f} GB"
        )
    if "retrieve" in options.phases:
        made = min(options.measured or rows, rows)
        parts = run(options.workers, retrieve, made // options.workers, chosen)
        made = sum(part["rows"] for part in parts)
        rate = sum(part["rows"] / part["seconds"] for part in parts)
        memory.append(sum(part["memory"] for part in parts))
        seconds["counterparts"] = sum(part["cpu"] for part in parts) * rows / made
        extrapolated = "" if made >= rows else f" (extrapolated from {made:,})"
        say(
            f"counterparts by {chosen:,} nouns, {options.workers} workers: {rate:,.0f} rows/s, all rows in "
            f"{rows / rate:.0f} s{extrapolated}; {memory[-1]:.2f} GB together"
        )
    return seconds, max(memory)


def main() -> None:
    """Run both phases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--nouns", type=int, default=120_000)
    parser.add_argument("--phases", nargs="+", choices=["choose", "retrieve"], default=["choose", "retrieve"])
    parser.add_argument("--workers", type=int, default=2, help="that make counterparts")
    parser.add_argument("--measured", type=int, help="rows whose counterparts are made; by default all")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    lines = list[str]()

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(described().replace(" at the end", " at the start") + "; one thread a worker")
    say(f"python benchmarks/counterparts_scale.py {' '.join(sys.argv[1:])}".rstrip() + "\n")
    began = time.perf_counter()
    found = [measure(rows, options, say) for rows in options.rows]
    most = max(memory for _, memory in found)
    say(f"below 3 GB: {most < 3}; {time.perf_counter() - began:.0f} s in all, rows and nouns drawn")
    if len(found) > 1:
        say(f"\n| CPU seconds | {' | '.join(f'{rows:,}' for rows in options.rows)} | exponents |")
        say("|---" * (len(found) + 2) + "|")
        for name in found[0][0]:
            cells = [seconds[name] for seconds, _ in found]
            pairs = pairwise(zip(options.rows, cells, strict=True))
            powers = [math.log(late / early) / math.log(many / few) for (few, early), (many, late) in pairs]
            numbers = " | ".join(f"{cell:.1f}" for cell in cells)
            say(f"| {name} | {numbers} | {', '.join(f'{power:.2f}' for power in powers)} |")
        say(f"| peak of all workers, GB | {' | '.join(f'{memory:.2f}' for _, memory in found)} | |")
    if options.report:
        options.report.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
