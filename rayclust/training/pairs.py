"""Rows to batches: who comes when, with which neighbour, on which worker.

The order of an epoch is a function of (seed, epoch) and a row's partner one of (seed, epoch, row). Neither knows the
number of workers, so the union of the workers' shares is the same batch whatever that number is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.methods.base import Batch, Pairing, Plan, Rows

logger = logging.getLogger(__name__)

_MASK = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_HELD_SHARE = 0.5
"""Share of a GPU's free memory that the rows may take; larger sets stay in pinned memory."""

ORDER, PARTNERS, NOISE, STEPS = range(4)
"""Streams of random numbers, kept apart by their number."""


def mix(*numbers: int) -> int:
    """A 63-bit seed that depends on every number and on their order.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64's finaliser).
    """
    state = 0
    for number in numbers:
        state = (state + number + _WEYL) & _MASK
        for shift, multiplier in _MULTIPLIERS:
            state = ((state ^ (state >> shift)) * multiplier) & _MASK
        state ^= state >> 31
    return state >> 1


def _signed(number: int) -> int:
    """The same 64 bits as the signed number that tensors hold."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int64s, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hashed(seed: int, rows: Tensor) -> Tensor:
    """A random number for each row, the same whatever other rows stand beside it.

    Args:
        seed: of the stream.
        rows: Int64[B].

    Returns:
        Int64[B], uniform in [0, 2³¹).
    """
    z = rows * _signed(_WEYL) + _signed(seed)
    for shift, multiplier in _MULTIPLIERS:
        z = (z ^ _shifted(z, shift)) * _signed(multiplier)
    return _shifted(z ^ _shifted(z, 31), 33)


def batch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the rows: Int64[N], a permutation that depends on (seed, epoch) only."""
    generator = torch.Generator().manual_seed(mix(seed, ORDER, epoch))
    return torch.randperm(count, generator=generator)


def draw_partners(neighbors: Tensor, rows: Tensor, seed: int, epoch: int) -> Tensor:
    """One neighbour of each row, uniformly; a function of (seed, epoch, row).

    Args:
        neighbors: Int[N M], −1 behind the last neighbour of a row that has fewer than M.
        rows: Int64[B], the rows that want a partner.
        seed: of the run.
        epoch: from 0.

    Returns:
        Int64[B]; a row without any neighbour is its own partner.
    """
    if neighbors.shape[1] == 0:
        return rows
    candidates = neighbors.index_select(0, rows)
    known = (candidates >= 0).sum(1)
    column = (hashed(mix(seed, PARTNERS, epoch), rows) * known) >> 31
    drawn = candidates.gather(1, column[:, None])[:, 0].long()
    return torch.where(known > 0, drawn, rows)


