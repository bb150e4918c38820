"""Moved."""

from rayclust.metrics.internal import coding_length

__all__ = ["coding_length"]
