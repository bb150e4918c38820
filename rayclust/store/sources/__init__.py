"""Images and ready embeddings as users have them: folder trees, webdataset tars, Parquet, arrays."""

from rayclust.store.sources.base import Member, Record, Rows, Shard
from rayclust.store.sources.plan import fetch_many, plan_shards, read_records, read_rows

__all__ = ["Member", "Record", "Rows", "Shard", "fetch_many", "plan_shards", "read_records", "read_rows"]
