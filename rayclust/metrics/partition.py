"""Moved."""

from rayclust.metrics.internal import map_equation, modularity, neighbor_agreement, stability

__all__ = ["map_equation", "modularity", "neighbor_agreement", "stability"]
