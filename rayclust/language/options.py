"""Moved."""

from rayclust.language.vocabulary import LabelConfig

__all__ = ["LabelConfig"]
