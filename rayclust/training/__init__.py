"""From rows to batches, and epochs over any method."""
