"""Nearest neighbours: exact, by inverted lists, and in an index."""
