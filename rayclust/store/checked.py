"""Moved."""

from rayclust.store.manifest import CHECKSUM, digest_of
from rayclust.store.manifest import read_checked as read
from rayclust.store.manifest import write_checked as write

__all__ = ["CHECKSUM", "digest_of", "read", "write"]
