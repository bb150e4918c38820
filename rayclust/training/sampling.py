"""Batch sampling: row order, neighbour sampling, sharding across workers, and where rows are kept for it.

The order of an epoch is a function of (seed, epoch) and a row's sampled neighbour one of (seed, epoch, row). Neither
depends on the number of workers, so the union of the workers' parts is the same batch whatever that number is.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.errors import DataError, ShapeError
from rayclust.methods.base import Batch, Pairing, Rows
from rayclust.methods.settings import EMBEDDINGS, Plan

logger = logging.getLogger(__name__)

ORDER_STREAM, NEIGHBOR_STREAM, NOISE_STREAM, STEP_STREAM = range(4)
"""Streams of random numbers, kept apart by their number."""
MEMORY_FRACTION = 0.5
"""Part of the free memory, a GPU's or a worker's part of the node's, that one tensor may take."""

_MASK = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15 - 2**64  # signed, as tensors hold 64 bits
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed that depends on every number and on their order.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64's finaliser).
    """
    state = 0
    for number in numbers:
        state = (state + number + _WEYL) & _MASK
        for shift, multiplier in _MULTIPLIERS:
            state = ((state ^ (state >> shift)) * multiplier) & _MASK
        state ^= state >> 31
    return state >> 1


def row_hash(seed: int, rows: Tensor) -> Tensor:
    """Return a random number for each row, the same whatever other rows stand beside it.

    Args:
        seed: of the stream, of at most 63 bits.
        rows: Int64[B].

    Returns:
        Int64[B], uniform in [0, 2³¹).
    """

    def shifted(x: Tensor, bits: int) -> Tensor:
        """Shift to the right with zeros; torch repeats the sign."""
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    z = rows * _WEYL + seed
    for shift, multiplier in _MULTIPLIERS:
        z = (z ^ shifted(z, shift)) * multiplier
    return shifted(z ^ shifted(z, 31), 33)


def batch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits the rows: Int64[N], a permutation given by (seed, epoch)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, ORDER_STREAM, epoch))
    return torch.randperm(count, generator=generator)


def draw_neighbors(neighbors: Tensor, rows: Tensor, seed: int, epoch: int) -> Tensor:
    """Draw one neighbour of each row, uniformly; a function of (seed, epoch, row).

    Args:
        neighbors: Int[N M], −1 behind the last neighbour of a row that has fewer than M.
        rows: Int64[B], the rows that want one.
        seed: of the run.
        epoch: from 0.

    Returns:
        Int64[B]; a row without any neighbour is its own.
    """
    if neighbors.shape[1] == 0:
        return rows
    candidates = neighbors.index_select(0, rows)
    known = (candidates >= 0).sum(1)
    column = (row_hash(derive_seed(seed, NEIGHBOR_STREAM, epoch), rows) * known) >> 31
    drawn = candidates.gather(1, column[:, None])[:, 0].long()
    return torch.where(known > 0, drawn, rows)


class ArrayRows:
    """Rows in memory, with or without neighbours.

    Args:
        x: Float[N D], an array or tensor; or several by the names of their spaces.
        neighbors: Int[N M] or None; −1 where a row has fewer than M.
        members: other partitions of the rows, as `Rows.members` returns them.

    Raises:
        ShapeError: an argument is not a matrix, or they do not have one length.
        DataError: a neighbour's number is not below N.
    """

    def __init__(
        self,
        x: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray],
        neighbors: Tensor | np.ndarray | None = None,
        members: Sequence[Tensor] | None = None,
    ) -> None:
        by_space = x if isinstance(x, Mapping) else {EMBEDDINGS: x}
        self._x = {name: torch.as_tensor(rows) for name, rows in by_space.items()}
        self.spaces = tuple(self._x)
        for name, rows in self._x.items():
            require_matrix(rows, "x" if name == EMBEDDINGS else name)
            if len(rows) != len(self._x[self.spaces[0]]):
                counts = ", ".join(f"{space} {len(rows)}" for space, rows in self._x.items())
                raise ShapeError(f"spaces have different numbers of rows ({counts}); they must be the same rows")
        self.count = len(self._x[self.spaces[0]])
        self.dimensions = {name: rows.shape[1] for name, rows in self._x.items()}
        self.dimension = sum(self.dimensions.values())
        self._members = members
        for place, member in enumerate(members or ()):
            if member.dim() not in (1, 2) or len(member) != self.count:
                shape = tuple(member.shape)
                raise ShapeError(f"members.{place} has shape {shape}: {self.count} labels or probabilities are needed")
        self._neighbors = None if neighbors is None else torch.as_tensor(neighbors)
        if self._neighbors is not None:
            require_matrix(self._neighbors, "neighbors")
            if (given := len(self._neighbors)) != self.count:
                raise ShapeError(f"neighbors has {given} rows: {self.count} are needed, one for each row of x")
            if self._neighbors.numel() and (largest := int(self._neighbors.max())) >= self.count:
                raise DataError(f"neighbors holds {largest}: row numbers must be below {self.count}")

    def tensor(self, space: str | None = None) -> Tensor:
        """Return all rows, Float[N D]: of one space, or of all side by side."""
        if space is not None or len(self.spaces) == 1:
            return self._x[space or self.spaces[0]]
        rows = [functional.normalize(x, dim=1) for x in self._x.values()]
        return torch.cat(rows, dim=1) / math.sqrt(len(rows))

    def blocks(self, space: str | None = None) -> Iterator[Tensor]:
        """Yield this worker's rows, in order, as one block: one of W even slices."""
        yield self.tensor(space)[distributed.own_slice(self.count)]

    def neighbors(self) -> Tensor:
        """Return Int[N M].

        Raises:
            DataError: none were given.
        """
        if self._neighbors is None:
            raise DataError("neighbors = None: this method draws pairs of neighbours, give Int[N M]")
        return self._neighbors

    def members(self) -> Sequence[Tensor] | None:
        """Return the partitions that were given."""
        return self._members


