"""Images and ready embeddings as users have them: folder trees, webdataset tars, Parquet, arrays."""

from rayclust.store.sources.base import MAX_RECORD_BYTES, Member, Record, Rows, Shard
from rayclust.store.sources.plan import (
    FORMATS,
    detect_format,
    fetch,
    fetch_many,
    plan_shards,
    read_classes,
    read_records,
    read_rows,
)

__all__ = [
    "FORMATS",
    "MAX_RECORD_BYTES",
    "Member",
    "Record",
    "Rows",
    "Shard",
    "detect_format",
    "fetch",
    "fetch_many",
    "plan_shards",
    "read_classes",
    "read_records",
    "read_rows",
]
