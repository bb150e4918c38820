"""Accuracy of CPP against k-means and against the published program, on real features.

Claims: with the preset `auto`, no set is more than 1 point below scikit-learn's k-means (n_init 10) in ACC, mean of 3
seeds. With the published network and number of steps (201, of which 51 expand), ACC is not more than 1 point below the
published program's one run, or above it.

    python benchmarks/cpp_accuracy.py [--data ../shared/data] [--seeds 3] [--sets NAME ...] [--methods NAME ...]

Rows are float32, minus their mean, of length 1; labels only score. Sets and scores are those of temi_accuracy.py.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import sklearn
import temi_accuracy
import torch
from temi_accuracy import FILES, Case, Outcome, cases, run_kmeans, tabulate
from threadpoolctl import threadpool_limits

from rayclust.methods.cpp import Cpp
from rayclust.methods.cpp_settings import CppConfig
from rayclust.training.loop import fit_arrays

PUBLISHED = {"cifar10": (41.1, 26.1, 18.1), "imagenette-a": (87.1, 84.8, 73.4)}
"""ACC, NMI, ARI of the published program's one run."""
SCHEDULE = {"preset": "none", "steps": 201, "expansion_steps": 50}
"""Single head, h 4096, d 128, batch 1024, η 0.175, rate 1e-4."""


def _cpp(found: Case, seed: int, settings: dict[str, object]) -> Outcome:
    method = fit_arrays(found.x, None, CppConfig.model_validate({"clusters": found.clusters, **settings}), seed)
    assert isinstance(method, Cpp)
    c, plan = method.config, method.plan
    text = (
        f"h {c.hidden}, d {c.width}, at most {plan.steps} steps of {plan.batch_size}, η {c.temperature:g}, "
        f"rate {c.learning_rate * plan.batch_size / 256:.1e}, start {c.start}"
    )
    return Outcome(method.predict_proba(torch.from_numpy(found.x)).argmax(1).numpy(), text)


METHODS: dict[str, Callable[[Case, int], Outcome]] = {
    "kmeans": run_kmeans,
    "auto": lambda found, seed: _cpp(found, seed, {}),
    "auto-long": lambda found, seed: _cpp(found, seed, {"steps": 250, "patience": None}),
    "published": lambda found, seed: _cpp(found, seed, SCHEDULE),
    "published-principal": lambda found, seed: _cpp(found, seed, {**SCHEDULE, "start": "principal"}),
}


def main() -> None:
    """Run every method on every set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sets", nargs="+", default=[*FILES, "digits"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["kmeans", "auto"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    temi_accuracy.NEIGHBORS = 1  # CPP looks at none
    print(f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}; {arguments.seeds} seeds\n")
    print("| set | method | ACC / NMI / ARI, % | seconds | settings |\n|---|---|---|---|---|")
    with threadpool_limits(arguments.threads):
        for found in cases(arguments.data, arguments.sets):
            scores = {method: tabulate(found, method, METHODS[method], arguments.seeds) for method in arguments.methods}
            if found.name in PUBLISHED and "published" in scores:
                cells = " / ".join(f"{value:.1f}" for value in PUBLISHED[found.name])
                print(f"| {found.name} | the published program | {cells} | | one run |")
            if "kmeans" in scores and "auto" in scores:
                print(f"auto − kmeans on {found.name}: {(scores['auto'] - scores['kmeans']).round(1)}")


if __name__ == "__main__":
    main()
