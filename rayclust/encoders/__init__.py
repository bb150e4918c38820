"""Bytes and words to rows."""
