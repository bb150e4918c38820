"""Moved."""

from rayclust.training.loop import fit_arrays as fit_arrays