class WordedArrayRows(ArrayRows):
    """Rows in memory with nouns that were chosen for them (`methods.tac.WordedRows`).

    Args:
        x: Float[N D], images.
        neighbors: Int[N M] or None, in image space.
        nouns: Float[V D], the chosen nouns.
        texts: the images' counterparts, with their neighbours in text space.
    """

    def __init__(self, x: Tensor, neighbors: Tensor | None, nouns: Tensor, texts: ArrayRows) -> None:
        super().__init__(x, neighbors)
        self._nouns, self._texts = nouns, texts

    def nouns(self) -> Tensor:
        """Return the chosen nouns' embeddings, Float[V D]."""
        return self._nouns

    def counterparts(self) -> ArrayRows:
        """Return the rows' counterparts in text."""
        return self._texts


class RowSource:
    """Batches of rows in one or more spaces, and of their neighbours.

    Args:
        rows: the rows; or those of each space by its name, all with the same N. Neighbours are the first one's, unless
            `pairing` says otherwise.
        pairing: what views to make.
        seed: of order, neighbours and noise.
        device: where batches go.
        dtype: of the views.
        each: whether views are of each of the rows' spaces, by its name; else the spaces stand side by side.
    """

    def __init__(
        self,
        rows: Rows | Mapping[str, Rows],
        pairing: Pairing,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        each: bool = False,
    ) -> None:
        if isinstance(rows, Mapping):
            first, tensors = next(iter(rows.values())), {name: space.tensor() for name, space in rows.items()}
        elif each:
            first, tensors = rows, {name: rows.tensor(name) for name in rows.spaces}
        else:
            first, tensors = rows, {EMBEDDINGS: rows.tensor()}
        self.count, self.pairing, self.seed = first.count, pairing, seed
        self.device, self.dtype = device, dtype
        self._x = {name: place_on_device(x, device) for name, x in tensors.items()}
        self._first = next(iter(self._x.values()))
        self._neighbors: list[Tensor] = []
        """Int[N M] of each space that draws of its own: the first, or all."""
        drawing = list(rows.values()) if pairing.own_neighbors and isinstance(rows, Mapping) else [first]
        for space in drawing if pairing.columns else ():
            neighbors = space.neighbors()
            if neighbors.shape[1] < min(pairing.columns, self.count - 1):
                logger.warning("neighbors: %d per row at hand, %d wanted", neighbors.shape[1], pairing.columns)
            self._neighbors.append(place_on_device(neighbors[:, : pairing.columns], self._first.device))

    def batches(self, plan: Plan, rank: int, start: int = 0) -> Iterator[Batch]:
        """Yield every W-th row of each batch.

        Args:
            plan: batch size and steps.
            rank: of the worker among those that divide the rows of a batch.
            start: steps that were done before.
        """
        workers = distributed.data_group().size
        for epoch in range(start // plan.steps_per_epoch, plan.epochs):
            order = None if self.pairing.epoch_order is None else self.pairing.epoch_order(epoch)
            order = (batch_order(self.count, self.seed, epoch) if order is None else order).to(self._first.device)
            first = epoch * plan.steps_per_epoch
            for step in range(max(start, first), min(first + plan.steps_per_epoch, plan.steps)):
                end = (step - first + 1) * plan.batch_size
                rows = order[end - plan.batch_size + rank : end : workers]
                spaces: dict[str, Tensor] = {}
                views = [rows]
                for number, (name, tensor) in enumerate(self._x.items()):
                    # 1. The rows and a neighbour of each; without its own, a space takes those of the first.
                    if number < len(self._neighbors):
                        near, seed = self._neighbors[number], derive_seed(self.seed, number) if number else self.seed
                        views = [rows, draw_neighbors(near, rows.to(near.device), seed, epoch).to(rows.device)]
                    chosen = torch.cat([view for view in views for _ in range(self.pairing.repeats)])
                    x = as_floats(gather_rows(tensor, chosen.to(tensor.device), self.device), self.dtype)
                    x = x.view(-1, len(rows), x.shape[1])
                    # 2. Noise, drawn for the whole batch, of which each worker takes its own rows.
                    if self.pairing.noise:
                        stream = (NOISE_STREAM, step) if number == 0 else (NOISE_STREAM, step, number)
                        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, *stream))
                        shape = (x.shape[0], plan.batch_size, x.shape[2])
                        noise = torch.randn(shape, generator=generator, device=self.device, dtype=x.dtype)
                        x = x + self.pairing.noise * noise[:, rank::workers]
                    spaces[name] = x
                yield Batch(spaces, rows, step, epoch, workers * len(rows) / plan.batch_size)


