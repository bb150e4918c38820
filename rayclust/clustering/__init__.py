"""Partitions of rows, without a network."""
