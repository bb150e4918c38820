"""Measures of a partition, with and without labels."""
