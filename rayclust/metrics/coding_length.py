"""Moved."""

from rayclust.metrics.internal import coding_length  # noqa: F401
