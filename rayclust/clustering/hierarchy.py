"""Coarser levels above a fine partition: clusters of the clusters' prototypes.

Apart from k-means because a level is a partition of prototypes: they count once each, however many rows they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.clustering import kmeans
from rayclust.errors import ConfigError
from rayclust.settings import KMeansOptions

RESTARTS = 4
"""k-means starts of a level; the best is kept."""


@torch.no_grad()
def nest(prototypes: Tensor, sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Compute nested levels: each cluster of a level lies whole in one cluster of the next.

    Each level is spherical k-means of the prototypes of the one before, whose prototypes are in turn the means of their
    members'.

    Args:
        prototypes: Float[K d], one for each cluster, of any length.
        sizes: clusters of the levels, finest first, each fewer than the one before and than K.
        seed: of k-means.

    Returns:
        For each level Int64[K]: the cluster of that level in which each of the K clusters lies.

    Raises:
        ConfigError: the sizes do not fall, or a level has fewer than 2.
        ShapeError: `prototypes` is no matrix.
    """
    require_matrix(prototypes, "prototypes")
    bounds = [len(prototypes), *sizes]
    for before, size in zip(bounds, sizes, strict=False):
        if not 2 <= size < before:
            raise ConfigError(f"levels = {list(sizes)}: {size} must be from 2 to {before - 1}, finest level first")
    points = functional.normalize(prototypes.float(), dim=1)
    parents, levels = torch.arange(len(points), device=points.device), []
    for level, size in enumerate(sizes):
        options = KMeansOptions(clusters=size, restarts=RESTARTS)
        centers = kmeans.fit(partial(list, (points,)), options, seed=seed + level).centers
        parents = kmeans.assign(points, centers)[0][parents]
        levels.append(parents)
        points = centers
    return levels
