"""Moved."""

from rayclust.metrics.probes import linear_probe_accuracy

__all__ = ["linear_probe_accuracy"]
