"""Moved."""

from rayclust.metrics.geometry import directions, quantiles, singular_values

__all__ = ["directions", "quantiles", "singular_values"]
