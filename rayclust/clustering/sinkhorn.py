"""Moved."""

from rayclust.clustering.spectral import membership  # noqa: F401
