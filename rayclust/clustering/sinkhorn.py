"""Moved."""

from rayclust.clustering.spectral import membership

__all__ = ["membership"]
