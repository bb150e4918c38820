"""Consensus of k-means partitions and of TEMI's heads against the best member that is chosen without labels.

    python benchmarks/consensus.py [--data ../shared/data] [--seeds 3] [--members kmeans temi] [--sets NAME ...]
        [--classifier auto ridge head] [--cache FOLDER]

Claim: over three seeds of each set the consensus is nowhere more than 0.3 points (ACC) below the member of largest
modularity on the graph of 15 neighbours, and above it on average.

Sets, variants and features are those of `defaults.py`; labels only score. Members: 16 partitions of k-means from random
rows on 64 principal components, one start each; or the heads of a TEMI training of the preset `auto` with
16 of them. `mean` and `max` are of the members (the largest is what labels would choose), `best` is the member of
largest modularity, `medoid` that on which the voters agree most, `vote` the vote of the better half, `kept` what the
method keeps. With --cache members are kept in a folder and not made again.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defaults import MIXED, SETS, VARIANTS, Case, make, score
from threadpoolctl import threadpool_limits

from rayclust.clustering.consensus import consensus
from rayclust.methods.consensus import Consensus, kmeans_members
from rayclust.methods.settings import ConsensusConfig
from rayclust.methods.temi_settings import TemiConfig
from rayclust.search.knn import nearest_others
from rayclust.training.loop import fit_arrays

COLUMNS = ("mean", "max", "best", "medoid", "vote", "kept")
BOUND = -0.3


def cached_members(kind: str, case: Case, seed: int, cache: Path | None) -> list[torch.Tensor]:
    """Partitions of a set, Int64[N] each, from a folder where they lie there."""
    file = None if cache is None else cache / kind / f"{case.name.replace('/', '_')}-{seed}.npz"
    if file is not None and file.exists():
        return list(torch.from_numpy(np.load(file)["labels"].astype(np.int64)))
    members = members_of(kind, case, seed)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, labels=torch.stack(members).numpy().astype(np.int16))
    return members


def members_of(kind: str, case: Case, seed: int) -> list[torch.Tensor]:
    """Partitions of a set, Int64[N] each."""
    x = torch.from_numpy(case.x)
    if kind == "kmeans":
        return kmeans_members(x, case.clusters, 16, 1000 * seed)
    config = TemiConfig(clusters=case.clusters, heads=16, keep_heads=True)
    temi = fit_arrays(x, nearest_others(x, min(50, len(x) - 1)), config, seed)
    return list(temi.predict_heads(x))  # type: ignore[operator]


def measured(case: Case, members: list[torch.Tensor], seed: int, classifier: Any) -> tuple[np.ndarray, str]:
    """ACC in % by column, and which the method kept."""
    x = torch.from_numpy(case.x)
    neighbors = nearest_others(x, min(15, len(x) - 1))
    config = ConsensusConfig(clusters=case.clusters, classifier=classifier)
    method = fit_arrays(x, neighbors, config, seed, members=members)
    assert isinstance(method, Consensus)
    found = consensus(members, case.clusters, neighbors.long(), seed)
    each = [score(case, member.numpy())[0] for member in members]
    best = found.voters[0] if found.best is None else found.best
    kept = score(case, method.predict_proba(x).argmax(1).numpy())[0]
    vote = score(case, found.vote.labels.numpy())[0]
    values = np.array([np.mean(each), max(each), each[best], each[found.medoid], vote, kept])
    return values, str(method.report[-1]["candidate"]).removesuffix(", self-training")


def main() -> None:
    """Print a row a set, and the sums of the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--members", nargs="+", choices=("kmeans", "temi"), default=["kmeans"])
    parser.add_argument("--classifier", nargs="+", choices=("auto", "ridge", "head"), default=["auto"])
    parser.add_argument("--cache", type=Path)
    variants = [f"{name}/{variant}" for variant, sets in VARIANTS.items() for name in sets]
    parser.add_argument("--sets", nargs="+", default=[*SETS, *variants, *MIXED])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.machine()}, {arguments.threads} thread, {versions}")
    print("command: python", " ".join(sys.argv))
    for kind, classifier in itertools.product(arguments.members, arguments.classifier):
        print(f"\nMembers: {kind}; classifier: {classifier}. ACC, %, mean of {arguments.seeds} seeds\n")
        print("| set | " + " | ".join(COLUMNS) + " | kept − best, by seed | kept is | seconds |")
        print("|---" * (len(COLUMNS) + 4) + "|", flush=True)
        gains = []
        for name in arguments.sets:
            case, start = make(name, arguments.data), time.perf_counter()
            with threadpool_limits(arguments.threads):
                members = [cached_members(kind, case, seed, arguments.cache) for seed in range(arguments.seeds)]
                found = [measured(case, each, seed, classifier) for seed, each in enumerate(members)]
            values = np.array([values for values, _ in found])
            gain = values[:, -1] - values[:, 2]
            gains.append(gain)
            means = " | ".join(f"{value:.1f}" for value in values.mean(0))
            by_seed, kept = ", ".join(f"{value:+.1f}" for value in gain), ", ".join(which for _, which in found)
            print(f"| {name} | {means} | {by_seed} | {kept} | {time.perf_counter() - start:.0f} |", flush=True)
        each, sets = np.concatenate(gains), np.array([gain.mean() for gain in gains])
        print(
            f"\nkept − best: mean {each.mean():+.2f}; below {BOUND} in {(sets < BOUND).sum()} of {len(sets)} sets, "
            f"worst {sets.min():+.2f}; in {(each < BOUND).sum()} of {len(each)} single fits, worst {each.min():+.1f}"
        )


if __name__ == "__main__":
    main()