def place_on_device(x: Tensor, device: torch.device) -> Tensor:
    """Return the tensor where batches for `device` can be gathered from it: on the GPU, pinned, or as it is.

    It goes to the first of these of which it takes no more than `MEMORY_FRACTION`; as they are, the rows of a run are a
    file mapped into memory.
    """
    if device.type != "cuda" or x.device == device:
        return x
    size, (free, _) = x.numel() * x.element_size(), torch.cuda.mem_get_info(device)
    if size <= MEMORY_FRACTION * free:
        return x.to(device)
    return x.pin_memory() if size <= MEMORY_FRACTION * free_host_bytes() else x


def gather_rows(x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Return x[rows] on `device`: through pinned memory where it goes to a GPU, so that the copy does not wait.

    Args:
        x: Float[N D], from `place_on_device`.
        rows: Int64[B], on the device of `x`.
        device: where to.
    """
    if device.type != "cuda" or x.device.type == "cuda":
        return x.index_select(0, rows).to(device)
    chosen = torch.empty((len(rows), x.shape[1]), dtype=x.dtype, pin_memory=True)
    torch.index_select(x, 0, rows, out=chosen)
    return chosen.to(device, non_blocking=True)


def as_floats(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows as numbers. Bytes stand for their 255ths, rounded to halves as the tables of a run hold them."""
    return (x.float() / 255).half().to(dtype) if x.dtype == torch.uint8 else x.to(dtype)


def free_host_bytes() -> int:
    """Return this worker's part of the memory that the node, or the container's limit, has left; 0 if unknown."""
    left = []
    try:
        lines = _MEMINFO.read_text().splitlines()
        left += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:  # the control group's limit, if any; page cache that can be given back counts as free
        limit, used = (_CGROUP / "memory.max").read_text().strip(), int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            left.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
    except (OSError, ValueError):
        pass
    return min(left, default=0) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
