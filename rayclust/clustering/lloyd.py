"""Moved."""

from rayclust.clustering.row_stats import Blocks  # noqa: F401
