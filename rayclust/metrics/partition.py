"""Moved."""

from rayclust.metrics.internal import map_equation, modularity, neighbor_agreement, stability  # noqa: F401
