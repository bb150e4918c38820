"""The rows of a run where each worker keeps those of its own coarse cells alone; see training/cells.py."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rayclust import collectives
from rayclust.config import FeaturesConfig, RunConfig
from rayclust.runtime.rows import BLOCK, StoredRows, cache_folder, mapped, part_features, row_starts, transform_of
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import Manifest
from rayclust.training.cells import Tally, at_hand, holders, places_of, summed, tally

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 32


def rows_of(config: RunConfig, encode: Manifest, digest: str, device: torch.device) -> StoredRows | CellRows:
    """A training's rows as this worker holds them: all, or its own cells' where the config says so.

    Args:
        config: the run's.
        encode: manifest of its embeddings.
        digest: of the training.
        device: where the worker computes.
    """
    run, cache, workers = Run(config.run), cache_folder(digest), collectives.world_size()
    if config.resources.rows == "whole" or workers == 1:
        return StoredRows(run, encode, config.features, cache, collectives.rank(), workers)
    holder = divided(run, encode, config, run.checkpoints(digest), device)
    return CellRows(run, encode, config.features, cache, Division(holder, device))


@dataclass(frozen=True)
class Division:
    """Who holds what, and how they who hold it talk."""

    holder: Tensor
    """Int16[N], the worker that holds each row, the same on all workers."""
    device: torch.device
    """What workers talk through."""


class CellRows:
    """A worker's own rows for the methods (`methods.base.Rows`), mapped from files of its own on its node.

    Args:
        run: the run.
        encode: manifest of its embeddings.
        features: what to make of them.
        cache: folder for this training's files on this node.
        division: the worker that holds each row.
    """

    def __init__(self, run: Run, encode: Manifest, features: FeaturesConfig, cache: Path, division: Division) -> None:
        holder = division.holder
        self._run, self._holder, self._device = run, holder, division.device
        self.tally: Tally | None = None
        """What the division leaves of the neighbours, once they have been asked for."""
        self._transform = transform_of(encode, features)
        self._starts = row_starts(encode)
        self._dimension = int(encode.extra["dimension"])
        self._worker = collectives.rank()
        self._owned = (holder == self._worker).nonzero()[:, 0]
        # Another division, or another worker's rows on the same node, are other files.
        self._cache = cache / f"{hashlib.sha256(_bytes(holder)).hexdigest()[:12]}-{self._worker}"

    @property
    def count(self) -> int:
        """N."""
        return self._starts[-1]

    @property
    def dimension(self) -> int:
        """D."""
        return self._dimension

    def owned(self) -> Tensor:
        """Int64[n], increasing: the rows of this worker's cells."""
        return self._owned

    def tensor(self) -> Tensor:
        """Float32[n D], mapped."""

        def fill(array: np.ndarray) -> None:
            for part, places, own in self._parts():
                array[places] = part_features(self._run, part, self._transform)[own]

        shape = (len(self._owned), self.dimension)
        return torch.from_numpy(mapped(self._cache / "features.npy", shape, np.float32, fill))

    def blocks(self) -> Iterator[Tensor]:
        """Float32[B D]s of this worker's rows; one at least."""
        yield from torch.split(self.tensor(), BLOCK)

    def neighbors(self) -> Tensor:
        """Int32[n M], mapped: places in `tensor`, −2 for what another worker holds. All workers ask together."""
        width = tables.read_table(self._run.neighbors(0), ["neighbors"]).schema.field("neighbors").type.list_size

        def fill(array: np.ndarray) -> None:
            where = places_of(self._holder, self._worker)
            for part, places, own in self._parts():
                ids = tables.matrix(tables.read_table(self._run.neighbors(part), ["neighbors"])["neighbors"])
                array[places] = at_hand(torch.from_numpy(ids[own]), where).numpy()

        shape = (len(self._owned), width)
        found = torch.from_numpy(mapped(self._cache / "neighbors.npy", shape, np.int32, fill))
        self.tally = self.tally or tally(found, self._device)
        return found

    def _parts(self) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Each part with rows of this worker: its index, their places here, and theirs in it."""
        done = 0
        for part, start in enumerate(self._starts[:-1]):
            own = (self._holder[start : self._starts[part + 1]] == self._worker).nonzero()[:, 0].numpy()
            if len(own):
                yield part, slice(done, done + len(own)), own
            done += len(own)


def divided(run: Run, encode: Manifest, config: RunConfig, kept: str, device: torch.device) -> Tensor:
    """The worker that holds each row; called by all workers together.

    Workers that go on from a checkpoint take the division that was made before, so that batches are the same.

    Args:
        run: the run.
        encode: manifest of its embeddings.
        config: of features and seed.
        kept: folder of the training's checkpoints.
        device: where to compute, and what workers talk through.

    Returns:
        Int16[N].
    """
    uri = filesystem.join(kept, f"holders-{collectives.world_size()}")
    count = row_starts(encode)[-1]
    found = _read(uri, count) if collectives.is_first() else None
    if int(collectives.all_sum(torch.tensor(int(found is not None), device=device))):
        return summed(torch.zeros(count, dtype=torch.int32) if found is None else found.int(), device).short()
    found = holders(_Blocks(run, encode, config.features, device), config.seed)
    if collectives.is_first():
        data = _bytes(found)
        filesystem.write_bytes(uri, hashlib.sha256(data).digest() + data)
    return found


def _read(uri: str, count: int) -> Tensor | None:
    """A division as it was written, if it is there and whole."""
    try:
        content = filesystem.read_bytes(uri)
    except filesystem.MissingError:
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest or len(data) != count * np.dtype(np.int16).itemsize:
        return None
    logger.info("cells: as they were")
    return torch.from_numpy(np.frombuffer(data, np.int16).copy())


def _bytes(holder: Tensor) -> bytes:
    return holder.numpy().tobytes()


class _Blocks:
    """Features of this worker's stretch of the parts, part by part."""

    def __init__(self, run: Run, encode: Manifest, features: FeaturesConfig, device: torch.device) -> None:
        self._run, self._device = run, device
        self._transform, self._dimension = transform_of(encode, features), int(encode.extra["dimension"])
        parts = len(row_starts(encode)) - 1
        self._own = range(parts)[collectives.stretches(parts, collectives.world_size())[collectives.rank()]]

    def __call__(self) -> Iterator[Tensor]:
        if not self._own:
            yield torch.empty(0, self._dimension, device=self._device)
        for part in self._own:
            yield torch.from_numpy(part_features(self._run, part, self._transform)).to(self._device)
