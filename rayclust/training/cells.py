"""Who holds which rows where no worker can hold them all: each the rows of its own coarse cells.

Rows that lie together go to one cell and cells that lie together to one worker, so that most neighbours of a row are
with the worker that has the row. Which rows a worker has decides which pairs there can be; how batches are made of all
workers' rows is here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayclust import collectives
from rayclust.clustering import kmeans
from rayclust.clustering.kmeans import KMeansOptions
from rayclust.clustering.lloyd import Blocks
from rayclust.clustering.population import Population, even_sample, gather_rows, survey
from rayclust.errors import ConfigError
from rayclust.methods.base import FOREIGN, NONE

CELLS_PER_WORKER = 64
"""More are packed more evenly, and their k-means takes longer."""
SAMPLED_PER_CELL = 64
"""Rows of the sample on which cells are found, for each."""
LEAST_ROWS = 16
"""Rows that a cell has on average, at least."""
LEAST_SHARE = 2
"""Rows of a batch that a worker has on average, at least: no batch is without any of its rows then."""
_ITERATIONS = 20
_TOGETHER = 1 << 24
"""Rows whose numbers workers exchange at once."""


def holders(blocks: Blocks, seed: int) -> Tensor:
    """The worker that holds each row, by coarse cells from k-means on a sample.

    Args:
        blocks: a stretch of the rows: workers give theirs in order of rank; one without rows gives one empty block.
        seed: of sample and centres.

    Returns:
        Int16[N] on the CPU, the same on all workers.

    Raises:
        DataError: rows are missing or not finite.
    """
    population, workers = survey(blocks, "cosine"), collectives.world_size()
    number = min(CELLS_PER_WORKER * workers, max(workers, population.count // LEAST_ROWS), population.count)
    sample = gather_rows(population, even_sample(population.count, SAMPLED_PER_CELL * number, seed))
    own = collectives.stretches(len(sample), workers)[collectives.rank()]
    options = KMeansOptions(clusters=number, restarts=1, max_iterations=_ITERATIONS)
    centers = kmeans.fit(lambda: [sample[own]], options, seed=seed).centers
    cells = _cells(population, centers)
    holder = pack(centers.cpu(), torch.bincount(cells, minlength=number), workers)[cells]
    # Processors may round differently: all take the first worker's word.
    return summed(holder.int() if collectives.is_first() else torch.zeros_like(cells), centers.device).short()


def _cells(population: Population, centers: Tensor) -> Tensor:
    """Int32[N]: the nearest centre of every worker's rows."""
    cells, place = torch.zeros(population.count, dtype=torch.int32), population.first
    for block in population.blocks():
        if len(block):
            cells[place : place + len(block)] = kmeans.assign(block.to(centers), centers)[0].cpu()
        place += len(block)
    return summed(cells, centers.device)


def summed(x: Tensor, device: torch.device) -> Tensor:
    """The sum over workers of a long tensor on the CPU, which is exchanged piece by piece through `device`."""
    return torch.cat([collectives.all_sum(part.to(device)).cpu() for part in torch.split(x, _TOGETHER)])


def pack(centers: Tensor, sizes: Tensor, workers: int) -> Tensor:
    """Cells to workers: all are cut in two where they spread most, and each part again, in proportion to its workers.

    A worker gets at least one cell, and about N / W rows: no cut is further from where it should be than half of the
    largest cell, unless there are hardly more cells than workers.

    Args:
        centers: Float[C D].
        sizes: Int64[C], rows of each cell.
        workers: W, at most C.

    Returns:
        Int16[C], the worker of each cell.
    """
    found = torch.zeros(len(sizes), dtype=torch.int16)
    parts = [(torch.arange(len(sizes)), 0, workers)]
    while parts:
        cells, first, number = parts.pop()
        if number == 1:
            found[cells] = first
            continue
        left = number // 2
        order = cells[_along(centers[cells], sizes[cells]).argsort(stable=True)]
        upto = sizes[order].cumsum(0)
        cut = int((upto - float(upto[-1]) * left / number).abs().argmin()) + 1
        cut = min(max(cut, left), len(order) - (number - left))
        parts += [(order[:cut], first, left), (order[cut:], first + left, number - left)]
    return found


