"""Slow and obvious forms of what the library computes fast."""

from __future__ import annotations

import numpy as np
import torch


def lloyd(x: np.ndarray, centers: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray, float]:
    """k-means in float64, one row and one cluster at a time, until no row moves: centres, labels, inertia."""

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    if metric == "cosine":
        x, centers = unit(x), unit(centers)
    labels = np.full(len(x), -1)
    while True:
        distances = np.array([[((row - center) ** 2).sum() for center in centers] for row in x])
        if np.array_equal(distances.argmin(1), labels):
            return centers, labels, float(distances.min(1).sum())
        labels = distances.argmin(1)
        centers = np.array([x[labels == k].mean(0) for k in range(len(centers))])
        centers = unit(centers) if metric == "cosine" else centers


def temi_losses(
    student: np.ndarray, teacher: np.ndarray, shares: np.ndarray, beta: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """TEMI's loss of each head in plain probabilities, one head, view and row at a time.

    `student` and `teacher` are probabilities H V B K, `shares` H K; `weights` H B takes the place of TEMI's own.
    """
    heads, views, rows, _ = student.shape
    pairs = [(a, b) for a in range(views) for b in range(views) if a != b]
    if weights is None:
        trust = np.zeros(rows)
        for h in range(heads):
            for a, b in pairs:
                trust += (teacher[h, a] * teacher[h, b]).sum(-1) / (len(pairs) * heads)
        weights = np.tile(trust, (heads, 1))
    losses = np.zeros(heads)
    for h in range(heads):
        for i in range(rows):
            for s, t in pairs:
                joint = (student[h, s, i] * teacher[h, t, i]) ** beta / shares[h]
                losses[h] -= weights[h, i] * np.log(joint.sum()) / (len(pairs) * rows)
    return losses


def clustering_head(state: dict[str, torch.Tensor], head: int, x: torch.Tensor) -> torch.Tensor:
    """The logits Float[R K] of one head of two layers, built from torch's own layers out of stacked parameters."""
    first, second = (
        torch.nn.utils.skip_init(torch.nn.Linear, *state[f"weights.{i}"].shape[:0:-1], dtype=x.dtype) for i in (0, 1)
    )
    for i, layer in enumerate((first, second)):
        layer.load_state_dict({"weight": state[f"weights.{i}"][head], "bias": state[f"biases.{i}"][head]})
    last = torch.nn.utils.skip_init(torch.nn.Linear, *state["direction"].shape[:0:-1], bias=False, dtype=x.dtype)
    last = torch.nn.utils.parametrizations.weight_norm(last)
    last.load_state_dict(
        {
            "parametrizations.weight.original0": state["scale"][head][:, None],
            "parametrizations.weight.original1": state["direction"][head],
        }
    )
    hidden = torch.nn.functional.gelu(first(x))
    return last(torch.nn.functional.normalize(second(hidden), dim=-1))
