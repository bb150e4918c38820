"""Where everything is read from and written to."""
