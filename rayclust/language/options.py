"""Moved."""

from rayclust.language.vocabulary import LabelConfig  # noqa: F401
