"""Moved."""

from rayclust.settings import format_error as one_line

__all__ = ["one_line"]
