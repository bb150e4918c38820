"""Sampling of batches, and the training loop over any method."""
