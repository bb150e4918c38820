"""Methods on features of one encoder, of two, and on words: ACC and NMI on every set of photographs at hand.

    python benchmarks/words_and_spaces.py [--data ../shared/data] [--seeds 5] [--sets NAME ...] [--methods NAME ...]
        [--results FILE]

Claims, one thread: TURTLE in both spaces is on average above TURTLE in either, 5 seeds; none of its fits takes more
than 60 s. TAC, which the words guide, is within a point of the published program where that was run, 3 seeds.

Features are of two MobileNetV2 (a and b) that were trained WITH ImageNet labels, centred and of length 1; labels only
score. A method is a function of (features a, features b, words, K, seed) that returns labels, or None where it lacks
something: a set may have no features b. Words are vectors in the space of features a. One line in METHODS adds one.
What is measured is kept in the file of results, and not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

import rayclust as rc
from rayclust.features import FeatureTransform
from rayclust.metrics.external import accuracy, nmi

FOLDERS = {
    "imagenette": "imagenette_val3k",
    "cifar10": "cifar10_test",
    **{name: f"zoo/{name}" for name in ("trashnet", "natural8", "signdigits", "scene15", "gtsrb20")},
}
WORDS = "vocab/synsets_a.parquet"
Rows = NDArray[np.float32]
Labels = NDArray[np.integer]


def kmeans_a(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """k-means of features a, scikit-learn's with 10 starts."""
    return KMeans(clusters, n_init=10, random_state=seed).fit_predict(a)


def kmeans_b(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """k-means of features b."""
    return None if b is None else kmeans_a(b, None, words, clusters, seed)


def kmeans_ab(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """k-means of features a and b side by side."""
    return None if b is None else kmeans_a(np.concatenate([a, b], axis=1), None, words, clusters, seed)


def turtle_a(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """TURTLE, preset auto, in the space of features a."""
    return rc.TURTLE(clusters, random_state=seed, device="cpu").fit_predict(a)


def turtle_b(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """TURTLE in the space of features b."""
    return None if b is None else turtle_a(b, None, words, clusters, seed)


def turtle_ab(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """TURTLE in both spaces."""
    return None if b is None else rc.TURTLE(clusters, random_state=seed, device="cpu").fit_predict([a, b])


def tac_free(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """TAC without training: k-means of features a beside their counterparts in words."""
    return rc.TAC(clusters, words=words, train=False, random_state=seed, device="cpu").fit_predict(a)


def tac_a(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """TAC, preset auto, on features a and words."""
    return rc.TAC(clusters, words=words, random_state=seed, device="cpu").fit_predict(a)


METHODS: dict[str, Callable[[Rows, Rows | None, Rows, int, int], Labels | None]] = {
    "k-means a": kmeans_a,
    "k-means b": kmeans_b,
    "k-means a+b": kmeans_ab,
    "TURTLE a": turtle_a,
    "TURTLE b": turtle_b,
    "TURTLE a+b": turtle_ab,
    "TAC a, no training": tac_free,
    "TAC a": tac_a,
}


def features(path: Path) -> Rows | None:
    """Centred unit rows from a file of features, None where there is none."""
    if not path.exists():
        return None
    x = np.load(path).astype(np.float32)
    return np.asarray(FeatureTransform.fitted(x, center=True, standardize=False, normalize=True)(x))


def measure(arguments: argparse.Namespace) -> None:
    """Measure what the file of results lacks: a line for each set, method and seed, with ACC, NMI and CPU seconds."""
    words = np.stack(pq.read_table(arguments.data / WORDS)["embedding"].to_numpy()).astype(np.float32)
    known = read(arguments.results)
    for name in arguments.sets:
        folder = arguments.data / FOLDERS[name]
        labels_true = np.load(folder / "labels.npy").astype(np.int64)
        a, b = (features(folder / f"features_mnv2{encoder}_f16.npy") for encoder in "ab")
        for method, seed in itertools.product(arguments.methods, range(arguments.seeds)):
            if a is None or (name, method, seed) in known:
                continue
            start = time.process_time()
            labels = METHODS[method](a, b, words, len(np.unique(labels_true)), seed)
            seconds = time.process_time() - start
            scores = None if labels is None else (100 * accuracy(labels_true, labels), 100 * nmi(labels_true, labels))
            with arguments.results.open("a") as file:
                file.write(json.dumps([[name, method, seed], scores, seconds]) + "\n")


def read(results: Path) -> dict[tuple[str, str, int], tuple[list[float] | None, float]]:
    """What was measured so far, by set, method and seed."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {tuple(key): (scores, seconds) for key, scores, seconds in map(json.loads, lines)}


def main() -> None:
    """Measure, then print the table and the means over sets that have all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--results", type=Path, default=Path("words_and_spaces.jsonl"), help="kept between calls")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(arguments)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, scikit-learn", end=" ")
    print(f"{sklearn.__version__}; {arguments.seeds} seeds; ACC / NMI, %, mean ± deviation; CPU seconds of a fit\n")
    print(f"| set | {' | '.join(arguments.methods)} |\n|---{'|---' * len(arguments.methods)}|")
    known, complete = read(arguments.results), []
    for name in arguments.sets:
        cells, means = list[str](), list[NDArray[np.floating]]()
        for method in arguments.methods:
            runs = [known[name, method, seed] for seed in range(arguments.seeds) if (name, method, seed) in known]
            scores = np.array([found for found, _ in runs if found is not None])
            if not len(scores):
                cells.append("–")
                continue
            means.append(scores.mean(0))
            (acc, other), (acc_off, other_off) = scores.mean(0), scores.std(0)
            seconds = np.mean([seconds for _, seconds in runs])
            cells.append(f"{acc:.1f}±{acc_off:.1f} / {other:.1f}±{other_off:.1f}, {seconds:.1f} s")
        if len(means) == len(arguments.methods):
            complete.append(means)
        print(f"| {name} | {' | '.join(cells)} |")
    if complete:
        cells = [f"{acc:.1f} / {other:.1f}" for acc, other in np.mean(complete, axis=0)]
        print(f"| mean of {len(complete)} sets with all | {' | '.join(cells)} |")


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
