"""Clustering methods, one paper a file."""
