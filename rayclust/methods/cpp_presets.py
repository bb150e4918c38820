"""CPP's published settings, and the ones chosen for a data set."""

from __future__ import annotations

from typing import Any

PUBLISHED_RATE = 1e-4
"""Of every data set, whatever its batch."""
RATE_ROWS = 256


def preset_values(preset: str, count: int, dimension: int) -> dict[str, Any]:
    """The settings that a preset stands for.

    Args:
        preset: one of `CppConfig.preset`.
        count: N.
        dimension: D.

    Returns:
        Config keys and values; empty for `none`.
    """
    if preset == "auto":
        return auto_settings(count, dimension)
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


def auto_settings(count: int, dimension: int) -> dict[str, Any]:
    """Steps counted, not epochs; the loss says when to stop."""
    batch = max(2, min(1024, count))
    return {"batch_size": batch, "steps": 400, "patience": 40, "expansion_steps": 50}
