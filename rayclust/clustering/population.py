"""Moved."""

from rayclust.clustering.row_stats import Metric, even_sample, gather_rows
from rayclust.clustering.row_stats import RowStats as Population
from rayclust.clustering.row_stats import compute as survey

__all__ = ["Metric", "Population", "even_sample", "gather_rows", "survey"]
