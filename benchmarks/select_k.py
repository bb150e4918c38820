"""The number of clusters that `clusters: auto` finds, by each criterion and by vote, against the true number.

Claim: on at least three of the four real sets the vote lies within a factor 1.3 of the number of classes.

    python benchmarks/select_k.py [--data ../shared/data] [--sets NAME ...]

Candidates, seeds and rounds are those of `select_k`'s defaults, partitions those of k-means (of spectral clustering of
|cosines| for `subspaces-K`), neighbours the 50 nearest. Rows are minus their mean (not with `/raw`) and of length 1;
labels only score. Sets: imagenette-a, imagenette-b, cifar10 (below --data), digits, with the variants of
`temi_accuracy.py`; those of --data/zoo, at which nobody had looked when the vote was put together; planted-K: Gaussian
clusters that nearly touch; subspaces-K: noisy four-dimensional subspaces.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from defaults import ZOO, load
from sklearn.datasets import load_digits
from temi_accuracy import FILES, planted, varied
from threadpoolctl import threadpool_limits

from rayclust.clustering import kmeans
from rayclust.clustering.spectral import partition
from rayclust.config import SelectKConfig
from rayclust.features import FeatureTransform
from rayclust.metrics.internal import measure
from rayclust.metrics.nulls import null_silhouettes
from rayclust.metrics.selection import CRITERIA, Choice, choose, geometric_grid, refine
from rayclust.search.knn import top_k
from rayclust.settings import KMeansOptions, SpectralOptions

NEIGHBORS = 50
ZOO_SETS = [f"{name}-{encoder}" for name in ZOO for encoder in "ab"]
SETS = [
    "imagenette-a", "imagenette-b", "cifar10", "digits", "imagenette-a/raw", "cifar10/raw", "imagenette-b/uneven",
    "digits/uneven", "imagenette-b/five", "digits/five", "cifar10/five", "planted-3", "planted-10", "planted-30",
    "planted-100", "planted-20/uneven", "subspaces-3", "subspaces-12", "subspaces-40",
    *ZOO_SETS,
]  # fmt: skip
ABSENT = ("feature_coding_length", "resampled_silhouette", "umap_silhouette")
Partitions = Callable[[int], list[np.ndarray]]


def subspaces(clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows, 60 of each subspace, and which."""
    rng = np.random.default_rng(clusters)
    labels = rng.permutation(np.repeat(np.arange(clusters), max(60, 400 // clusters)))
    bases = np.linalg.qr(rng.normal(size=(clusters, 64, 4)))[0]
    x = np.einsum("nr,ndr->nd", rng.normal(size=(len(labels), 4)), bases[labels])
    x = x / np.linalg.norm(x, axis=1, keepdims=True) + 0.5 * rng.normal(size=(len(labels), 64)) / 8.0
    return x.astype(np.float32), labels


def rows_of(name: str, data: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows as they come, and their classes; None where a file is absent."""
    base, _, variant = name.partition("/")
    if base in FILES:
        if not (data / FILES[base][0]).exists():
            return None
        x, labels = (np.load(data / file) for file in FILES[base])
        return varied(x.astype(np.float32), labels.astype(np.int64), variant)[:2]
    if base in ZOO_SETS:
        return varied(*load(base, data), variant)[:2] if (data / "zoo").exists() else None
    if base == "digits":
        digits = load_digits()
        return varied(digits.data.astype(np.float32), digits.target, variant)[:2]
    kind, _, clusters = base.partition("-")
    x, labels = subspaces(int(clusters)) if kind == "subspaces" else planted(int(clusters))[:2]
    return varied(x, labels, variant)[:2]


def by_kmeans(x: torch.Tensor, seeds: int) -> Partitions:
    """Labels for each seed."""

    def labels(k: int) -> list[np.ndarray]:
        options = KMeansOptions(clusters=k, restarts=3)
        found = (kmeans.fit(lambda: [x], options, seed=seed).centers for seed in range(seeds))
        return [kmeans.assign(x, centers)[0].numpy() for centers in found]

    return labels


def search(x: np.ndarray, own_space: bool) -> tuple[Choice, int]:
    """What select-k does: a grid, then rounds of refinement; and how many candidates that took."""
    options, rows, ids = SelectKConfig(candidates="auto"), torch.from_numpy(x), torch.arange(len(x))
    neighbors = top_k(rows, rows, min(NEIGHBORS, len(x) - 1), query_ids=ids, database_ids=ids)[0].numpy()
    partitions = by_kmeans(rows, options.seeds)
    spectrum = (
        partition(lambda: [rows], options.bounds(len(x))[1], SpectralOptions(temperature=0.1)) if own_space else None
    )
    tried: dict[int, dict[str, float]] = {}
    wanted = geometric_grid(*options.bounds(len(x)))
    for _ in range(1 + options.rounds):
        for k in wanted:
            if spectrum is None:
                tried[k] = measure(x, partitions(k), neighbors) | null_silhouettes(x, k)
            else:
                cuts = [spectrum.labels(k, seed).numpy() for seed in range(options.seeds)]
                tried[k] = measure(x, cuts, neighbors) | {"eigengap": spectrum.eigengap(k)} | null_silhouettes(x, k)
        choice = choose(tried)
        wanted = refine(list(tried), choice.k)
    return choice, len(tried)


def main() -> None:
    """Prints one row a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    names = [name for name in (*CRITERIA, "knee", "merge") if name not in ABSENT]
    print("command: python", " ".join(sys.argv), "; in brackets the evidence, the weight of a vote")
    print(f"\n| set (N, D) | true K | vote | factor | {' | '.join(names)} | tried | seconds |")
    print(f"|{'---|' * (len(names) + 6)}")
    with threadpool_limits(arguments.threads):
        for name in arguments.sets:
            found = rows_of(name, arguments.data)
            if found is None:
                continue
            x, labels = found
            start, own_space = time.perf_counter(), name.startswith("subspaces")
            center = not own_space and not name.endswith("/raw")
            x = FeatureTransform.fitted(x, center=center, standardize=False, normalize=True)(x)
            choice, tried = search(x, own_space)
            true = len(np.unique(labels))
            factor = math.exp(abs(math.log(choice.k / true)))
            cells = [f"{name} ({len(x):,}, {x.shape[1]})", str(true), f"**{choice.k}**", f"{factor:.2f}"]
            said = {n: f" ({w:.2f})" for n, w in choice.evidence.items() if CRITERIA[n].votes}
            cells += [f"{choice.picks[n]}{said.get(n, '')}" if n in choice.picks else "–" for n in names]
            print(f"| {' | '.join([*cells, str(tried), f'{time.perf_counter() - start:.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
