"""Reliability of the calibrated confidence of assignments, on labelled sets whose labels only score.

    python benchmarks/confidence.py [--data ../shared/data] [--methods kmeans auto] [--sets NAME ...]

Claims: the mean over the sets of the expected calibration error (15 bins) is at most 0.10, where the three constants of
`rayclust/metrics/calibration.py` are fitted without the set, its variants and mixtures; and the order of the rows, as
AUROC of right against wrong, is that of the method's own probabilities, to 0.001.

Sets and variants are those of defaults.py, rows centred and of length 1: photographs as features of two MobileNetV2
that were trained WITH ImageNet labels, and scikit-learn's digits as pixels. A row is right if its cluster's class, by
the best match of clusters and classes, is its own. The constants in the code are those fitted on all sets, as the last
line has them; a person chose the two measures by the errors with sets left out.
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
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from rayclust.methods.settings import AutoConfig, KMeansConfig
from rayclust.methods.temi_settings import TemiConfig
from rayclust.metrics.calibration import calibrate, link_inputs, measure
from rayclust.metrics.external import contingency
from rayclust.search.knn import nearest_others
from rayclust.training.loop import fit_arrays

BINS = 15
METHODS: dict[str, type[KMeansConfig | AutoConfig | TemiConfig]] = {
    "kmeans": KMeansConfig,
    "auto": AutoConfig,
    "temi": TemiConfig,
}


@dataclass
class Examined:
    """A set under a method; rows without a class are left out."""

    case: defaults.Case
    method: str
    right: np.ndarray
    """Bool[n]."""
    own: np.ndarray
    """Float[n], the method's probabilities."""
    confidence: np.ndarray
    """Float[n], calibrated."""
    inputs: np.ndarray
    """Float[n 2], what the constants are fitted on."""


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean distance of confidence and share of right rows over equal bins of confidence, by rows."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(sum(abs((confidence - right)[bins == each].sum()) for each in range(BINS)) / len(right))


def examine(case: defaults.Case, method: str) -> Examined:
    """Cluster a set and measure it."""
    x, clusters = torch.from_numpy(case.x), case.clusters
    fitted = fit_arrays(x, nearest_others(x, min(50, len(x) - 1)), METHODS[method](clusters=clusters), seed=0)
    with torch.inference_mode():
        probability, found = fitted.predict_proba(x).float().max(dim=1)
    known = case.labels >= 0
    table = contingency(found[known].numpy(), case.labels[known]).toarray()
    rows, columns = linear_sum_assignment(table, maximize=True)
    names = np.unique(found[known].numpy()), np.unique(case.labels[known])
    class_of = dict(zip(names[0][rows].tolist(), names[1][columns].tolist(), strict=True))
    right = np.array([class_of.get(cluster) for cluster in found.tolist()]) == case.labels
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    curve = calibrate(x[order], found[order], probability[order], clusters)
    share, again = measure(x[order], found[order], clusters)
    own = probability.double().numpy()
    inputs = link_inputs(share, again, own[order[: len(share)]], own)
    return Examined(case, method, right[known], own[known], curve(own)[known], inputs[known])


def link(sets: list[Examined]) -> LogisticRegression:
    """Fit the constants on some sets, which count alike."""
    weights = np.concatenate([np.full(len(s.right), 1e3 / len(s.right)) for s in sets])
    inputs, right = np.concatenate([s.inputs for s in sets]), np.concatenate([s.right for s in sets])
    return LogisticRegression(C=1e3).fit(inputs, right, sample_weight=weights)


def main() -> None:
    """Print a line for each set, and the summary."""
    variants = [f"{name}/{variant}" for variant, sets in defaults.VARIANTS.items() for name in sets]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--methods", nargs="+", default=["kmeans", "auto"], choices=METHODS)
    parser.add_argument("--sets", nargs="+", default=[*defaults.SETS, *variants, *defaults.MIXED])
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpu.report("confidence.py", None, ("torch", "scikit-learn"))
    print()
    there = (options.data / defaults.FOLDERS["imagenette"]).is_dir()
    names = [name for name in options.sets if there or name.startswith("digits")]
    found = [examine(case, each) for case in (defaults.make(name, options.data) for name in names)
             for each in options.methods]  # fmt: skip
    print("| set | method | right | mean: own, calibrated | ECE: own, calibrated, left out | AUROC: own, calibrated |")
    print("|---" * 6 + "|")
    errors, areas = np.zeros((len(found), 3)), np.zeros((len(found), 2))
    for place, s in enumerate(found):
        others = [other for other in found if other.case.group not in (s.case.group, "mixed")]
        left_out = link(others).predict_proba(s.inputs)[:, 1] if others else s.confidence
        errors[place] = [calibration_error(each, s.right) for each in (s.own, s.confidence, left_out)]
        areas[place] = [roc_auc_score(s.right, each) if 0 < s.right.mean() < 1 else 1 for each in (s.own, s.confidence)]
        cells = ([s.own.mean(), s.confidence.mean()], errors[place], areas[place])
        shown = " | ".join(", ".join(f"{value:.3f}" for value in values) for values in cells)
        print(f"| {s.case.name} | {s.method} | {s.right.mean():.3f} | {shown} |", flush=True)
    whole = np.array([s.case.name in defaults.SETS for s in found])
    for title, rows in (("sets", whole), ("variants and mixtures", ~whole)):
        if rows.any():
            means, most = ", ".join(f"{e:.3f}" for e in errors[rows].mean(0)), errors[rows].max(0)
            above = (errors[rows] > 0.1).mean(0)
            print(f"\n{rows.sum()} of {title}: ECE own, calibrated, left out: mean {means}; ", end="")
            print(f"largest {most.round(3).tolist()}; share above 0.10 {above.round(2).tolist()}")
    print(f"\nAUROC: calibrated less own, least {(areas[:, 1] - areas[:, 0]).min():.4f}")
    fit = link(found)
    print(f"fitted on all: intercept {fit.intercept_[0]:.2f}, level and slope {fit.coef_[0].round(2).tolist()}")


if __name__ == "__main__":
    main()
