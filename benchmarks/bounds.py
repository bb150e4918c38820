"""What labels would buy: bounds and oracles on labelled sets, and the spread of spectral clusters over repeats.

    python benchmarks/bounds.py [--data ../shared/data] [--sets NAME ...] [--methods auto temi] [--repeats 10]

An analysis, no claim. Labels are read here by what is called an oracle or a bound, and by the scores; nothing else sees
them. Accuracy in %, by the best match of clusters and classes:

- k-means: scikit-learn, 10 starts.
- class means: rows go to the class with the nearest mean; in sample, what k-means could at most reach with centres at
  the classes, and on halves, means of one half and rows of the other.
- spectral: mean and deviation over repeats of its k-means on one embedding, as CPP's paper reports it (arXiv
  2306.05272); each repeat keeps the best of its starts.
- right neighbours: share of the 50 nearest others that have a row's class (oracle: all).
- methods: on the nearest others, and on those of the row's own class alone, as TEMI's noise study has it (arXiv
  2303.17896); one seed.

Sets are those of defaults.py, rows centred and of length 1: photographs as features of two MobileNetV2 that were
trained WITH ImageNet labels, and scikit-learn's digits as pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import defaults
import gpu
import numpy as np
import sklearn.cluster
import torch
from threadpoolctl import threadpool_limits

from rayclust.methods.settings import AutoConfig, SpectralConfig
from rayclust.methods.spectral import SpectralClustering
from rayclust.methods.temi_settings import TemiConfig
from rayclust.metrics.external import accuracy
from rayclust.metrics.probes import class_mean_accuracy
from rayclust.search.knn import nearest_others
from rayclust.training.loop import fit_arrays

NEIGHBORS = 50
METHODS: dict[str, type[AutoConfig | TemiConfig]] = {"auto": AutoConfig, "temi": TemiConfig}
SETS = ["imagenette-a", "cifar10-a", "trashnet-a", "natural8-a", "signdigits-a", "scene15-a", "gtsrb20-a", "digits"]


def oracle_neighbors(x: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """Return Int64[N M], the nearest others of each row's own class, nearest first; −1 where a class has fewer."""
    found = torch.full((len(x), NEIGHBORS), -1)
    for label in np.unique(labels):
        rows = torch.from_numpy(np.flatnonzero(labels == label))
        columns = min(NEIGHBORS, len(rows) - 1)
        if columns:
            found[rows, :columns] = rows[nearest_others(x[rows], columns)]
    return found


def right_share(neighbors: torch.Tensor, labels: np.ndarray) -> float:
    """Return the share of neighbours that have their row's class."""
    known = torch.from_numpy(labels)
    return float((known[neighbors] == known[:, None]).double().mean())


def spectral_repeats(x: torch.Tensor, case: defaults.Case, repeats: int) -> np.ndarray:
    """Return the accuracy of each repeat."""
    fitted = fit_arrays(x, None, SpectralConfig(clusters=case.clusters), seed=0)
    assert isinstance(fitted, SpectralClustering)
    found = [fitted.recut(case.clusters, seed).predict_proba(x).argmax(1).numpy() for seed in range(repeats)]
    return np.array([accuracy(case.labels, labels) for labels in found])


def main() -> None:
    """Print a line for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--methods", nargs="+", default=["auto", "temi"], choices=METHODS)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu.report("bounds.py", None, ("torch", "scikit-learn"))
    there = (options.data / defaults.FOLDERS["imagenette"]).is_dir()
    columns = [f"{name}: nearest, oracle" for name in options.methods]
    print(f"\n| set | k-means | class means: in sample, halves | spectral | right neighbours | {' | '.join(columns)} |")
    print("|---" * (5 + len(columns)) + "|", flush=True)
    for name in [name for name in options.sets if there or name.startswith("digits")]:
        case = defaults.make(name, options.data)
        x, labels, K = torch.from_numpy(case.x), case.labels, case.clusters
        with threadpool_limits(1):
            kmeans = sklearn.cluster.KMeans(K, n_init=10, random_state=0).fit_predict(case.x)
        half = np.random.default_rng(1).permutation(len(x)) < len(x) // 2  # defaults.py draws with seed 0
        halves = [class_mean_accuracy(case.x[a], labels[a], case.x[~a], labels[~a]) for a in (half, ~half)]
        bound = class_mean_accuracy(case.x, labels, case.x, labels)
        repeats = spectral_repeats(x, case, options.repeats)
        nearest, oracle = nearest_others(x, min(NEIGHBORS, len(x) - 1)), oracle_neighbors(x, labels)
        cells = [f"{100 * accuracy(labels, kmeans):.1f}", f"{100 * bound:.1f}, {100 * np.mean(halves):.1f}"]
        cells += [
            f"{100 * repeats.mean():.1f} ± {100 * repeats.std():.1f}",
            f"{100 * right_share(nearest, labels):.1f}",
        ]
        for method in options.methods:
            found = [
                fit_arrays(x, neighbors, METHODS[method](clusters=K), seed=0).predict_proba(x).argmax(1).numpy()
                for neighbors in (nearest, oracle)
            ]
            cells.append(", ".join(f"{100 * accuracy(labels, each):.1f}" for each in found))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
