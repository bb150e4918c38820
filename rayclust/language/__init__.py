"""Where words meet images."""
