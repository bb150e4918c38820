"""Time of Lloyd's passes: rayclust against scikit-learn and faiss, from the same first centres, on the same threads.

Claim: with several restarts, rayclust takes no longer than either, and reaches the same inertia.

    python benchmarks/kmeans_step.py [--threads 2] [--passes 20] [--repeats 3]

Every library makes the same number of passes from each of the same first centres; each case is timed `repeats` times in
turn and the least time is kept, so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np
import sklearn
import sklearn.cluster
import torch
from threadpoolctl import threadpool_limits

from rayclust.clustering import kmeans
from rayclust.settings import KMeansOptions


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    rows: int
    width: int
    clusters: int
    restarts: int


CASES = (Case(10_000, 1280, 10, 10), Case(20_000, 768, 100, 5), Case(20_000, 768, 1000, 1))


def planted(case: Case) -> np.ndarray:
    """Unit rows near a surface of few dimensions, where clusters overlap: most starts still move after 20 passes."""
    rng = np.random.default_rng(0)
    inner = rng.normal(size=(2 * case.clusters, 12))[rng.integers(2 * case.clusters, size=case.rows)]
    inner += 0.7 * rng.normal(size=inner.shape)
    x = np.tanh(inner @ rng.normal(size=(12, case.width)) / 3) + 0.3 * rng.normal(size=(case.rows, case.width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def ours(x: np.ndarray, inits: np.ndarray, passes: int) -> float:
    """All restarts together; the best inertia."""
    rows = torch.from_numpy(x)
    options = KMeansOptions(
        clusters=inits.shape[1], metric="euclidean", max_iterations=passes, tolerance=0, restarts=len(inits)
    )
    return kmeans.fit(lambda: [rows], options, init=torch.from_numpy(inits)).inertia


def scikit_learn(x: np.ndarray, inits: np.ndarray, passes: int) -> float:
    """One restart after the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fits = [
            sklearn.cluster.KMeans(len(init), init=init, n_init=1, max_iter=passes, tol=0, algorithm="lloyd").fit(x)
            for init in inits
        ]
    return float(min(fit.inertia_ for fit in fits))


def faiss_kmeans(x: np.ndarray, inits: np.ndarray, passes: int) -> float:
    """One restart after the other, on all rows, and the inertia at the last centres as the others give it."""
    inertias = []
    for init in inits:
        model = faiss.Kmeans(
            x.shape[1], len(init), niter=passes, max_points_per_centroid=10**9, min_points_per_centroid=1
        )
        model.train(x, init_centroids=init)
        inertias.append(float(model.index.search(x, 1)[0].sum()))
    return min(inertias)


CONTENDERS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "rayclust": ours, "scikit-learn": scikit_learn, "faiss": faiss_kmeans
}  # fmt: skip


def measure(case: Case, passes: int, repeats: int) -> None:
    """Prints the table of one case."""
    x = planted(case)
    rng = np.random.default_rng(1)
    inits = np.stack([x[rng.choice(case.rows, case.clusters, replace=False)] for _ in range(case.restarts)])
    best, inertia = dict.fromkeys(CONTENDERS, np.inf), dict.fromkeys(CONTENDERS, np.inf)
    for _ in range(repeats):
        for name, contender in CONTENDERS.items():
            start = time.perf_counter()
            inertia[name] = contender(x, inits, passes)
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"\n{case}, {passes} passes")
    for name, seconds in best.items():
        ratio = best["scikit-learn"] / seconds
        print(f"  {name:13} {seconds:7.2f} s   {ratio:5.2f}x scikit-learn's rate   inertia {inertia[name]:.3f}")
    worst = max(inertia.values()) / min(inertia.values()) - 1
    assert worst < 1e-3, f"inertias differ by {worst:.1e}"


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}"
    )
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, faiss {faiss.__version__}")
    with threadpool_limits(arguments.threads):
        for case in CASES:
            measure(case, arguments.passes, arguments.repeats)


if __name__ == "__main__":
    main()
