"""Moved."""

from rayclust.metrics.internal import CriteriaOptions, measure  # noqa: F401
