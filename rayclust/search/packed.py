"""Moved."""

from rayclust.search.knn import TopKInt64 as PackedTopK  # noqa: F401
from rayclust.search.knn import pack_keys as pack  # noqa: F401
from rayclust.search.knn import unpack_keys as unpack  # noqa: F401