class ArrayRows:
    """Rows in memory, with or without neighbours.

    Args:
        x: Float[N D], an array or tensor.
        neighbors: Int[N M] or None; −1 where a row has fewer than M.

    Raises:
        ShapeError: an argument is not a matrix, or the two do not have one length.
        DataError: a neighbour's number is not below N.
    """

    def __init__(self, x: Tensor | np.ndarray, neighbors: Tensor | np.ndarray | None = None) -> None:
        self._x = torch.as_tensor(x)
        require_matrix(self._x, "x")
        self._neighbors = None if neighbors is None else torch.as_tensor(neighbors)
        if self._neighbors is not None:
            _require_neighbors(self._neighbors, len(self._x))

    @property
    def count(self) -> int:
        """N."""
        return len(self._x)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._x.shape[1])

    def tensor(self) -> Tensor:
        """Float[N D]."""
        return self._x

    def blocks(self) -> Iterator[Tensor]:
        """This worker's rows, in order, as one block: the n-th of W equal stretches."""
        workers, number = collectives.world_size(), collectives.rank()
        yield self._x[number * self.count // workers : (number + 1) * self.count // workers]

    def neighbors(self) -> Tensor:
        """Int[N M].

        Raises:
            DataError: none were given.
        """
        if self._neighbors is None:
            raise DataError("neighbors = None: this method draws pairs of neighbours, give Int[N M]")
        return self._neighbors


def _require_neighbors(neighbors: Tensor, count: int) -> None:
    require_matrix(neighbors, "neighbors")
    if len(neighbors) != count:
        raise ShapeError(f"neighbors has {len(neighbors)} rows: {count} are needed, one for each row of x")
    if neighbors.numel() and int(neighbors.max()) >= count:
        raise DataError(f"neighbors holds {int(neighbors.max())}: row numbers must be below {count}")


class PairBatches:
    """This worker's shares of the batches of a plan, from tensors that it holds.

    Args:
        rows: where the tensors come from; read once.
        plan: batch size and steps.
        pairing: what views to make.
        seed: of order, partners and noise.
        like: a tensor of the device and dtype that batches go to.

    Raises:
        ConfigError: there are more workers than rows in a batch.
    """

    def __init__(self, rows: Rows, plan: Plan, pairing: Pairing, seed: int, like: Tensor) -> None:
        if plan.batch_size < collectives.world_size():
            raise ConfigError(
                f"workers = {collectives.world_size()}: a batch has only {plan.batch_size} rows, use no more workers"
            )
        self.plan, self.pairing, self.seed = plan, pairing, seed
        self.device, self.dtype = like.device, like.dtype
        self.count = rows.count
        self._x = _held(rows.tensor(), like.device)
        self._neighbors = None
        if pairing.columns:
            neighbors = rows.neighbors()
            if neighbors.shape[1] < min(pairing.columns, rows.count - 1):
                logger.warning("neighbors: %d per row at hand, %d wanted", neighbors.shape[1], pairing.columns)
            self._neighbors = _held(neighbors[:, : pairing.columns].contiguous(), self._x.device)

    def epoch(self, epoch: int, skipped: int = 0) -> Iterator[Batch]:
        """The shares of one epoch's batches.

        Args:
            epoch: from 0.
            skipped: batches of the epoch that were trained on before.
        """
        order = batch_order(self.count, self.seed, epoch).to(self._x.device)
        size, per_epoch = self.plan.batch_size, self.plan.steps_per_epoch
        for index in range(skipped, min(per_epoch, self.plan.steps - epoch * per_epoch)):
            yield self._share(order[index * size : (index + 1) * size], epoch * per_epoch + index, epoch)

    def _share(self, batch: Tensor, step: int, epoch: int) -> Batch:
        workers, number = collectives.world_size(), collectives.rank()
        rows = batch[number::workers]
        views = [rows]
        if self._neighbors is not None:
            views.append(draw_partners(self._neighbors, rows, self.seed, epoch))
        chosen = torch.cat([view for view in views for _ in range(self.pairing.repeats)])
        x = self._x.index_select(0, chosen).to(self.device, non_blocking=True).to(self.dtype)
        x = x.view(-1, len(rows), x.shape[1])
        if self.pairing.noise:
            x = x + self._noise(x, len(batch), step)[:, number::workers]
        return Batch(x, rows, step, epoch, share=workers * len(rows) / len(batch))

    def _noise(self, x: Tensor, batch: int, step: int) -> Tensor:
        """Float[V batch D]: noise for the whole batch, of which each worker takes its own rows."""
        generator = torch.Generator(self.device).manual_seed(mix(self.seed, NOISE, step))
        shape = (x.shape[0], batch, x.shape[2])
        return self.pairing.noise * torch.randn(shape, generator=generator, device=self.device, dtype=x.dtype)


def _held(x: Tensor, device: torch.device) -> Tensor:
    """The tensor where batches can be taken from it by index: on the GPU if it fits well, else pinned."""
    if device.type != "cuda" or x.device == device:
        return x
    free, _ = torch.cuda.mem_get_info(device)
    if x.numel() * x.element_size() <= _HELD_SHARE * free:
        return x.to(device)
    return x.pin_memory()
