"""Moved."""

from rayclust.clustering.row_stats import Metric, even_sample, gather_rows  # noqa: F401
from rayclust.clustering.row_stats import RowStats as Population  # noqa: F401
from rayclust.clustering.row_stats import compute as survey  # noqa: F401
