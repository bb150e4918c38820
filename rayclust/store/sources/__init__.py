"""Images and ready embeddings as users have them: folder trees, webdataset tars, Parquet, arrays."""

from rayclust.store.sources.fetch import fetch, fetch_many
from rayclust.store.sources.labels import read_classes
from rayclust.store.sources.plan import FORMATS, detect_format, plan_shards
from rayclust.store.sources.read import read_records, read_rows
from rayclust.store.sources.shard import MAX_RECORD_BYTES, Member, Record, Rows, Shard

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
