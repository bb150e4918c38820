"""Moved."""

from rayclust.stages.figures import export as export
