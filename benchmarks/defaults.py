"""The default method on many sets and variants: gain over scikit-learn's k-means, for each candidate and for `auto`.

    python benchmarks/defaults.py [--data ../shared/data] [--seeds 3] [--threads 1] [--sets NAME ...]
        [--budget SECONDS] [--held-out [SEED]] [--results FOLDER] [--trained temi cpp]

Claims, 3 seeds, CPU: `auto` is nowhere more than 0.5 points (ACC, NMI) below scikit-learn's k-means (10 starts,
Euclidean, centred unit rows); its mean gain is at least 2 points; 3,000 x 1280 rows, K = 10 take 40 s at most.

Rows are centred and of length 1; labels only score. Sets: photographs as features of two MobileNetV2 that were trained
WITH ImageNet labels (a and b; imagenette's classes are among those labels), and scikit-learn's digits as pixels. A
variant follows a slash: tailR (largest class : smallest = R), subC (C classes), kxF (F times the number of classes is
asked for), out (5 % rows of another set, not scored), dup (half as many rows again, copied), nN (N rows); mixed-I draws
3 to 20 classes from all sets with one encoder, 60 to 250 rows of the largest, up to 10 : 1. Sets below --data are left
out where they are absent.

What `auto` does was found by a person on SETS, VARIANTS and the first 16 mixtures. With `--held-out` it is measured on
other variants and 32 other mixtures instead, at which nobody had looked when it was found; `--held-out SEED` draws
further variants and mixtures, so that each change can be measured on sets that are new to it.

The bounds of `clustering.candidates.choose`, those for few rows and other clusters apart, are settings that a table of
scores could choose. The column `auto` has them as they stand in the code; in `auto, left out` those of each set and all
its variants are chosen from a grid on the other sets alone. `nothing trained` is `auto` with `budget: 0`, which
`--budget 0` measures alone, `trained heads` without the learnt space, `chosen by labels` the best of each fit's
candidates. `--trained` adds the presets `auto` of methods that are trained by gradient. Claim: none is more than 3
points below scikit-learn's k-means.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import pickle
import platform
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import sklearn
import sklearn.cluster
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

from rayclust.clustering.candidates import FEW_ROWS, HEADS, LEARNT, Bounds, Candidate, choose
from rayclust.features import FeatureTransform
from rayclust.methods.auto import Auto
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.settings import AutoConfig
from rayclust.methods.temi_settings import TemiConfig
from rayclust.metrics.external import accuracy, nmi
from rayclust.search.knn import top_k
from rayclust.training.loop import fit_arrays

FOLDERS = {"imagenette": "imagenette_val3k", "cifar10": "cifar10_test"}
ZOO = ("trashnet", "natural8", "signdigits", "scene15", "gtsrb20")
SETS = ["imagenette-a", "imagenette-b", "cifar10-a", *(f"{name}-{v}" for name in ZOO for v in "ab"), "digits"]
VARIANTS = {
    "tail3": ["imagenette-a", "natural8-a", "scene15-b"],
    "tail10": ["imagenette-b", "natural8-b", "signdigits-b", "digits", "cifar10-a"],
    "tail30": ["imagenette-a", "natural8-a"],
    "sub3": ["imagenette-a", "natural8-a", "trashnet-a"],
    "sub5": ["imagenette-b", "natural8-b", "scene15-a", "digits"],
    "sub7": ["gtsrb20-b"],
    "sub4": ["signdigits-a"],
    "kx1.5": ["imagenette-a", "natural8-b", "scene15-b"],
    "kx0.67": ["imagenette-b", "trashnet-b", "signdigits-b"],
    "out": ["imagenette-a", "natural8-b", "trashnet-a"],
    "dup": ["imagenette-a", "signdigits-b"],
    "n300": ["imagenette-a", "natural8-a", "digits", "scene15-a"],
    "n500": ["cifar10-a"],
}
"""Sets by variant."""
MIXED = [f"mixed-{number}" for number in range(16)]
MOST_ROWS = 3_000
HELD_OUT_VARIANTS = {
    "tail3": ["trashnet-b"],
    "tail10": ["trashnet-a", "scene15-a"],
    "tail30": ["signdigits-a"],
    "sub4": ["trashnet-b"],
    "sub5": ["natural8-a", "cifar10-a"],
    "sub6": ["gtsrb20-a"],
    "sub7": ["imagenette-a", "signdigits-b"],
    "sub8": ["scene15-b"],
    "kx0.67": ["gtsrb20-a"],
    "kx1.5": ["cifar10-a", "trashnet-a", "signdigits-a"],
    "out": ["imagenette-b", "scene15-a"],
    "dup": ["natural8-a"],
    "n300": ["trashnet-b", "natural8-b", "imagenette-b"],
    "n500": ["signdigits-a"],
}
HELD_OUT = [
    *(f"{name}/{variant}" for variant, sets in HELD_OUT_VARIANTS.items() for name in sets),
    *(f"mixed-{number}" for number in range(16, 48)),
]
CLASSES = {
    "imagenette": 10,
    "cifar10": 10,
    "trashnet": 6,
    "natural8": 8,
    "signdigits": 10,
    "scene15": 15,
    "gtsrb20": 20,
    "digits": 10,
}
DRAWN_KINDS = (
    *("tail3", "tail10", "tail30", "sub3", "sub4", "sub5", "sub6", "sub7", "sub8"),
    *("kx0.67", "kx1.5", "out", "dup", "n300", "n500", "n700"),
)
DRAWN_MIXTURES = 24
GRID = [Bounds(*each) for each in itertools.product((-0.005, 0.0, 0.005, 0.01), (-0.01, 0.0, 0.01, 0.03), (0.05, 0.1))]
TRAINED_GRIDS = {
    HEADS: [Bounds(*each) for each in itertools.product((0.0, 0.005, 0.01), (-0.003, 0.0, 0.01))],
    LEARNT: [Bounds(*each) for each in itertools.product((0.0, 0.005, 0.01, 0.02), (-0.03, -0.02, -0.015, -0.01, 0.0))],
}
BOUND = -0.5
TRAINED: dict[str, type[TemiConfig | CppConfig]] = {"temi": TemiConfig, "cpp": CppConfig}


def drawn(seed: int) -> list[str]:
    """Two variants of each kind and mixtures that a seed above 0 draws, none of them among those above."""
    rng = np.random.default_rng(seed)
    tables = (VARIANTS, HELD_OUT_VARIANTS)
    known = {f"{name}/{kind}" for table in tables for kind, sets in table.items() for name in sets}
    names: list[str] = []
    for kind in DRAWN_KINDS:
        least = int(kind[3:]) if kind.startswith("sub") else 0
        fitting = [n for n in SETS if CLASSES[n.partition("-")[0]] > least and (kind, n) != ("out", "digits")]
        names += [f"{n}/{kind}" for n in rng.permutation(fitting) if f"{n}/{kind}" not in known][:2]
    first = 48 + DRAWN_MIXTURES * (seed - 1)
    return [*names, *(f"mixed-{number}" for number in range(first, first + DRAWN_MIXTURES))]


@dataclass
class Case:
    """Rows as methods see them, and the classes that score them."""

    name: str
    x: np.ndarray
    labels: np.ndarray
    """-1 is not scored."""
    clusters: int
    runs: list[tuple[np.ndarray, list[tuple[Candidate, np.ndarray]], float]] = field(default_factory=list)
    """By seed: the baseline's scores, each candidate with its scores, CPU seconds of `auto`."""

    @property
    def group(self) -> str:
        """The set of which it is a variant, with either encoder; mixed cases are of all sets and left out together."""
        return self.name.partition("/")[0].partition("-")[0]


