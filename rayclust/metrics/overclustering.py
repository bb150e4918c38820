"""Moved."""

from rayclust.metrics.external import halves_accuracy, in_sample_accuracy  # noqa: F401
from rayclust.metrics.external import overclustering_scores as scores  # noqa: F401
