"""Partitions of a run's rows that lie in other runs or in tables, for methods that read some.

Rows are the same where their keys are. A member is named by a run's URI (its clusters), by `RUN#heads` (every head of a
model that was trained with `keep_heads`), or by a table *.parquet with the columns `key` and `cluster`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rayclust.arrays import IntArray
from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.methods.base import ManyHeads, as_member
from rayclust.runtime.pipeline import content_digest
from rayclust.runtime.rows import part_features, row_keys, row_starts, transform_of
from rayclust.runtime.tensors import load_method
from rayclust.store import storage, tables
from rayclust.store.manifest import Manifest, digest_of, read_manifest
from rayclust.store.run import Run, parts

HEADS = "#heads"
"""End of the name of a member that is all heads of a run's model."""


@dataclass(frozen=True)
class Members:
    """The partitions that a run's method reads: the plan of its stage train (`runtime.tensors.Partitions`)."""

    uris: tuple[str, ...]
    """Their names."""
    digest: str
    """Of their content, in order, as it was when the stage was planned."""

    def count(self) -> int:
        """Return the number of partitions: a name may stand for all heads of a model.

        Raises:
            ConfigError: a model holds one head alone.
        """
        total = 0
        for uri in self.uris:
            heads = 1
            if uri.endswith(HEADS):
                stored = storage.join(Run(uri.removesuffix(HEADS)).model_folder, "config.json")
                heads = int(storage.read_json(stored)["config"].get("heads", 1))
                if heads < 2:
                    raise ConfigError(
                        f"method.members: {uri}: the model holds one head; train it with method.keep_heads: true"
                    )
            total += heads
        return total

    def labels(self, run: Run, parts: int) -> Iterator[IntArray]:
        """Yield each partition, Int32[N] in the order of the rows of a run with so many parts.

        −1 where one has no opinion; raises as `read_member` does.
        """
        own = row_keys(run, parts)
        for uri in self.uris:
            yield from read_member(uri, own)


def plan_members(config: RunConfig) -> Members | None:
    """Digest the partitions that the method reads; None if it reads none.

    Raises:
        ConfigError: the number of clusters is open, or a member is the run itself.
        DataError: a member is missing or not finished.
    """
    uris = config.method.partitions()
    if not uris:
        return None
    if config.needs_selection:
        raise ConfigError(f"method.members = {list(uris)}: needs one number of clusters; set method.clusters")
    if any(uri.removesuffix(HEADS).rstrip("/") == config.run.rstrip("/") for uri in uris):
        raise ConfigError(f"method.members: {config.run} is this run itself, which each fit would change")
    return Members(tuple(uris), digest_of([_content(uri) for uri in uris]))


def _content(uri: str) -> Any:
    """Return JSON that changes with what a member says."""
    if uri.endswith(".parquet"):
        try:
            return hashlib.sha256(storage.read_bytes(uri)).hexdigest()
        except storage.MissingError:
            raise DataError(f"method.members: {uri} is missing") from None
    if uri.endswith(HEADS):
        return [content_digest(_finished(uri, stage)) for stage in ("encode", "train")]
    return content_digest(_finished(uri, "assign"))


def _finished(uri: str, stage: str) -> Manifest:
    manifest = read_manifest(Run(uri.removesuffix(HEADS)), stage)
    if manifest is None:
        raise DataError(f"method.members: {uri}: no run there has finished its stage {stage}")
    return manifest


def read_member(uri: str, own: pa.ChunkedArray) -> Iterator[IntArray]:
    """Yield the partitions of a member, Int32[N] in the order of the keys `own`, −1 where it has no opinion.

    Raises:
        ConfigError: a model holds one head alone.
        DataError: the member has other keys, or a table cannot be used.
    """
    if uri.endswith(".parquet"):
        try:
            table = tables.read_table(uri, ["key", "cluster"])
            keys, cluster = table["key"].cast(pa.string()), table["cluster"].cast(pa.int64()).fill_null(-1)
        except (pa.ArrowException, ArtefactError) as error:
            raise DataError(
                f"method.members: {uri}: needs columns key and cluster of whole numbers ({error})"
            ) from error
        columns: Iterable[Any] = [cluster]
    elif uri.endswith(HEADS):
        # The labels that each head gives, Int64[H N].
        place, encode = uri.removesuffix(HEADS), _finished(uri, "encode")
        config = validate(storage.read_json(Run(place).config) | {"run": place})
        run, count = Run(place, config.spaces), len(row_starts(encode)) - 1
        method = load_method(run.uri, content_digest(_finished(uri, "train")))
        if not isinstance(method, ManyHeads):
            raise ConfigError(f"method.members: {uri}: {config.method.name} has no heads")
        transform = transform_of(encode, config.features)
        features = (torch.from_numpy(part_features(run, part, transform)) for part in range(count))
        keys, columns = row_keys(run, count), torch.cat([method.predict_heads(x) for x in features], dim=1)
    else:
        assigned = [tables.read_table(part, ["key", "cluster"]) for _, part in parts(Run(uri).assignments_folder)]
        joined = pa.concat_tables(assigned)
        keys, columns = joined["key"], [joined["cluster"]]
    positions = None
    if not keys.equals(own):
        found = pc.index_in(own, value_set=keys.combine_chunks())
        if len(keys) != len(own) or found.null_count:
            missing = found.null_count
            raise DataError(
                f"method.members: {uri} has {len(keys):,} rows, of which {len(own) - missing:,} are among the "
                f"{len(own):,} of this run by their keys: members need the same rows"
            )
        positions = found.to_numpy()
    for column in columns:
        labels = as_member(np.asarray(column)).numpy().astype(np.int32)
        yield labels if positions is None else labels[positions]
