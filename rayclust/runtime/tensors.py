"""Rows of a run as tensors, mapped from a file of the node, and the fitted method: written, read, applied."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from rayclust.arrays import IntArray
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.features import FeaturesConfig, SpaceTransforms
from rayclust.methods import load
from rayclust.methods.base import Method, MethodState, Rows, Transform
from rayclust.methods.settings import EMBEDDINGS, NO_NEIGHBOR
from rayclust.runtime.rows import (
    fitted_count,
    kept_aside,
    part_features,
    row_keys,
    row_starts,
    space_widths,
    transform_of,
)
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, Manifest, Outputs, put_bytes, put_json, read_manifest, read_unchanged
from rayclust.store.run import Run
from rayclust.training.sampling import as_floats

BLOCK = 8192
"""Rows that a method is given at once."""
_TRANSFORMED = 4096
"""Rows that a fitted method maps to its own space at once."""


def unit_rows(x: Tensor) -> Tensor:
    """Scale rows to length 1 whatever `features` left them at: neighbours are by cosine."""
    return torch.nn.functional.normalize(x, dim=1)


def blocks(
    run: Run, starts: list[int], transform: SpaceTransforms, aside: np.ndarray | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield Float32[B D] unit features and Int64[B] rows of every part that has rows, in order.

    Rows kept aside, Bool[N], are left out; None leaves out none.
    """
    for part, (start, stop) in enumerate(pairwise(starts)):
        rows = np.arange(start, stop) if aside is None else start + np.flatnonzero(~aside[start:stop])
        if len(rows):
            features = torch.from_numpy(part_features(run, part, transform)[rows - start])
            yield unit_rows(features), torch.from_numpy(rows)


class Partitions(Protocol):
    """Partitions of a run's rows from outside of it, for a method that reads some; sent to every worker."""

    digest: str
    """Of their content."""

    def count(self) -> int:
        """Return how many there are."""

    def labels(self, run: Run, parts: int) -> Iterator[IntArray]:
        """Yield each, Int32[N] in the order of the rows of a run with so many parts; −1 where it has no opinion."""


