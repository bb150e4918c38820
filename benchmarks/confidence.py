"""Reliability of the calibrated confidence of assignments, on labelled sets whose labels only score.

    python benchmarks/confidence.py [--data ../shared/data] [--methods kmeans auto] [--sets NAME ...]
        [--held-out [SEED]] [--seed 0] [--results FOLDER]

Claims: on each set the expected calibration error (15 bins) is at most 0.10, and so it is on the mean of the variants,
where the constants of `rayclust/metrics/calibration.py` are fitted without the set, its variants and mixtures; and the
order of the rows, as AUROC of right against wrong, is that of the method's own probabilities, to 0.001.

Sets and variants are those of defaults.py, rows centred and of length 1: photographs as features of two MobileNetV2
that were trained WITH ImageNet labels, and scikit-learn's digits as pixels. A row is right if its cluster's class, by
the best match of clusters and classes, is its own. The constants in the code are those fitted on all these sets, as the
last line has them; a person chose what is measured among some hundred measures, by the errors with sets left out.
`--held-out` takes the other variants and mixtures of defaults.py, of the same sets of images, `--held-out SEED` those
that a seed draws. With `--results` sets that the folder has are not clustered again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import defaults
import gpu
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score

from rayclust.methods.settings import AutoConfig, KMeansConfig
from rayclust.methods.temi_settings import TemiConfig
from rayclust.metrics.calibration import measure, rising_map
from rayclust.metrics.external import contingency
from rayclust.search.knn import nearest_others
from rayclust.training.loop import fit_arrays

BINS = 15
SPREADS = np.arange(0.4, 1.65, 0.1).round(1)
METHODS: dict[str, type[KMeansConfig | AutoConfig | TemiConfig]] = {
    "kmeans": KMeansConfig,
    "auto": AutoConfig,
    "temi": TemiConfig,
}


@dataclass
class Examined:
    """A set under a method."""

    name: str
    group: str
    method: str
    known: np.ndarray
    """Bool[n], False for rows without a class, which are not scored."""
    right: np.ndarray
    """Bool[n]."""
    own: np.ndarray
    """Float[n], the method's probabilities."""
    confidence: np.ndarray
    """Float[n], calibrated."""
    inputs: np.ndarray
    """Float[2], what the constants are fitted on."""

    def error(self, confidence: np.ndarray) -> float:
        """Return the mean distance of confidence and share of right rows over equal bins of confidence, by rows."""
        confidence, right = confidence[self.known], self.right[self.known]
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        return float(sum(abs((confidence - right)[bins == each].sum()) for each in range(BINS)) / len(right))

    def brier(self, level: float, spread: float) -> float:
        """Return the mean squared distance of confidence and being right, at a level and spread."""
        confidence = rising_map(self.own, level, spread)(self.own)
        return float(np.square(confidence - self.right)[self.known].mean())


