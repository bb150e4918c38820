"""Moved."""

from rayclust.metrics.internal import CriteriaOptions, measure

__all__ = ["CriteriaOptions", "measure"]
