"""Moved."""

from rayclust.language.naming import TopRows, typicality  # noqa: F401
