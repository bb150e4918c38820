"""Moved."""

from rayclust.metrics.geometry import directions, quantiles, singular_values  # noqa: F401
