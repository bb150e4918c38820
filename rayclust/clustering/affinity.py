"""Moved."""

from rayclust.clustering.spectral import unit

__all__ = ["unit"]
