"""Measures of partitions and embeddings, with and without labels."""