def load(name: str, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a set; of both encoders side by side where it ends in -ab."""
    base, _, encoders = name.partition("-")
    if base == "digits":
        digits = load_digits()
        return digits.data.astype(np.float32), digits.target.astype(np.int64)
    folder = data / FOLDERS.get(base, f"zoo/{base}")
    x = np.concatenate([np.load(folder / f"features_mnv2{each}_f16.npy") for each in encoders], axis=1)
    labels = np.load(folder / "labels.npy")
    chosen = np.random.default_rng(0).permutation(len(x))[:MOST_ROWS]
    return x[chosen].astype(np.float32), labels[chosen].astype(np.int64)


def tail(labels: np.ndarray, classes: np.ndarray, ratio: float, most: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of some classes, fewer from class to class down to most / ratio, at least 5."""
    sizes = np.maximum(5, (most * ratio ** -np.linspace(0, 1, len(classes))).round().astype(int))
    return np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, sizes, strict=True)]
    )


def make(name: str, data: Path) -> Case:
    """The set or variant of that name."""
    rng, (base, _, variant) = np.random.default_rng(zlib.crc32(name.encode())), name.partition("/")
    if base.startswith("mixed"):
        encoder = "ab"[int(base.partition("-")[2]) % 2]
        parts = [
            load(f"{s}-{encoder}", data)
            for s in (("imagenette", *ZOO) if encoder == "b" else ("imagenette", "cifar10", *ZOO))
        ]
        offsets = np.cumsum([0] + [int(labels.max()) + 1 for _, labels in parts])
        x = np.concatenate([rows for rows, _ in parts])
        labels = np.concatenate([labels + offset for (_, labels), offset in zip(parts, offsets, strict=False)])
        classes = rng.permutation(np.unique(labels))[: int(rng.integers(3, 21))]
        rows = tail(labels, classes, float(rng.choice([1, 2.4, 5, 10])), int(rng.choice([60, 120, 250])), rng)
        x, labels = x[rows], np.unique(labels[rows], return_inverse=True)[1]
    else:
        x, labels = load(base, data)
    clusters = len(np.unique(labels))
    classes = rng.permutation(np.unique(labels))
    if variant.startswith("tail"):
        rows = tail(labels, classes, float(variant[4:]), int(np.bincount(labels).max()), rng)
        x, labels = x[rows], labels[rows]
    elif variant.startswith("sub"):
        clusters = int(variant[3:])
        kept = np.isin(labels, classes[:clusters])
        x, labels = x[kept], labels[kept]
    elif variant.startswith("kx"):
        clusters = max(2, round(clusters * float(variant[2:])))
    elif variant == "out":
        other = load(("natural8" if base.startswith("signdigits") else "signdigits") + base[base.index("-") :], data)[0]
        x = np.concatenate([x, other[rng.permutation(len(other))[: len(x) // 20]]])
        labels = np.concatenate([labels, np.full(len(x) - len(labels), -1)])
    elif variant == "dup":
        rows = np.concatenate([np.arange(len(x)), rng.integers(0, len(x) // 4, len(x) // 2)])
        x, labels = x[rows], labels[rows]
    elif variant.startswith("n"):
        rows = rng.permutation(len(x))[: int(variant[1:])]
        x, labels = x[rows], labels[rows]
    x = FeatureTransform.fitted(x, center=True, standardize=False, normalize=True)(x)
    return Case(name, x.astype(np.float32), labels, clusters)


def score(case: Case, labels: np.ndarray) -> np.ndarray:
    """ACC and NMI in % of the rows that have a class."""
    known = case.labels >= 0
    return np.array([100 * float(measure(case.labels[known], labels[known])) for measure in (accuracy, nmi)])


def graph(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Nearest neighbours by cosine."""
    ids = torch.arange(len(x))
    return top_k(x, x, columns, query_ids=ids, database_ids=ids)[0].long()


def run(case: Case, seed: int, budget: float) -> None:
    """Add a seed's scores to the case."""
    baseline = sklearn.cluster.KMeans(case.clusters, n_init=10, random_state=seed).fit_predict(case.x)
    start = time.process_time()
    config, x = AutoConfig(clusters=case.clusters, budget=budget), torch.from_numpy(case.x)
    method = fit_arrays(x, graph(x, config.neighbors), config, seed)
    assert isinstance(method, Auto)
    seconds = time.process_time() - start
    scored = [(candidate, score(case, candidate.labels.numpy())) for candidate in method.candidates]
    case.runs.append((score(case, baseline), scored, seconds))


def measured(name: str, data: Path, seeds: int, threads: int, budget: float, results: Path | None) -> Case:
    """The case of that name with the scores of all seeds; those that the folder of results has are not taken again."""
    torch.set_num_threads(threads)
    case, kept = make(name, data), None if results is None else results / f"{name.replace('/', '_')}.pickle"
    if kept is not None and kept.exists():
        case.runs = pickle.loads(kept.read_bytes())  # noqa: S301 - what this script wrote
    with threadpool_limits(threads):
        for seed in range(len(case.runs), seeds):
            run(case, seed, budget)
            if kept is not None:
                kept.write_bytes(pickle.dumps(case.runs))
    print(f"{name} done", file=sys.stderr, flush=True)
    return case


def untrained(candidates: list[Candidate]) -> list[Candidate]:
    """Those that need no training."""
    return [candidate for candidate in candidates if candidate.name not in TRAINED_GRIDS]


def without_space(candidates: list[Candidate]) -> list[Candidate]:
    """Those before the learnt space."""
    return [candidate for candidate in candidates if candidate.name != LEARNT]


def limited(candidates: list[Candidate], bounds: Bounds | None) -> dict[str, Bounds]:
    """Bounds for what needs no training; few rows have their own."""
    few = len(candidates[0].labels) < FEW_ROWS
    return {} if few or bounds is None else {candidate.name: bounds for candidate in untrained(candidates)}


def gain(case: Case, pick: Callable[[list[Candidate]], Candidate]) -> np.ndarray:
    """Mean over seeds of the gain in ACC and NMI of the candidates that `pick` picks."""
    gains = []
    for baseline, scored, _ in case.runs:
        picked = pick([candidate for candidate, _ in scored])
        gains += [scores - baseline for candidate, scores in scored if candidate is picked]
    return np.mean(gains, axis=0)


def best_gain(case: Case) -> np.ndarray:
    """Mean over seeds of the gain of the candidate that the labels would choose, by ACC and NMI together."""
    return np.mean([max((s - base for _, s in scored), key=np.sum) for base, scored, _ in case.runs], axis=0)


def kept_scores(scored: list[tuple[Candidate, np.ndarray]]) -> np.ndarray:
    """Scores of the candidate that `auto` keeps."""
    kept = choose([candidate for candidate, _ in scored])
    return next(scores for candidate, scores in scored if candidate is kept)


def left_out(cases: list[Case], grid: list[Bounds], pick: Callable[..., Candidate]) -> dict[str, Bounds]:
    """Bounds for each group of sets, chosen on all others: most gain, each point below -0.5 counting five times."""
    table = {bounds: np.array([gain(case, lambda c, b=bounds: pick(c, b)) for case in cases]) for bounds in grid}
    groups = np.array([case.group for case in cases])

    def worth(gains: np.ndarray) -> float:
        return float(gains.mean() + 5 * np.minimum(gains - BOUND, 0).mean())

    if len(set(groups)) == 1:
        return {}
    return {group: max(grid, key=lambda b: worth(table[b][groups != group])) for group in dict.fromkeys(groups)}


def report(cases: list[Case]) -> None:
    """The table of gains, and its summary."""
    bounds = left_out(cases, GRID, lambda c, b: choose(untrained(c), limited(c, b)))
    heads = left_out(cases, TRAINED_GRIDS[HEADS], lambda c, b: choose(without_space(c), {HEADS: b}))
    space = left_out(cases, TRAINED_GRIDS[LEARNT], lambda c, b: choose(c, {LEARNT: b}))

    def elsewhere(case: Case, candidates: list[Candidate]) -> Candidate:
        trained = {HEADS: heads.get(case.group), LEARNT: space.get(case.group)}
        known = {name: bound for name, bound in trained.items() if bound is not None}
        return choose(candidates, limited(candidates, bounds.get(case.group)) | known)

    picks: dict[str, Callable[[Case], Callable[[list[Candidate]], Candidate]]] = {
        "k-means": lambda _: lambda c: c[0],
        "refined": lambda _: lambda c: c[1],
        "consensus": lambda _: lambda c: c[2],
        "with spectral": lambda _: lambda c: c[3],
        "nothing trained": lambda _: lambda c: choose(untrained(c)),
        "trained heads": lambda _: lambda c: choose(without_space(c)),
        "learnt space, always": lambda _: lambda c: c[-1] if c[-1].name == LEARNT else choose(c),
        "auto": lambda _: choose,
        "auto, left out": lambda case: partial(elsewhere, case),
    }
    print("\nGain over scikit-learn's k-means, ACC / NMI in points, mean of seeds\n")
    gains = {name: np.array([gain(case, pick(case)) for case in cases]) for name, pick in picks.items()}
    gains["chosen by labels"] = np.array([best_gain(case) for case in cases])
    print("| set | rows, D, K | scikit-learn | " + " | ".join(gains) + " | kept by seed | CPU s |")
    print("|---" * (len(gains) + 5) + "|")
    for place, case in enumerate(cases):
        base = np.mean([baseline for baseline, _, _ in case.runs], axis=0)
        cells = " | ".join("{:+.1f} / {:+.1f}".format(*gains[name][place]) for name in gains)
        kept = ", ".join(choose([candidate for candidate, _ in scored]).name for _, scored, _ in case.runs)
        seconds = np.mean([seconds for _, _, seconds in case.runs])
        size = f"{len(case.x)}, {case.x.shape[1]}, {case.clusters}"
        print(f"| {case.name} | {size} | {base[0]:.1f} / {base[1]:.1f} | {cells} | {kept} | {seconds:.1f} |")
    print("\n| | " + " | ".join(gains) + " |\n" + "|---" * (len(gains) + 1) + "|")
    for title, rule in {
        "mean": lambda g: "{:+.2f} / {:+.2f}".format(*g.mean(0)),
        "worst": lambda g: "{:+.1f} / {:+.1f}".format(*g.min(0)),
        "sets below -0.5": lambda g: "{} / {}".format(*(g < BOUND).sum(0)),
        "sets below -1": lambda g: "{} / {}".format(*(g < -1).sum(0)),
    }.items():
        for part, chosen in (
            ("sets and variants", np.array([not case.name.startswith("mixed") for case in cases])),
            ("mixed", np.array([case.name.startswith("mixed") for case in cases])),
        ):
            if chosen.any():
                print(f"| {title}, {chosen.sum()} {part} | " + " | ".join(rule(gains[n][chosen]) for n in gains) + " |")
    fits = [(case.name, s - b) for case in cases for b, each, _ in case.runs for s in [kept_scores(each)]]
    name, single = min(fits, key=lambda fit: float(fit[1].min()))
    print(f"\nWorst single fit of auto: {name}, {single[0]:+.1f} / {single[1]:+.1f}, of {len(fits)}")
    for title, chosen in {"bounds": bounds, "bounds of trained heads": heads, "of the learnt space": space}.items():
        each = ", ".join(f"{group} {tuple(vars(b).values())}" for group, b in chosen.items())
        print(f"\n{title} chosen without each set: {each}")


def trained(cases: list[Case], names: Sequence[str], results: Path | None) -> None:
    """Gains of methods that are trained by gradient, mean of the seeds."""
    print("\n| set | scikit-learn | " + " | ".join(f"{name}, gain, CPU s" for name in names) + " |")
    print("|---" * (len(names) + 2) + "|", flush=True)
    gains: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for case in cases:
        x, base, cells = torch.from_numpy(case.x), np.mean([run[0] for run in case.runs], axis=0), []
        for name in names:
            kept = None if results is None else results / f"{case.name.replace('/', '_')}-{name}.pickle"
            runs = pickle.loads(kept.read_bytes()) if kept is not None and kept.exists() else []  # noqa: S301
            for seed in range(len(runs), len(case.runs)):
                start = time.process_time()
                config = TRAINED[name](clusters=case.clusters)
                neighbors = graph(x, min(50, len(x) - 1)) if config.draws_pairs else None
                labels = fit_arrays(x, neighbors, config, seed).predict_proba(x).argmax(1).numpy()
                runs.append((score(case, labels), time.process_time() - start))
                if kept is not None:
                    kept.write_bytes(pickle.dumps(runs))
            scores, seconds = (np.mean([run[part] for run in runs], axis=0) for part in (0, 1))
            gains[name].append(scores - base)
            cells.append("{:+.1f} / {:+.1f}, {:.0f}".format(*(scores - base), seconds))
        print(f"| {case.name} | {base[0]:.1f} / {base[1]:.1f} | {' | '.join(cells)} |", flush=True)
    for name, each in gains.items():
        g = np.array(each)
        sums = "mean {:+.2f} / {:+.2f}, worst {:+.1f} / {:+.1f}".format(*g.mean(0), *g.min(0))
        below = ", ".join(f"below {bound} {' / '.join(map(str, (g < bound).sum(0)))}" for bound in (-0.5, -3))
        print(f"\n{name}, {len(g)} sets: {sums}; sets {below}")


def main() -> None:
    """Run every set, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--budget", type=float, default=AutoConfig.model_fields["budget"].default, help="0: no trainings"
    )
    variants = [f"{name}/{variant}" for variant, sets in VARIANTS.items() for name in sets]
    parser.add_argument("--processes", type=int, default=1, help="that share the sets")
    parser.add_argument("--sets", nargs="+", default=[*SETS, *variants, *MIXED])
    parser.add_argument("--results", type=Path, help="folder in which what is measured is kept between calls")
    parser.add_argument("--held-out", type=int, nargs="?", const=0, help="other sets: HELD_OUT, or those of a seed")
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} thread, Python {platform.python_version()}"
    )
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}; {arguments.seeds} seeds")
    there = (arguments.data / FOLDERS["imagenette"]).is_dir()
    held_out = arguments.held_out
    wanted = arguments.sets if held_out is None else drawn(held_out) if held_out else HELD_OUT
    names = [name for name in wanted if there or name.startswith("digits")]
    if arguments.results is not None:
        arguments.results.mkdir(parents=True, exist_ok=True)
    shared = {name: getattr(arguments, name) for name in ("data", "seeds", "threads", "budget", "results")}
    measure = partial(measured, **shared)
    with threadpool_limits(arguments.threads), multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        cases = list(pool.imap(measure, names))
        report(cases)
        if arguments.trained:
            trained(cases, arguments.trained, arguments.results)


if __name__ == "__main__":
    main()
