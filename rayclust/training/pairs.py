"""Rows to batches: who comes when, with which neighbour, on which worker.

The order of an epoch is a function of (seed, epoch) and a row's partner one of (seed, epoch, row). Neither knows the
number of workers, so the union of the workers' shares is the same batch whatever that number is. Where each worker
holds rows of its own (`cells`), it brings its part of every batch from them and draws partners among them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.methods.base import FOREIGN, NONE, Batch, Pairing, Plan, Rows
from rayclust.training.cells import Stretches
from rayclust.training.holding import held, taken

logger = logging.getLogger(__name__)

_MASK = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

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


def batch_order(count: int, seed: int, epoch: int, *more: int) -> Tensor:
    """The order in which an epoch visits the rows: Int64[N], a permutation that depends on these numbers only."""
    generator = torch.Generator().manual_seed(mix(seed, ORDER, epoch, *more))
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


def draw_partners_at_hand(
    neighbors: Tensor, places: Tensor, numbers: Tensor, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """`draw_partners` for a worker that holds a part of the rows: who draws another worker's row draws once more.

    The first draw is the one of `draw_partners`. The second is among the row's neighbours at hand, uniformly as well,
    so that partners are distributed as if those of other workers were no neighbours.

    Args:
        neighbors: Int[n M], places of the neighbours, −2 for those of other workers.
        places: Int64[B], of the rows that want a partner.
        numbers: Int64[B], of these rows.
        seed: of the run.
        epoch: from 0.

    Returns:
        Int64[B], places; a row without any neighbour at hand is its own partner. Bool[B], which drew another worker's.
    """
    candidates = neighbors.index_select(0, places)
    drawn = _pick(candidates, candidates != NONE, hashed(mix(seed, PARTNERS, epoch), numbers))
    near = _pick(candidates, candidates >= 0, hashed(mix(seed, PARTNERS, epoch, 1), numbers))
    partners = torch.where(drawn == FOREIGN, near, drawn)
    return torch.where(partners >= 0, partners, places), drawn == FOREIGN


def _pick(candidates: Tensor, eligible: Tensor, chance: Tensor) -> Tensor:
    """An eligible one of each row's candidates, Int64[B], by numbers in [0, 2³¹); −1 for a row without any."""
    if candidates.shape[1] == 0:
        return torch.full_like(chance, NONE)
    wanted = (chance * eligible.sum(1)) >> 31
    column = (eligible.cumsum(1) > wanted[:, None]).int().argmax(1)
    return candidates.gather(1, column[:, None])[:, 0].long().where(eligible.any(1), NONE)


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

    def owned(self) -> None:
        """None: every worker holds all rows."""

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
        ConfigError: there are too many workers for the rows of a batch.
    """

    def __init__(self, rows: Rows, plan: Plan, pairing: Pairing, seed: int, like: Tensor) -> None:
        if plan.batch_size < collectives.world_size():
            raise ConfigError(
                f"workers = {collectives.world_size()}: a batch has only {plan.batch_size} rows, use no more workers"
            )
        self.plan, self.pairing, self.seed = plan, pairing, seed
        self.device, self.dtype = like.device, like.dtype
        self.count = rows.count
        owned = rows.owned()
        self._stretches = None if owned is None else Stretches.of(len(owned), plan.batch_size, like.device)
        self._x = held(rows.tensor(), like.device)
        self._owned = None if owned is None else owned.to(self._x.device)
        self._neighbors = self._held_neighbors(rows) if pairing.columns else None

    def _held_neighbors(self, rows: Rows) -> Tensor:
        neighbors = rows.neighbors()
        if neighbors.shape[1] < min(self.pairing.columns, rows.count - 1):
            logger.warning("neighbors: %d per row at hand, %d wanted", neighbors.shape[1], self.pairing.columns)
        return held(neighbors[:, : self.pairing.columns], self._x.device)

    def epoch(self, epoch: int, skipped: int = 0) -> Iterator[Batch]:
        """The shares of one epoch's batches.

        Args:
            epoch: from 0.
            skipped: batches of the epoch that were trained on before.
        """
        per_epoch = self.plan.steps_per_epoch
        part = self._cut(epoch)
        for index in range(skipped, min(per_epoch, self.plan.steps - epoch * per_epoch)):
            places, in_batch = part(index)
            yield self._share(places, epoch * per_epoch + index, epoch, in_batch)

    def _cut(self, epoch: int) -> Callable[[int], tuple[Tensor, slice]]:
        """What tells, of a batch's number in the epoch, the places of this worker's rows, and theirs in the batch."""
        workers, number, size = collectives.world_size(), collectives.rank(), self.plan.batch_size
        if (own := self._stretches) is not None:
            mine = batch_order(own.held, self.seed, epoch, number).to(self._x.device)
            return lambda index: (mine[own.in_order(index)], own.in_batch(index))
        order = batch_order(self.count, self.seed, epoch).to(self._x.device)
        return lambda index: (order[index * size + number : (index + 1) * size : workers], slice(number, None, workers))

    def _share(self, places: Tensor, step: int, epoch: int, in_batch: slice) -> Batch:
        rows = places if self._owned is None else self._owned[places]
        views, crossed = [places], None
        if self._neighbors is not None:
            partners, crossed = self._partners(self._neighbors, places, rows, epoch)
            views.append(partners.to(places.device))
        chosen = torch.cat([view for view in views for _ in range(self.pairing.repeats)])
        x = taken(self._x, chosen, self.device).to(self.dtype)
        x = x.view(-1, len(rows), x.shape[1])
        if self.pairing.noise:
            x = x + self._noise(x, step)[:, in_batch]
        share = collectives.world_size() * len(rows) / self.plan.batch_size
        return Batch(x, rows, step, epoch, share, crossed)

    def _partners(self, neighbors: Tensor, places: Tensor, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Places, on the device of the neighbours, which may not be that of the rows; and `Batch.crossed`."""
        places, rows = places.to(neighbors.device), rows.to(neighbors.device)
        if self._owned is None:
            return draw_partners(neighbors, places, self.seed, epoch), None
        partners, foreign = draw_partners_at_hand(neighbors, places, rows, self.seed, epoch)
        return partners, foreign.float().mean().to(self.device)

    def _noise(self, x: Tensor, step: int) -> Tensor:
        """Float[V batch D]: noise for the whole batch, of which each worker takes its own rows."""
        generator = torch.Generator(self.device).manual_seed(mix(self.seed, NOISE, step))
        shape = (x.shape[0], self.plan.batch_size, x.shape[2])
        return self.pairing.noise * torch.randn(shape, generator=generator, device=self.device, dtype=x.dtype)
