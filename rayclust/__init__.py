"""rayclust: from a bucket of unlabelled images to named, measured clusters."""

__version__ = "0.1.0"
