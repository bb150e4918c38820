"""Probes of an embedding with true classes: how far neighbours, or a linear map, separate them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.clustering import kmeans
from rayclust.errors import ShapeError

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DEVIATION = 100, 256, 5e-3, 1e-2, 0.01
EVALUATION_RATE, EVALUATION_DROPS, MOMENTUM = 30.0, (0.6, 0.8), 0.9
"""Of the linear evaluation: learning rate, shares of the epochs at which it falls to a tenth, momentum of SGD."""


def knn_accuracy(
    neighbors: IntArray,
    similarity: FloatArray,
    labels: ArrayLike,
    labels_true: ArrayLike | None = None,
    *,
    k: int = 20,
    temperature: float = 0.02,
    top: int = 1,
) -> float:
    """Return the share of rows whose class is among the `top` ones in the vote of their nearest other rows.

    A neighbour's vote weighs exp(similarity / temperature); a draw goes to the class that sorts first, and a class
    without a vote is none of them. Range 0 to 1, larger is better; the share of the largest classes by chance.

    Args:
        neighbors: Int64[B M], positions in `labels`, nearest first, without the row itself; −1 where there are fewer.
        similarity: Float[B M].
        labels: [N], of all rows.
        labels_true: [B], of the rows that `neighbors` belongs to; None where those are all rows.
        k: neighbours that vote; at most M do.
        temperature: above 0.
        top: classes that count, above 0.

    Raises:
        ShapeError: the shapes do not fit together.
    """
    known = np.asarray(labels)
    truth = known if labels_true is None else np.asarray(labels_true)
    if neighbors.shape != similarity.shape or truth.shape != neighbors.shape[:1]:
        shapes = f"{neighbors.shape}, {similarity.shape} and {truth.shape}"
        raise ShapeError(f"neighbors, similarity and labels have shapes {shapes}: one row for each label is needed")
    near, logits = neighbors[:, :k], similarity[:, :k].astype(np.float64) / temperature
    weights = np.where(near >= 0, np.exp(logits - logits.max(axis=1, keepdims=True, initial=-1e300)), 0.0)
    classes, codes = np.unique(known[near], return_inverse=True)
    votes = np.zeros((len(near), len(classes)))
    np.add.at(votes, (np.arange(len(near))[:, None], codes.reshape(near.shape)), weights)
    best = np.argsort(-votes, axis=1, kind="stable")[:, :top]
    hits = (classes[best] == truth[:, None]) & (np.take_along_axis(votes, best, axis=1) > 0)
    return float(np.mean(hits.any(axis=1)))


def class_mean_accuracy(x: FloatArray, labels: ArrayLike, other_x: FloatArray, other_labels: ArrayLike) -> float:
    """Return the share of rows whose class has the nearest mean: what k-means could reach with its centres at classes.

    Range 0 to 1, larger is better; chance: the largest class's share. Draws go to the class that sorts first.

    Means of Float[N D], scored on Float[M D]; classes that `labels`, [N], lacks count as wrong.

    Raises:
        ShapeError: rows and labels do not have one length, or the two sets not one width.

    Source: arXiv 2303.17896, its program's bound beside k-means.
    """
    require_matrix(x, "x")
    require_matrix(other_x, "other_x", x.shape[1])
    if len(labels) != len(x) or len(other_labels) != len(other_x):  # type: ignore[arg-type]
        raise ShapeError(f"labels: one for each of {len(x)} and {len(other_x)} rows is needed")
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    members = functional.one_hot(torch.as_tensor(codes), len(classes)).double()
    means = members.T @ torch.as_tensor(x).double() / members.sum(0)[:, None]
    nearest, _ = kmeans.assign(torch.as_tensor(other_x).double(), means)
    return float(np.mean(classes[nearest.numpy()] == np.asarray(other_labels)))


def linear_probe_accuracy(
    x: FloatArray,
    labels: ArrayLike,
    other_x: FloatArray,
    other_labels: ArrayLike,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> float:
    """Return the accuracy of a linear classifier trained on one set of rows and scored on another.

    Adam from weights of deviation 0.01, learning rate 0.005 down to 0 by a cosine, weight decay 0.01, batches of 256.
    Taken after the last epoch, not the best one. Range 0 to 1, larger is better; chance: the largest class's share.

    Trained on Float[N D], scored on Float[M D]; classes that `labels`, [N], lacks count as wrong.

    Raises:
        ShapeError: rows and labels do not have one length, or the two sets not one width.

    Source: arXiv 2303.17896, its program's linear evaluation.
    """
    require_matrix(x, "x")
    require_matrix(other_x, "other_x", x.shape[1])
    if len(labels) != len(x) or len(other_labels) != len(other_x):  # type: ignore[arg-type]
        raise ShapeError(f"labels: one for each of {len(x)} and {len(other_x)} rows is needed")
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    rows, targets = torch.as_tensor(x).float(), torch.as_tensor(codes)
    generator = torch.Generator().manual_seed(seed)
    weight = (DEVIATION * torch.randn(len(classes), x.shape[1], generator=generator)).requires_grad_()
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x), generator=generator), BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(functional.linear(rows[batch], weight, bias), targets[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    scores = functional.linear(torch.as_tensor(other_x).float(), weight.detach(), bias.detach())
    return float(np.mean(classes[scores.argmax(1).numpy()] == np.asarray(other_labels)))


def linear_evaluation(
    view: Callable[[Tensor, int], Tensor],
    labels: ArrayLike,
    other_x: FloatArray,
    other_labels: ArrayLike,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> dict[int, float]:
    """Return the accuracy, by number of guesses (1 and 5), of a linear classifier that sees another view in each epoch.

    SGD with momentum and without decay, learning rate 30 that falls to a tenth after 60 % and 80 % of the epochs,
    batches of 256, weights of deviation 0.01. Taken after the last epoch. Range 0 to 1, larger is better.

    Args:
        view: gives a view's rows, Float[B D], for positions in `labels`, Int64[B], and the number of the step.
        labels: [N], of the rows that are learnt from.
        other_x: Float[M D], of the unchanged images that are scored.
        other_labels: [M]; classes that `labels` lacks count as wrong.
        epochs: passes over the N rows.
        seed: of the weights and of the order.

    Source: arXiv 2111.11821, its program's linear evaluation, after arXiv 1911.05722, section 4.1.
    """
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    targets, generator = torch.as_tensor(codes), torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(other_x.shape[1], len(classes))
    with torch.no_grad():
        layer.weight.copy_(DEVIATION * torch.randn(layer.weight.shape, generator=generator))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=EVALUATION_RATE, momentum=MOMENTUM)
    drops = [round(share * epochs) for share in EVALUATION_DROPS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    step = 0
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(targets), generator=generator), BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(layer(view(batch, step)), targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        schedule.step()
    with torch.no_grad():
        best = layer(torch.as_tensor(other_x).float()).topk(min(5, len(classes)), dim=1).indices.numpy()
    hits = classes[best] == np.asarray(other_labels)[:, None]
    return {top: float(hits[:, :top].any(axis=1).mean()) for top in (1, 5)}
