"""Run the demo: every stage on scanned digits, which need no download, once per method and seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayclust.config import validate
from rayclust.errors import ArtefactError
from rayclust.runtime.datasets import write_digits
from rayclust.runtime.pipeline import run_all
from rayclust.store import storage
from rayclust.store.lock import run_lock
from rayclust.store.manifest import digest_of
from rayclust.store.run import Run

SEEDS = (2, 1, 0)
"""The report shows the last one."""
SCORES = ("accuracy", "nmi", "ari")


def demo(out: str, methods: Sequence[str] = ("kmeans", "auto")) -> tuple[str, dict[str, list[dict[str, float]]]]:
    """Run every stage on the digits for each method and seed; stages that depend on neither run once.

    A demo that was killed goes on from the last finished method and seed. Images and run go below `out`, a folder or
    URI; the report shows the last method.

    Returns:
        The run's URI, and by method its scores, one dict per seed.
    """
    out = storage.absolute(out)
    images, run = storage.join(out, "images"), Run(storage.join(out, "run"))
    plan = [(method, seed) for method in methods for seed in SEEDS]

    def by_method(scores: Sequence[dict[str, float]]) -> dict[str, list[dict[str, float]]]:
        grouped: dict[str, list[dict[str, float]]] = {}
        for (method, _), score in zip(plan, scores, strict=False):
            grouped.setdefault(method, []).append(score)
        return grouped

    with run_lock(run):
        write_digits(images)
        tree = {
            "run": run.uri,
            "images": {"uri": images},
            "encoder": {"name": "pixels", "image_size": 8, "grayscale": True},
            "features": {"center": True},
            "label": {"vocabulary": "none"},
        }
        configs = [validate(tree | {"seed": seed, "method": {"name": name, "clusters": 10}}) for name, seed in plan]
        digest = digest_of([config.model_dump(mode="json") for config in configs])
        scores: list[dict[str, float]] = []
        try:
            content = storage.read_json(run.at("demo.json"))
            scores += content["scores"] if content["digest"] == digest else []
        except (storage.MissingError, ArtefactError):
            pass
        for config in configs[len(scores) :]:
            last = config is configs[-1]
            if last:  # the report shows the other methods beside its own
                storage.write_json(run.at("beside.json"), by_method(scores))
            run_all(config, stop_after=None if last else "evaluate")
            metrics = storage.read_json(run.metrics)
            scores.append({name: metrics[name] for name in SCORES})
            storage.write_json(run.at("demo.json"), {"digest": digest, "scores": scores})
        run_all(configs[-1])
        return run.uri, by_method(scores)


def table(scores: dict[str, list[dict[str, float]]]) -> str:
    """Return the methods side by side: mean and standard deviation of the scores over seeds, in percent."""
    lines = [f"{'method':<10}" + "".join(f"{name.upper()[:3]:>16}" for name in SCORES)]
    for method, runs in scores.items():
        cells = []
        for name in SCORES:
            values = 100 * np.array([run[name] for run in runs])
            cells.append(f"{values.mean():9.1f} ± {values.std():4.1f}")
        lines.append(f"{method:<10}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
