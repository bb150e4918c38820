"""Moved."""

from rayclust.training.loop import CheckpointInterval as Every

__all__ = ["Every"]
