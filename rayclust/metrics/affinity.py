"""Moved."""

from rayclust.metrics.geometry import (
    absolute_gram,
    components,
    detection_error,
    kernel_membership,
    neighbor_precision,
    nonzeros,
    similar_order,
    wrong_edges,
)

__all__ = [
    "absolute_gram",
    "components",
    "detection_error",
    "kernel_membership",
    "neighbor_precision",
    "nonzeros",
    "similar_order",
    "wrong_edges",
]
