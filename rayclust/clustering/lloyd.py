"""Moved."""

from rayclust.clustering.row_stats import Blocks

__all__ = ["Blocks"]