def assign(case: defaults.Case, method: str, results: Path | None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster a set, or read what was kept of it: Int64[n], Float[n]."""
    kept = results and results / f"{case.name.replace('/', '_')}-{method}{f'-{seed}' if seed else ''}.npz"
    if not kept or not kept.exists():
        x = torch.from_numpy(case.x)
        neighbors = nearest_others(x, min(50, len(x) - 1))
        fitted = fit_arrays(x, neighbors, METHODS[method](clusters=case.clusters), seed)
        with torch.inference_mode():
            probability, clusters = fitted.predict_proba(x).float().max(dim=1)
        if not kept:
            return clusters, probability
        np.savez(kept, clusters=clusters.numpy(), probability=probability.numpy())
    with np.load(kept) as found:
        return torch.from_numpy(found["clusters"]), torch.from_numpy(found["probability"])


def examine(case: defaults.Case, method: str, results: Path | None, seed: int = 0) -> Examined:
    """Cluster a set and measure it."""
    found, probability = assign(case, method, results, seed)
    known = case.labels >= 0
    table = contingency(found[known].numpy(), case.labels[known]).toarray()
    rows, columns = linear_sum_assignment(table, maximize=True)
    names = np.unique(found[known].numpy()), np.unique(case.labels[known])
    class_of = dict(zip(names[0][rows].tolist(), names[1][columns].tolist(), strict=True))
    right = np.array([class_of.get(cluster) for cluster in found.tolist()]) == case.labels
    order = np.random.default_rng(0).permutation(len(case.x))
    evidence, own = measure(torch.from_numpy(case.x[order]), found[order], case.clusters), probability.double().numpy()
    confidence = rising_map(own, evidence.level())(own)
    return Examined(case.name, case.group, method, known, right, own, confidence, evidence.inputs())


def link(sets: list[Examined]) -> LinearRegression:
    """Fit the level on some sets, which count alike."""
    share = np.clip([s.right[s.known].mean() for s in sets], 0.02, 0.98)
    return LinearRegression().fit([s.inputs for s in sets], np.log(share / (1 - share)))


def main() -> None:
    """Print a line for each set, and the summary."""
    variants = [f"{name}/{variant}" for variant, sets in defaults.VARIANTS.items() for name in sets]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--methods", nargs="+", default=["kmeans", "auto"], choices=METHODS)
    parser.add_argument("--sets", nargs="+", default=[*defaults.SETS, *variants, *defaults.MIXED])
    parser.add_argument("--held-out", nargs="?", type=int, const=0, metavar="SEED")
    parser.add_argument("--seed", type=int, default=0, help="of the methods")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.held_out is not None:
        options.sets = defaults.drawn(options.held_out) if options.held_out else defaults.HELD_OUT
    torch.set_num_threads(1)
    gpu.report("confidence.py", None, ("torch", "scikit-learn"))
    print()
    there = (options.data / defaults.FOLDERS["imagenette"]).is_dir()
    names = [name for name in options.sets if there or name.startswith("digits")]
    found = [
        examine(case, each, options.results, options.seed)
        for case in (defaults.make(name, options.data) for name in names)
        for each in options.methods
    ]
    print("| set | method | right | mean: own, calibrated | ECE: own, calibrated, left out | AUROC: own, calibrated |")
    print("|---" * 6 + "|")
    scatter = np.array([[s.brier(s.right[s.known].mean(), spread) for spread in SPREADS] for s in found])
    errors, areas = np.zeros((len(found), 3)), np.zeros((len(found), 2))
    for place, s in enumerate(found):
        others = np.array([other.group not in (s.group, "mixed") for other in found])
        left_out = s.confidence
        if others.any():
            level = link([other for other, kept in zip(found, others, strict=True) if kept]).predict([s.inputs])[0]
            spread = SPREADS[scatter[others].mean(0).argmin()]
            left_out = rising_map(s.own, 1 / (1 + np.exp(-level)), spread)(s.own)
        errors[place] = [s.error(each) for each in (s.own, s.confidence, left_out)]
        right, own, confidence = s.right[s.known], s.own[s.known], s.confidence[s.known]
        areas[place] = [roc_auc_score(right, each) if 0 < right.mean() < 1 else 1 for each in (own, confidence)]
        cells = ([own.mean(), confidence.mean()], errors[place], areas[place])
        shown = " | ".join(", ".join(f"{value:.3f}" for value in values) for values in cells)
        print(f"| {s.name} | {s.method} | {right.mean():.3f} | {shown} |", flush=True)
    whole = np.array([s.name in defaults.SETS for s in found])
    for title, rows in (("sets", whole), ("variants and mixtures", ~whole)):
        if rows.any():
            means, most = ", ".join(f"{e:.3f}" for e in errors[rows].mean(0)), errors[rows].max(0)
            above = (errors[rows] > 0.1).mean(0)
            print(f"\n{rows.sum()} of {title}: ECE own, calibrated, left out: mean {means}; ", end="")
            print(f"largest {most.round(3).tolist()}; share above 0.10 {above.round(2).tolist()}")
    print(f"\nAUROC: mean {areas.mean(0).round(3).tolist()}; calibrated less own, least {np.diff(areas).min():.4f}")
    fit, spread = link(found), SPREADS[scatter.mean(0).argmin()]
    slopes = fit.coef_.round(2).tolist()
    print(f"fitted on all: intercept {fit.intercept_:.2f}, support and crowding {slopes}, spread {spread}")


if __name__ == "__main__":
    main()