def _along(centers: Tensor, sizes: Tensor) -> Tensor:
    """Float64[C]: each centre's place along the direction in which rows spread most."""
    x, weights = centers.double(), sizes.double()[:, None]
    x = x - (x * weights).sum(0) / weights.sum().clamp(min=1)
    direction: Tensor = torch.linalg.svd(x * weights.sqrt(), full_matrices=False).Vh[0]
    return x @ direction


def places_of(holder: Tensor, worker: int) -> Tensor:
    """Int32[N]: where a worker keeps each row, in order of the rows it holds; −2 for those of others."""
    own = holder == worker
    return torch.where(own, own.cumsum(0, dtype=torch.int32) - 1, FOREIGN)


def at_hand(neighbors: Tensor, places: Tensor) -> Tensor:
    """Numbers of neighbours, Int[B M] with −1 for none, as places: Int32[B M] with −2 for those of other workers."""
    return places[neighbors.clamp(min=0).long()].masked_fill_(neighbors < 0, NONE)


@dataclass(frozen=True)
class Tally:
    """What a division leaves of the pairs, over all workers."""

    rows: int
    """N."""
    alone: int
    """Rows that have neighbours, but none with their own worker: they meet themselves."""
    neighbors: int
    """Pairs of a row and a neighbour."""
    foreign: int
    """Those of them whose ends are with two workers."""
    largest: int
    """Rows of the worker that holds most."""

    def __str__(self) -> str:
        share = self.foreign / max(self.neighbors, 1)
        return (
            f"{self.foreign:,} of {self.neighbors:,} neighbours ({share:.1%}) are with another worker, "
            f"{self.alone:,} of {self.rows:,} rows have none at hand; a worker holds at most {self.largest:,} rows"
        )


def tally(neighbors: Tensor, device: torch.device) -> Tally:
    """Counts all workers' neighbours, this one's being Int[n M] places; `device` is what workers talk through."""
    counts = torch.zeros(4, dtype=torch.int64)
    for part in torch.split(neighbors, max(1, _TOGETHER // max(1, neighbors.shape[1]))):
        known, near = part != NONE, part >= 0
        alone = known.any(1) & ~near.any(1)
        some = [torch.tensor(len(part)), alone.sum().cpu(), known.sum().cpu(), (known & ~near).sum().cpu()]
        counts += torch.stack(some)
    held = _held_by_each(len(neighbors), device)
    rows, alone, known, foreign = collectives.all_sum(counts.to(device)).tolist()
    return Tally(rows, alone, known, foreign, max(held))


def _held_by_each(own: int, device: torch.device) -> list[int]:
    counts = torch.zeros(collectives.world_size(), dtype=torch.int64, device=device)
    counts[collectives.rank()] = own
    held: list[int] = collectives.all_sum(counts).tolist()
    return held


@dataclass(frozen=True)
class Stretches:
    """This worker's part of every batch of an epoch: in proportion to the rows that it holds, to within 2 rows.

    Batches have one size, and an epoch takes no row twice; all rows, where its batches make up all.
    """

    before: int
    """Rows of the workers before this one."""
    held: int
    """Of this one."""
    count: int
    """Of all."""
    batch_size: int

    @classmethod
    def of(cls, held: int, batch_size: int, device: torch.device) -> Stretches:
        """For a worker that holds so many rows; made by all workers together.

        Raises:
            ConfigError: a worker holds too few for batches of this size.
        """
        each, rank = _held_by_each(held, device), collectives.rank()
        if batch_size * min(each) < LEAST_SHARE * sum(each):
            raise ConfigError(
                f"resources.rows = cells: the worker with {min(each):,} of {sum(each):,} rows would have fewer than "
                f"{LEAST_SHARE} rows of a batch of {batch_size}; use fewer workers or larger batches"
            )
        return cls(sum(each[:rank]), held, sum(each), batch_size)

    def in_order(self, index: int) -> slice:
        """Where batch number `index` lies in this worker's order."""
        return slice(self._taken(index), self._taken(index + 1))

    def in_batch(self, index: int) -> slice:
        """Where this worker's rows lie in batch number `index`."""
        first = self._upto(index + 1, self.before) - self._upto(index, self.before)
        return slice(first, first + self._taken(index + 1) - self._taken(index))

    def _taken(self, batches: int) -> int:
        return self._upto(batches, self.before + self.held) - self._upto(batches, self.before)

    def _upto(self, batches: int, rows: int) -> int:
        """Rows that so many batches take of the workers that hold the first `rows` rows together."""
        return batches * self.batch_size * rows // self.count
