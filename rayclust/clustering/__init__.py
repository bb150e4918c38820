"""Partitions of rows without a network: k-means, spectral clustering, levels, and the neighbour graph."""
