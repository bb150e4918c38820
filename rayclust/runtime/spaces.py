"""The spaces of a run with several encoders: rows that its encoders made, and ready embeddings, found by their keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from rayclust.config import RunConfig
from rayclust.encoders.tensors import load_tensors
from rayclust.errors import DataError
from rayclust.runtime import datasets
from rayclust.store import storage, tables
from rayclust.store.manifest import read_manifest, read_output
from rayclust.store.run import Run
from rayclust.store.sources import Rows, Shard, plan_shards, read_rows

if TYPE_CHECKING:
    from rayclust.search.index import VectorIndex

ENCODER, OWN = "encoder", "z"
"""The spaces that a run can be searched in."""
ENCODER_INDEX, OWN_INDEX = "encoder.faiss", "z.faiss"
"""Files of the indexes: of the encoder's space, the first of several, and of the method's own."""
NUMBERED = ("parquet", "embeddings_parquet", "embeddings_npy", "embeddings_pt")
"""Kinds of input whose rows are named by their numbers in the file where it gives no keys."""


@dataclass(frozen=True)
class ReadySpace:
    """Ready embeddings of one of a run's spaces; its rows are found by the keys of the run's."""

    name: str
    """Of the space."""
    uri: str
    """A file or folder, as RUN.yaml has it."""
    shards: tuple[Shard, ...]
    width: int
    """D."""
    files: tuple[str, str] | None = None
    """Where the run's rows and these each come from one file: their names, which numbers of rows begin with."""

    def rows(self, keys: Sequence[str], near: int) -> np.ndarray:
        """Return the embeddings of the rows with some keys, Float[n D].

        Args:
            keys: of the run's rows.
            near: number of the first of them in the run: where equally ordered embeddings have them too. Shards far
                from there are read only for keys that were not found nearer.

        Raises:
            DataError: a key is missing, or stands for two rows.
        """
        wanted = {self._own_key(key): place for place, key in enumerate(keys)}
        if len(wanted) < len(keys):
            twice = next(key for place, key in enumerate(keys) if wanted[self._own_key(key)] != place)
            raise DataError(f"{self._source}: two rows of the run have the key {twice}: they must differ")
        found, reasons = dict[int, np.ndarray](), dict[str, str]()
        end = near + len(keys)
        order = sorted(self.shards, key=lambda s: max(s.first - end, near - s.first - (s.count or 0), 0))
        for shard in order if keys else ():
            read = _read(json.dumps(asdict(shard)), self.width)
            reasons |= {reject["key"]: reject["reason"] for reject in read.rejects if reject["key"] in wanted}
            found |= {wanted[key]: row for key, row in zip(read.keys, read.embeddings, strict=True) if key in wanted}
            if len(found) == len(keys):
                break
        missing = next((key for place, key in enumerate(keys) if place not in found), None)
        if missing is not None:
            why = reasons.get(self._own_key(missing), "no row has this key")
            raise DataError(f"{self._source}: lacks the run's row {missing} ({why}); all spaces need the same rows")
        return np.stack([found[place] for place in range(len(keys))]) if keys else np.zeros((0, self.width), np.float16)

    def refuse_surplus(self, run: Run, parts: int, known: int) -> None:
        """Raise `DataError` if it has more rows than the run has rows and rejects; the line names the first.

        Args:
            run: with so many `parts`, all written.
            parts: their number.
            known: rows and rejects of the run.
        """
        counts = [shard.count for shard in self.shards]
        if None in counts or sum(count or 0 for count in counts) <= known:
            return
        own = set[str]()
        for part in range(parts):
            own.update(map(self._own_key, tables.read_table(run.rows(part), ["key"])["key"].to_pylist()))
        read = (key for shard in self.shards for key in _read(json.dumps(asdict(shard)), self.width).keys)
        surplus = next((key for key in read if key not in own), None)
        if surplus is not None:
            raise DataError(f"{self._source}: has the row {surplus}, which the run's other spaces lack; remove it")

    def _own_key(self, key: str) -> str:
        """Return a key of the run as it is here: rows without keys are named by file and number."""
        name, _, number = key.rpartition("/")
        if self.files is not None and name == self.files[0] and number.isdigit():
            return f"{self.files[1]}/{number}"
        return key

    @property
    def _source(self) -> str:
        return f"encoders: embeddings = {self.uri} of the space {self.name}"


@lru_cache(2)
def _read(shard: str, width: int | None) -> Rows:
    """Read a shard, JSON. Cached: the run's parts may be smaller than the shards of its ready embeddings."""
    return read_rows(Shard.from_json(json.loads(shard)), load_tensors=load_tensors, width=width)


def plan_ready(config: RunConfig, shards: Sequence[Shard]) -> Iterator[ReadySpace]:
    """Yield the run's spaces of ready embeddings, as listed now.

    Args:
        config: of the run.
        shards: of its input.

    Raises:
        DataError: embeddings are missing, or none can be used.
    """
    named = {key: name for key, name in config.images.columns.items() if key in ("embedding", "key")}
    for encoder in config.encoders:
        if encoder.embeddings is None:
            continue
        source = datasets.local_folder(encoder.embeddings)
        found = tuple(plan_shards(source, "embeddings", "none", shard_size=config.images.shard_size, columns=named))
        read = (_read(json.dumps(asdict(shard)), None) for shard in found)
        width = next((rows.embeddings.shape[1] for rows in read if len(rows.keys)), None)
        if width is None:
            raise DataError(f"encoders: embeddings = {encoder.embeddings}: holds no usable row")
        one_file = {shard.uri for shard in shards}, {shard.uri for shard in found}
        has_names = all(len(uris) == 1 for uris in one_file) and shards[0].kind in NUMBERED
        files = (shards[0].name, found[0].name) if has_names else None
        yield ReadySpace(encoder.space, encoder.embeddings, found, int(width), files)


@dataclass(frozen=True)
class SpaceTables:
    """Divides what a run's encoders made, all spaces side by side, into its spaces, and adds ready embeddings."""

    names: tuple[str, ...]
    """Of all spaces, in order."""
    encoded: Mapping[str, int]
    """D of the spaces that are encoded, by name, in order."""
    ready: tuple[ReadySpace, ...] = ()

    def divide(self, embeddings: np.ndarray, keys: Sequence[str], near: int) -> dict[str, np.ndarray]:
        """Return the embeddings by space, Float[n D], of the rows with some keys.

        Args:
            embeddings: Float[n ΣD] of the encoded spaces.
            keys: of the rows.
            near: see `ReadySpace.rows`.
        """
        found = {space.name: space.rows(keys, near) for space in self.ready}
        ends = np.cumsum([0, *self.encoded.values()]).tolist()
        for name, start, end in zip(self.encoded, ends[:-1], ends[1:], strict=True):
            found[name] = embeddings[:, start:end]
        return {name: found[name] for name in self.names}


def learnt_index(config: RunConfig) -> VectorIndex | None:
    """Return the index over what the run's method has learnt from pixels; None for other methods, or before `index`.

    Their encoder's rows are the pixels themselves: what is near there need not be alike.
    """
    run = Run(config.run)
    if not config.method.reads_pixels or read_manifest(run, "index") is None:
        return None
    from rayclust.search.index import load_index  # brings faiss

    return load_index(read_output(run, "index", storage.join(run.index_folder, OWN_INDEX)))


def index_file(space: str | None, spaces: Sequence[str]) -> str:
    """Return the name of the file with the index over an encoder's space; None is the first of a run's spaces."""
    return ENCODER_INDEX if space is None or space == spaces[0] else f"{space}.faiss"
