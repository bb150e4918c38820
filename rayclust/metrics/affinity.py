"""Moved."""

from rayclust.metrics.geometry import (  # noqa: F401
    absolute_gram,
    components,
    detection_error,
    kernel_membership,
    neighbor_precision,
    nonzeros,
    similar_order,
    wrong_edges,
)
