"""Clusters of clusters: coarser levels above a fine partition, made from the clusters' prototypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rayclust.arrays import require_matrix
from rayclust.clustering import kmeans
from rayclust.errors import ConfigError

RESTARTS = 4
"""k-means starts of a level; the best is kept."""


@torch.no_grad()
def nest(prototypes: Tensor, sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Levels of which each cluster lies whole in one cluster of the next.

    Each level is spherical k-means of the prototypes of the one before, whose prototypes are in turn the means of their
    members'. A prototype counts once, however many rows are near it: a level shows what there is, not how much of it.

    Args:
        prototypes: Float[K d], one for each cluster, of any length.
        sizes: clusters of the levels, finest first, each fewer than the one before and than K.
        seed: of k-means.

    Returns:
        For each level Int64[K]: where each of the K clusters lies.

    Raises:
        ConfigError: the sizes do not fall, or a level has fewer than 2.
        ShapeError: `prototypes` is no matrix.
    """
    require_matrix(prototypes, "prototypes")
    bounds = [len(prototypes), *sizes]
    for before, size in zip(bounds, sizes, strict=False):
        if not 2 <= size < before:
            raise ConfigError(f"levels = {list(sizes)}: {size} must be from 2 to {before - 1}, finest level first")
    points = torch.nn.functional.normalize(prototypes.float(), dim=1)
    places, found = torch.arange(len(points), device=points.device), []
    for level, size in enumerate(sizes):
        options = kmeans.KMeansOptions(clusters=size, restarts=RESTARTS)
        centers = kmeans.fit(partial(_block, points), options, seed=seed + level).centers
        parents = kmeans.assign(points, centers)[0]
        places = parents[places]
        found.append(places)
        points = centers
    return found


def _block(points: Tensor) -> Iterator[Tensor]:
    yield points
