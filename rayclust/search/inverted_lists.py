"""Moved."""

from rayclust.search.ivf import ListCenters, Probing, choose_probes, list_count, train_centers

__all__ = ["ListCenters", "Probing", "choose_probes", "list_count", "train_centers"]
