"""Methods on features of one encoder, of two, and on words: ACC and NMI on every set of photographs at hand.

    python benchmarks/words_and_spaces.py [--data ../shared/data] [--seeds 5] [--sets NAME ...] [--methods NAME ...]
        [--results FILE] [--reports FILE ...]

Claims, one thread: TURTLE in both spaces is on average above TURTLE in either, 5 seeds; none of its fits takes more
than 60 s. TAC, which the words guide, is within a point of the published program where that was run, 3 seeds.

Features are of two MobileNetV2 (a and b) that were trained WITH ImageNet labels, centred and of length 1; labels only
score. A method is a function of (features a, features b, words, K, seed) that returns labels, or None where it lacks
something: a set may have no features b. Words are vectors in the space of features a. One line in METHODS adds one.
What is measured is kept in the file of results, and not measured again; `--reports` brings in cells of this script's
earlier reports, with the seeds of those, where nothing was measured. Every number is that of the last step: no step,
head or start is chosen by labels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import sklearn
import torch
from defaults import make
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

import rayclust as rc
from rayclust.clustering.neighborhood import modularity, modularity_terms
from rayclust.features import FeatureTransform
from rayclust.methods.settings import AutoConfig
from rayclust.metrics.external import accuracy, nmi
from rayclust.search.knn import nearest_others
from rayclust.training.loop import fit_arrays
from rayclust.training.sampling import ArrayRows

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


def temi_a(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """TEMI, preset auto, on features a."""
    return rc.TEMI(clusters, random_state=seed, device="cpu").fit_predict(a)


def cpp_a(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """CPP, preset auto, on features a."""
    return rc.CPP(clusters, random_state=seed, device="cpu").fit_predict(a)


def consensus_a(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """The consensus of 16 k-means partitions of features a."""
    return rc.Consensus(clusters, random_state=seed, device="cpu").fit_predict(a)


def auto_a(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """The default method on features a."""
    return rc.Auto(clusters, random_state=seed, device="cpu").fit_predict(a)


def auto_b(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """The default method on features b."""
    return None if b is None else auto_a(b, None, words, clusters, seed)


def auto_ab(a: Rows, b: Rows | None, words: Rows, clusters: int, seed: int) -> Labels | None:
    """The default method on features a and b, as in a run with two encoders."""
    if b is None:
        return None
    x = {"a": torch.from_numpy(a), "b": torch.from_numpy(b)}
    config = AutoConfig(clusters=clusters)
    method = fit_arrays(x, nearest_others(ArrayRows(x).tensor(), config.neighbors), config, seed)
    return method.predict_proba(ArrayRows(x).tensor()).argmax(1).numpy()


METHODS: dict[str, Callable[[Rows, Rows | None, Rows, int, int], Labels | None]] = {
    "k-means a": kmeans_a,
    "k-means b": kmeans_b,
    "k-means a+b": kmeans_ab,
    "TEMI a": temi_a,
    "CPP a": cpp_a,
    "TURTLE a": turtle_a,
    "TURTLE b": turtle_b,
    "TURTLE a+b": turtle_ab,
    "TAC a, no training": tac_free,
    "TAC a": tac_a,
    "consensus a": consensus_a,
    "auto a": auto_a,
    "auto b": auto_b,
    "auto a+b": auto_ab,
}


@dataclass
class Photographs:
    """A set, or a variant of `defaults.py` of one with both encoders."""

    a: Rows
    b: Rows | None
    labels: Labels
    """-1 is not scored."""
    clusters: int


def features(x: Rows) -> Rows:
    """Centred unit rows."""
    return np.asarray(FeatureTransform.fitted(x, center=True, standardize=False, normalize=True)(x))


def photographs(name: str, data: Path) -> Photographs | None:
    """The set of that name, None where it is absent."""
    base, _, variant = name.partition("/")
    folder = data / FOLDERS[base]
    if not folder.exists():
        return None
    if variant:
        case = make(f"{base}-ab/{variant}", data)
        a, b = np.split(case.x, 2, axis=1)
        return Photographs(features(a), features(b), case.labels, case.clusters)
    labels = np.load(folder / "labels.npy").astype(np.int64)
    files = (folder / f"features_mnv2{encoder}_f16.npy" for encoder in "ab")
    a, b = (features(np.load(file).astype(np.float32)) if file.exists() else None for file in files)
    return Photographs(a, b, labels, len(np.unique(labels)))


def measure(arguments: argparse.Namespace) -> None:
    """Measure what the file of results lacks: a line for each set, method and seed.

    It has ACC, NMI, CPU seconds, and what `auto` takes for evidence: the modularity and the share of neighbour pairs
    that are kept together, on the graph of all spaces.
    """
    words = np.stack(pq.read_table(arguments.data / WORDS)["embedding"].to_numpy()).astype(np.float32)
    known = read(arguments.results)
    for name in arguments.sets:
        wanted = itertools.product(arguments.methods, range(arguments.seeds))
        missing = [(method, seed) for method, seed in wanted if (name, method, seed) not in known]
        of = photographs(name, arguments.data) if missing else None
        if of is None:
            continue
        scored = of.labels >= 0
        near = nearest_others(torch.from_numpy(of.a if of.b is None else np.hstack([of.a, of.b])), 10)
        for method, seed in missing:
            start = time.process_time()
            labels, scores = METHODS[method](of.a, of.b, words, of.clusters, seed), None
            seconds = time.process_time() - start
            if labels is not None:
                pair = of.labels[scored], np.asarray(labels)[scored]
                scores = (100 * accuracy(*pair), 100 * nmi(*pair))
            kept = None if labels is None else kept_on(near, torch.from_numpy(np.asarray(labels)).long())
            with arguments.results.open("a") as file:
                file.write(json.dumps([[name, method, seed], scores, seconds, kept]) + "\n")


def kept_on(near: Tensor, labels: Tensor) -> tuple[float, float]:
    """Modularity of a partition on a graph of neighbours, and the share of its pairs that are kept together."""
    terms = modularity_terms(labels[None], labels[near][None], int(labels.max()) + 1)
    return float(modularity(terms)[0]), float(terms[0, -2] / terms[0, -1])


def read(results: Path) -> dict[tuple[str, str, int], tuple[list[float] | None, float]]:
    """Scores and seconds of what was measured so far, by set, method and seed."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {tuple(key): (scores, seconds) for key, scores, seconds, *_ in map(json.loads, lines)}