class StoredRows(Rows):
    """Rows of a run that are not kept aside, for the methods, mapped from a file on the node.

    The first worker on a node copies the rows into the file; all workers of the node map it, so that rows beyond memory
    stream from disk and the page cache is shared.

    Args:
        run: the run.
        encode: manifest of its embeddings.
        features: settings of the features.
        cache: folder for this training's files on this node.
        worker, workers: rank of this worker, and their number.
        are_bytes: whether rows are bytes over 255, as those of the encoder `pixels`: the file then holds the bytes.
        partitions: those that the method reads; one worker of a node reads them, all map the file.
    """

    def __init__(
        self,
        run: Run,
        encode: Manifest,
        features: FeaturesConfig,
        cache: Path,
        worker: int = 0,
        workers: int = 1,
        *,
        are_bytes: bool = False,
        partitions: Partitions | None = None,
    ) -> None:
        self.run, self.cache = run, cache
        self._transform = transform_of(encode, features)
        self.starts = row_starts(encode)
        self._worker, self._workers, self._are_bytes, self._partitions = worker, workers, are_bytes, partitions
        self._aside = kept_aside(run, encode.outputs_of(EncodeOutputs))
        self.count = fitted_count(encode)
        """Number of rows, N."""
        self.dimensions = space_widths(encode.outputs_of(EncodeOutputs))
        """D of each space, by its name."""
        self.spaces = tuple(self.dimensions)
        """Names of the spaces."""
        self.dimension = sum(self.dimensions.values())
        """Width of a row, D, of all spaces side by side."""

    def tensor(self, space: str | None = None) -> Tensor:
        """Return Float32[N D], mapped: all spaces side by side, or one; UInt8[N D] of bytes, see `as_floats`."""
        if space is None:
            path, width, transform = self.cache / "features.npy", self.dimension, self._transform
        else:
            path, width = self.cache / f"features-{space}.npy", self.dimensions[space]
            transform = self._transform.only(space)
        parts = range(len(self.starts) - 1)
        features = (self.fitted(part, part_features(self.run, part, transform)) for part in parts)
        if self._are_bytes:
            features = (np.rint(255 * block).astype(np.uint8) for block in features)
        return mapped(path, (self.count, width), np.uint8 if self._are_bytes else np.float32, features)

    def fitted(self, part: int, values: np.ndarray) -> np.ndarray:
        """Return the values of a part's rows that are not kept aside."""
        start, stop = self.starts[part : part + 2]
        return values if self._aside is None else values[~self._aside[start:stop]]

    def blocks(self, space: str | None = None) -> Iterator[Tensor]:
        """Yield Float32[B D] blocks of this worker's contiguous share of the rows, of all spaces or of one."""
        yield from self.own_blocks(self.tensor(space))

    def own_blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield this worker's contiguous share of the rows of a tensor [N D], block by block."""
        first = self.count * self._worker // self._workers
        end = self.count * (self._worker + 1) // self._workers
        for start in range(first, end, BLOCK):
            yield as_floats(x[start : min(start + BLOCK, end)], torch.float32)

    def neighbors(self) -> Tensor:
        """Return Int64[N M], mapped."""
        return self.mapped_neighbors("neighbors.npy", self.run.neighbors)

    def mapped_neighbors(self, name: str, uri_of: Callable[[int], str]) -> Tensor:
        """Return Int64[N M] of the fitted rows, mapped from a file of that name, read from a table of each part."""
        uris = [uri_of(part) for part in range(len(self.starts) - 1)]
        width = tables.read_table(uris[0], ["neighbors"]).schema.field("neighbors").type.list_size
        read = (tables.matrix(tables.read_table(uri, ["neighbors"])["neighbors"]) for uri in uris)
        found = (self.fitted(part, neighbors) for part, neighbors in enumerate(read))
        if self._aside is not None:  # neighbours are fitted rows as well: number them among these
            positions = np.cumsum(~self._aside) - 1
            found = (np.where(neighbors < 0, NO_NEIGHBOR, positions[neighbors]) for neighbors in found)
        return mapped(self.cache / name, (self.count, width), np.int64, found)

    def nouns(self) -> Tensor:
        """Return Float32[V D], the nouns that were chosen for the run (`methods.tac.WordedRows`).

        Raises:
            ArtefactError: none were.
        """
        column = tables.read_table(self.run.nouns, ["embedding"])["embedding"]
        return torch.from_numpy(tables.matrix(column).copy())

    def members(self) -> list[Tensor] | None:
        """Return the partitions, Int32[N] each, mapped; None without any."""
        if self._partitions is None:
            return None
        fitted = slice(None) if self._aside is None else ~self._aside
        found = (each[fitted][None] for each in self._partitions.labels(self.run, len(self.starts) - 1))
        path = self.cache / f"members-{self._partitions.digest}.npy"
        return list(mapped(path, (self._partitions.count(), self.count), np.int32, found))

    def table(self, columns: Mapping[str, Tensor]) -> pa.Table:
        """Return a table of values of the rows, [N] each by name, with the numbers and keys of the rows."""
        numbers = np.arange(self.starts[-1])
        parts = range(len(self.starts) - 1)
        fitted = [self.fitted(part, numbers[self.starts[part] : self.starts[part + 1]]) for part in parts]
        rows, keys = np.concatenate(fitted), row_keys(self.run, len(parts))
        named = {name: column.cpu().numpy() for name, column in columns.items()}
        return pa.table({"row": rows, "key": keys.take(pa.array(rows))} | named).combine_chunks()

    def counterparts(self) -> StoredCounterparts:
        """Return the rows' counterparts in text."""
        return StoredCounterparts(self)


class StoredCounterparts(Rows):
    """Counterparts in text of the fitted rows of a run, in their order, as rows of a space of their own.

    Args:
        rows: the rows.
    """

    def __init__(self, rows: StoredRows) -> None:
        self._rows = rows
        self.count, self.dimension = rows.count, rows.dimension
        self.spaces, self.dimensions = (EMBEDDINGS,), {EMBEDDINGS: rows.dimension}

    def tensor(self, space: str | None = None) -> Tensor:
        """Return Float32[N D], mapped."""
        rows, run = self._rows, self._rows.run
        uris = [run.counterparts(part) for part in range(len(rows.starts) - 1)]
        read = (tables.matrix(tables.read_table(uri, ["embedding"])["embedding"]) for uri in uris)
        found = (rows.fitted(part, texts) for part, texts in enumerate(read))
        return mapped(rows.cache / "counterparts.npy", (self.count, self.dimension), np.float32, found)

    def blocks(self, space: str | None = None) -> Iterator[Tensor]:
        """Yield Float32[B D] blocks of this worker's rows, the same rows as `StoredRows.blocks`."""
        yield from self._rows.own_blocks(self.tensor())

    def neighbors(self) -> Tensor:
        """Return Int64[N M], mapped."""
        return self._rows.mapped_neighbors("text-neighbors.npy", self._rows.run.text_neighbors)


