"""Moved."""

from rayclust.metrics.external import halves_accuracy, in_sample_accuracy
from rayclust.metrics.external import overclustering_scores as scores

__all__ = ["halves_accuracy", "in_sample_accuracy", "scores"]
