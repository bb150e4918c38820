"""Moved."""

from rayclust.metrics.probes import linear_probe_accuracy  # noqa: F401
