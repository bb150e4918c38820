"""Moved."""

from rayclust.search.knn import TopKInt64 as PackedTopK
from rayclust.search.knn import pack_keys as pack
from rayclust.search.knn import unpack_keys as unpack

__all__ = ["PackedTopK", "pack", "unpack"]
