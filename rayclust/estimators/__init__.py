"""Methods on arrays in memory with scikit-learn's contract: `fit`, `predict`, `labels_`; no Ray, no files."""

from rayclust.estimators.cpp import CPP
from rayclust.estimators.kmeans import KMeans
from rayclust.estimators.temi import TEMI

__all__ = ["CPP", "TEMI", "KMeans"]
