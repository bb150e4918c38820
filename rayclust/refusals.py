"""Moved."""

from rayclust.settings import format_error as one_line  # noqa: F401