def mapped(path: Path, shape: tuple[int, ...], dtype: type, blocks: Iterable[np.ndarray]) -> Tensor:
    """Map a tensor from a file, which the first process to call fills while the others wait.

    Args:
        path: the file; it exists only once it is complete.
        shape: of the tensor.
        dtype: of its elements, numpy's.
        blocks: its rows, in order; taken only by the process that fills the file.

    Raises:
        DataError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for left in path.parent.glob(f"{path.stem}.*.unfinished"):  # by a process that was killed with the lock
                left.unlink(missing_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
            array = np.lib.format.open_memmap(unfinished, "w+", dtype, shape)
            try:
                # A mapped file that finds the disk full later kills its process: take all bytes now.
                with unfinished.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, unfinished.stat().st_size)
            except OSError as error:
                # Other errors: this file system cannot reserve.
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    unfinished.unlink(missing_ok=True)
                    raise DataError(
                        f"{unfinished}: no space left for the rows of the training; free some, or set RAYCLUST_SCRATCH "
                        "to another disk"
                    ) from error
            start = 0
            for block in blocks:
                array[start : start + len(block)] = block
                start += len(block)
            array.flush()
            del array
            unfinished.replace(path)
    # Copy-on-write: torch wants writable memory, and nothing written there reaches the file.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def save_method(run: Run, state: MethodState, folder: str) -> Outputs:
    """Write a fitted method to a folder below the run: safetensors and JSON, never a pickle."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    weights = put_bytes(run, storage.join(folder, "weights.safetensors"), safetensors.torch.save(tensors))
    return weights | put_json(run, storage.join(folder, "config.json"), state.settings)


@lru_cache(2)
def load_method(uri: str, digest: str) -> Method:
    """Load the fitted method of the run at a URI; the two most recent stay in memory.

    The content digest of its train stage lets a new model be read anew. Raise `ArtefactError` if it is damaged.
    """
    manifest = read_manifest(Run(uri), "train")
    digests = {path: written.digest for path, written in manifest.outputs.items()} if manifest else {}
    return read_method(Run(uri).model_folder, "train", digests)


def read_method(folder: str, stage: str, digests: Mapping[str, str] | None = None) -> Method:
    """Load the fitted method in the folder at a URI, which `stage` writes.

    `digests` are SHA-256 by path, as the files were written; None compares nothing. Raise `ArtefactError` if one is
    missing or damaged.
    """
    config, weights = (storage.join(folder, name) for name in ("config.json", "weights.safetensors"))
    known = {path.rpartition("/")[2]: digest for path, digest in (digests or {}).items()}
    settings = storage.read_json(config, read_unchanged(config, known.get("config.json"), stage))
    data = read_unchanged(weights, known.get("weights.safetensors"), stage)
    try:
        return load(MethodState(settings, safetensors.torch.load(data)))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtefactError(f"{folder}: the model is damaged ({error}); run {stage} again with --force") from error


def method_inputs(
    method: Method, transform: SpaceTransforms, embeddings: np.ndarray
) -> np.ndarray | dict[str, np.ndarray]:
    """Return features of Float[B ΣD] embeddings as `method.predict_proba` takes them: side by side, or by space."""
    return transform.split(embeddings) if method.spaces is None else transform(embeddings)


def transform_rows(method: Method, features: np.ndarray) -> np.ndarray:
    """Return Float32[B d], rows in the method's own space, from features Float32[B D], block by block."""
    if not isinstance(method, Transform):
        raise ConfigError(f"method.name = {method.config.name}: has no space of its own")
    with torch.inference_mode():
        rows = [method.transform(part).float().numpy() for part in torch.from_numpy(features).split(_TRANSFORMED)]
    return np.concatenate(rows) if rows else np.zeros((0, method.width), np.float32)
