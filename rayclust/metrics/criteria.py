"""Every criterion of one candidate number of clusters, from its label sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayclust.arrays import FloatArray, IntArray
from rayclust.errors import DataError
from rayclust.metrics import internal, partition
from rayclust.metrics.coding_length import DISTORTION, coding_length


@dataclass(frozen=True)
class CriteriaOptions:
    """How criteria are measured."""

    distortion: float = DISTORTION
    """ε² of the coding length, in squared row lengths."""
    silhouette_rows: int = 10_000
    """Rows of the seeded sample on which the silhouette is taken."""
    seed: int = 0
    """Of that sample."""


def measure(
    x: FloatArray, partitions: Sequence[IntArray], neighbors: IntArray | None, options: CriteriaOptions
) -> dict[str, float]:
    """All criteria of one candidate.

    Args:
        x: Float[N D], unit rows: z for a method with a space of its own, else the features.
        partitions: label sets Int[N] of several seeds; the first is the one that would be kept, and all criteria but
            the stability are its own.
        neighbors: Int[N M], each row's nearest others, −1 where there are fewer; None leaves out what needs them.
        options: how.

    Returns:
        `coding_length` in nats per row; `silhouette`, `calinski_harabasz`, `davies_bouldin`; `neighbor_agreement`,
        `modularity` and `map_equation` where there are neighbours; `stability` where there are two label sets;
        `occupied`, `smallest`, `median`, `largest`, `entropy` of the sizes. What one cluster cannot have is left out.

    Raises:
        DataError: there are no partitions.
        ShapeError: arrays disagree.
    """
    if not partitions:
        raise DataError("partitions = 0: criteria need at least one label set")
    labels = np.unique(partitions[0], return_inverse=True)[1]
    found = {"coding_length": coding_length(x, labels, options.distortion) / max(len(labels), 1)}
    clusters = int(labels.max(initial=-1)) + 1
    if 2 <= clusters < len(labels):
        found["silhouette"] = _silhouette(x, labels, options)
        found["calinski_harabasz"] = partition.calinski_harabasz(x, labels)
        found["davies_bouldin"] = partition.davies_bouldin(x, labels)
    if neighbors is not None:
        found["neighbor_agreement"] = partition.neighbor_agreement(labels, neighbors)
        found["modularity"] = partition.modularity(labels, neighbors)
        found["map_equation"] = partition.map_equation(labels, neighbors)
    if len(partitions) > 1:
        found["stability"] = partition.stability(partitions)
    return found | internal.size_summary(labels, clusters)


def _silhouette(x: FloatArray, labels: IntArray, options: CriteriaOptions) -> float:
    """On the sample; 0 where it falls into one cluster."""
    try:
        return internal.silhouette(x, labels, rows=options.silhouette_rows, seed=options.seed)
    except DataError:
        return 0.0
