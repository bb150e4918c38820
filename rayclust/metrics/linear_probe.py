"""How far a linear map separates classes: what labels could reach on an embedding at most, with little work."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from rayclust.arrays import FloatArray, require_matrix
from rayclust.errors import ShapeError
from rayclust.metrics.external import Labels

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DEVIATION = 100, 256, 5e-3, 1e-2, 0.01


def linear_probe_accuracy(
    x: FloatArray, labels: Labels, other_x: FloatArray, other_labels: Labels, *, epochs: int = EPOCHS, seed: int = 0
) -> float:
    """Share of rows whose class a linear layer tells that was trained on other rows.

    Adam from weights of deviation 0.01, learning rate 0.005 down to 0 by a cosine, weight decay 0.01, batches of 256.
    Taken after the last epoch, not the best one. Range 0 to 1, larger is better; chance: the largest class's share.

    Args:
        x: Float[N D], trained on.
        labels: [N].
        other_x: Float[M D], scored.
        other_labels: [M]; classes that `labels` lacks count as wrong.
        epochs: passes over `x`.
        seed: of weights and order.

    Raises:
        ShapeError: rows and labels do not have one length, or the two sets not one width.

    Source: arXiv 2303.17896, its program's linear evaluation.
    """
    require_matrix(x, "x")
    require_matrix(other_x, "other_x", x.shape[1])
    if len(labels) != len(x) or len(other_labels) != len(other_x):  # type: ignore[arg-type]
        raise ShapeError(f"labels: one for each of {len(x)} and {len(other_x)} rows is needed")
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    weight, bias = _fitted(torch.as_tensor(x).float(), torch.as_tensor(codes), len(classes), (epochs, seed))
    scores = functional.linear(torch.as_tensor(other_x).float(), weight, bias)
    return float(np.mean(classes[scores.argmax(1).numpy()] == np.asarray(other_labels)))


def _fitted(x: torch.Tensor, codes: torch.Tensor, classes: int, run: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    epochs, seed = run
    generator = torch.Generator().manual_seed(seed)
    weight = (DEVIATION * torch.randn(classes, x.shape[1], generator=generator)).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator), BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(functional.linear(x[rows], weight, bias), codes[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()
