"""Moved."""

from rayclust.language.naming import TopRows, typicality

__all__ = ["TopRows", "typicality"]
