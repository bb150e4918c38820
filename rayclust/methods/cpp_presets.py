"""CPP's published settings, and the ones chosen for a data set."""

from __future__ import annotations

from typing import Any

PUBLISHED_RATE = 1e-4
"""Of every data set, whatever its batch."""
RATE_ROWS = 256


def preset_values(preset: str, count: int, clusters: int) -> dict[str, Any]:
    """The settings that a preset stands for.

    Args:
        preset: one of `CppConfig.preset`.
        count: N.
        clusters: K; only `auto` looks at it.

    Returns:
        Config keys and values; empty for `none`.
    """
    if preset == "auto":
        return auto_settings(count, clusters)
    return _published(PAPER[preset], count) if preset in PAPER else {}


PAPER: dict[str, dict[str, Any]] = {
    "cifar10": {"batch_size": 1024, "temperature": 0.175, "epochs": 15, "expansion_steps": 50},
    "cifar20": {"batch_size": 1024, "temperature": 0.13, "epochs": 15, "expansion_epochs": 1},
    "cifar100": {"batch_size": 1500, "temperature": 0.10, "epochs": 50, "expansion_epochs": 1},
    "imagenet": {
        "batch_size": 1024, "temperature": 0.12, "epochs": 20, "expansion_steps": 2000, "hidden": 2048, "width": 1024
    },
}  # fmt: skip
"""The published program's example commands for CIFAR-10 and ImageNet; Table 8 of the paper for the others."""


def _published(values: dict[str, Any], count: int) -> dict[str, Any]:
    rate = PUBLISHED_RATE * RATE_ROWS / min(values["batch_size"], max(count, 2))
    found = {"hidden": 4096, "width": 128, "learning_rate": rate, "min_learning_rate": rate, **values}
    epochs = found.pop("expansion_epochs", None)
    if epochs is not None:
        found["expansion_steps"] = epochs * max(1, count // found["batch_size"])
    return found


AUTO_BATCH, AUTO_HIDDEN = 512, 512
AUTO_RATE = 1e-3
"""At the batch above and d = 32; R's slope grows with d, so that the rate falls as 1/d."""
LEAST_WIDTH, MOST_WIDTH = 32, 128
LEAST_STEPS, MOST_STEPS, AUTO_EPOCHS = 75, 2_000, 4


def auto_settings(count: int, clusters: int) -> dict[str, Any]:
    """Steps counted, not epochs: few, from the rows' principal components; the loss may end them earlier.

    docs/methods.md has the numbers behind each choice.

    Args:
        count: N.
        clusters: K; the width leaves each cluster some three dimensions.
    """
    batch = max(2, min(AUTO_BATCH, count))
    width = max(LEAST_WIDTH, min(MOST_WIDTH, 1 << (3 * clusters - 1).bit_length()))
    rate = AUTO_RATE * RATE_ROWS / AUTO_BATCH * LEAST_WIDTH / width
    return {
        "start": "principal",
        "hidden": AUTO_HIDDEN,
        "width": width,
        "batch_size": batch,
        "learning_rate": rate,
        "min_learning_rate": rate,
        "steps": max(LEAST_STEPS, min(MOST_STEPS, AUTO_EPOCHS * (count // batch))),
        "expansion_steps": 0,
        "patience": 25,
        "improvement": 0.1,
        "final_temperature": 0.1,
    }
