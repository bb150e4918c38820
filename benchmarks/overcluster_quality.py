"""Many more clusters than classes, on real features: TEMI beside k-means at the same K.

Claim: none is made beforehand; the table says what was reached. Rows are clustered without labels; a map from clusters
to classes is then fitted on one half of the rows and scored on the other, both ways (`held out`). Beside it stands the
published map, fitted on what it scores (`in sample`), which rewards small clusters by themselves.

    python benchmarks/overcluster_quality.py [--clusters 50 200 500] [--seeds 3] [--steps 500] [--sets cifar10 …]
    python benchmarks/overcluster_quality.py --synthetic 1000000 --clusters 25000 --device cuda

Rows are those of temi_accuracy.py. k-means is scikit-learn's, one start per seed, Euclidean on unit rows. TEMI is the
preset `auto`; --steps cuts it short where the hour is dear. --synthetic makes that many rows between a real row and one
of its neighbours, with that row's class.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import sklearn.cluster
import torch
from temi_accuracy import FILES, NEIGHBORS, Case, cases
from temi_step import processor
from threadpoolctl import threadpool_limits

from rayclust.methods.temi import Temi
from rayclust.methods.temi_settings import TemiConfig
from rayclust.metrics import external
from rayclust.search.knn import top_k
from rayclust.training.loop import fit_arrays

COLUMNS = ("accuracy_held_out", "accuracy_in_sample", "purity", "nmi", "occupied")


def drawn_between(found: Case, count: int, seed: int = 0) -> Case:
    """`count` rows between real rows and their ten nearest neighbours, with small noise, and neighbours among them."""
    rng = np.random.default_rng(seed)
    base = rng.integers(len(found.x), size=count)
    other = found.neighbors.numpy()[base, rng.integers(10, size=count)]
    share = rng.random((count, 1), dtype=np.float32)
    x = (1 - share) * found.x[base] + share * found.x[other]
    x += 0.2 / np.sqrt(x.shape[1]) * rng.standard_normal(x.shape, dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, ids = torch.from_numpy(x).to(device), torch.arange(count, device=device)
    parts = [top_k(part, rows, 25, query_ids=some, database_ids=ids)[0].cpu()
             for part, some in zip(rows.split(65_536), ids.split(65_536), strict=True)]  # fmt: skip
    return Case(f"{found.name}, {count:,} drawn", x, found.labels[base], found.clusters, torch.cat(parts))


def kmeans(found: Case, clusters: int, seed: int) -> np.ndarray:
    """scikit-learn's."""
    return sklearn.cluster.KMeans(clusters, n_init=1, random_state=seed).fit_predict(found.x)


def temi(found: Case, clusters: int, seed: int, steps: int | None, device: str) -> np.ndarray:
    """The preset `auto`, at most `steps` long."""
    config = TemiConfig(clusters=clusters)
    resolved = config.resolved(len(found.x), found.x.shape[1])
    if steps is not None and (resolved.steps or steps) > steps:
        config = TemiConfig(clusters=clusters, steps=steps)
    method = fit_arrays(found.x, found.neighbors, config, seed, device)
    assert isinstance(method, Temi)
    with torch.inference_mode():
        blocks = torch.from_numpy(found.x).to(device).split(16_384)
        return torch.cat([method.predict_proba(block).argmax(1) for block in blocks]).cpu().numpy()


def measure(found: Case, method: str, clusters: int, arguments: argparse.Namespace) -> None:
    """Prints a row of the table."""
    scores, seconds = [], []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        start = time.perf_counter()
        labels = (
            kmeans(found, clusters, seed)
            if method == "k-means"
            else temi(found, clusters, seed, arguments.steps, arguments.device)
        )
        seconds.append(time.perf_counter() - start)
        measures = external.halves_accuracy, external.in_sample_accuracy, external.purity, external.nmi
        scores.append([*(100 * measure(found.labels, labels) for measure in measures), len(np.unique(labels))])
    mean, spread = np.mean(scores, axis=0), np.std(scores, axis=0)
    cells = " | ".join(f"{m:.1f}±{s:.1f}" for m, s in zip(mean, spread, strict=True))
    print(f"| {found.name} | {clusters} | {method} | {cells} | {np.mean(seconds):.0f} |", flush=True)


def main() -> None:
    """Measures all sets at all K."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--sets", nargs="+", default=list(FILES)[:2])
    parser.add_argument("--clusters", nargs="+", type=int, default=[50, 200, 500])
    parser.add_argument("--methods", nargs="+", default=["k-means", "TEMI"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--synthetic", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("python " + shlex.join(["benchmarks/overcluster_quality.py", *sys.argv[1:]]))
    print(f"{processor()}; {arguments.threads} threads, Python {platform.python_version()}")
    steps = f"; at most {arguments.steps} steps" if arguments.steps else ""
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}; {arguments.seeds} seeds{steps}\n")
    print("| set | K | method | held out | in sample | purity | NMI | occupied | seconds |\n" + "|---" * 9 + "|")
    with threadpool_limits(arguments.threads):
        for found in cases(arguments.data, arguments.sets):
            rows = drawn_between(found, arguments.synthetic) if arguments.synthetic else found
            for clusters in arguments.clusters:
                for method in arguments.methods:
                    measure(rows, method, clusters, arguments)


if __name__ == "__main__":
    assert NEIGHBORS >= 25
    main()
