"""Moved."""

from rayclust.training.sampling import ArrayRows as ArrayRows
