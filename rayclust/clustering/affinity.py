"""Moved."""

from rayclust.clustering.spectral import unit  # noqa: F401
