"""Moved."""

from rayclust.store.run import PART, Run, parts

__all__ = ["PART", "STAGES", "Run", "parts"]

STAGES = ("encode", "neighbors", "select-k", "train", "assign", "label", "index", "evaluate", "figures", "report")