def evidence_table(results: Path, sets: list[str]) -> None:
    """Print the mean evidence of each method on each set."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for (name, method, _), _, _, *kept in map(json.loads, results.read_text().splitlines()):
        if kept and kept[0]:
            found.setdefault((name, method), []).append(kept[0])
    print("\nModularity / share of neighbour pairs kept, on the graph of a and b\n")
    print(f"| method | {' | '.join(sets)} |\n|---{'|---' * len(sets)}|")
    for method in [method for method in METHODS if any((name, method) in found for name in sets)]:
        means = [np.mean(found[name, method], axis=0) if (name, method) in found else None for name in sets]
        cells = ["–" if mean is None else "{:.3f} / {:.3f}".format(*mean) for mean in means]
        print(f"| {method} | {' | '.join(cells)} |")


def gains_table(results: Path, sets: list[str], better: str) -> None:
    """Print by how much a method is above each other that was measured, in points of ACC / NMI, and the sums."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for (name, method, _), scores, *_ in map(json.loads, results.read_text().splitlines()):
        if scores is not None and name in sets:
            found.setdefault((method, name), []).append(scores)
    others = [method for method in METHODS if method != better and all((method, name) in found for name in sets)]
    print(f"\n| {better}, above | {' | '.join(others)} |\n|---{'|---' * len(others)}|")
    gains = np.array([[np.mean(found[better, n], 0) - np.mean(found[o, n], 0) for o in others] for n in sets])
    for name, row in zip(sets, gains, strict=True):
        print(f"| {name} | {' | '.join('{:+.1f} / {:+.1f}'.format(*each) for each in row)} |")
    for title, sums, form in (
        ("mean", gains.mean(0), "{:+.2f} / {:+.2f}"),
        ("worst", gains.min(0), "{:+.1f} / {:+.1f}"),
        ("below -0.5", (gains < -0.5).sum(0), "{} / {}"),
    ):
        print(f"| {title} | {' | '.join(form.format(*each) for each in sums)} |")


def earlier(reports: list[Path]) -> dict[tuple[str, str], str]:
    """The cells of earlier reports, by set and method: tables with sets as rows or with methods as rows."""
    found, head = dict[tuple[str, str], str](), list[str]()
    for line in (line for report in reports for line in report.read_text().splitlines() if line.startswith("| ")):
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if first in ("set", "method"):
            head = [first, *cells]
            continue
        for other, cell in zip(head[1:], cells, strict=True):
            key = (first, other) if head[0] == "set" else (other, first)
            if "±" in cell:
                found[key] = cell
    return found


def cell_of(runs: list[tuple[list[float] | None, float]]) -> str:
    """Mean ± deviation of ACC and NMI, and mean seconds."""
    scores = np.array([scores for scores, _ in runs if scores is not None])
    if not len(scores):
        return "–"
    (acc, other), (acc_off, other_off) = scores.mean(0), scores.std(0)
    return f"{acc:.1f}±{acc_off:.1f} / {other:.1f}±{other_off:.1f}, {np.mean([each for _, each in runs]):.1f} s"


def main() -> None:
    """Measure, then print the table, methods as rows, with the means over the sets that have every method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--results", type=Path, default=Path("words_and_spaces.jsonl"), help="kept between calls")
    parser.add_argument("--reports", type=Path, nargs="*", default=[], help="earlier reports of this script")
    parser.add_argument("--gains", choices=METHODS, help="also by how much this one is above each other, set by set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", default=list(FOLDERS), help="or SET/VARIANT, as in defaults.py")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(arguments)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, scikit-learn", end=" ")
    print(f"{sklearn.__version__}; {arguments.seeds} seeds; ACC / NMI, %, mean ± deviation; CPU seconds of a fit\n")
    known, cells = read(arguments.results), earlier(arguments.reports)
    for name, method in itertools.product(arguments.sets, METHODS):
        runs = [known[name, method, seed] for seed in range(arguments.seeds) if (name, method, seed) in known]
        if runs:
            few = f", {len(runs)} seed{'s' if len(runs) > 1 else ''}" if len(runs) < arguments.seeds else ""
            cells[name, method] = cell_of(runs) + few
    shown = [method for method in METHODS if any((name, method) in cells for name in arguments.sets)]
    numbers = {key: [float(x) for x in re.findall(r"([\d.]+)±", cell)] for key, cell in cells.items() if "±" in cell}
    whole = [name for name in arguments.sets if all((name, method) in numbers for method in shown)]
    print(f"| method | {' | '.join(arguments.sets)} | mean of {', '.join(whole)} |")
    print(f"|---{'|---' * (len(arguments.sets) + 1)}|")
    for method in shown:
        row = [cells.get((name, method), "–") for name in arguments.sets]
        means = np.mean([numbers[name, method] for name in whole], axis=0) if whole else []
        print(f"| {' | '.join([method, *row, ' / '.join(f'{mean:.1f}' for mean in means)])} |")
    if arguments.results.exists():
        evidence_table(arguments.results, arguments.sets)
    if arguments.gains:
        gains_table(arguments.results, arguments.sets, arguments.gains)


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
