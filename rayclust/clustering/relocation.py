"""Empty clusters get the rows that are farthest from their centres."""

from __future__ import annotations

import torch
from torch import Tensor

from rayclust import collectives
from rayclust.clustering.lloyd import Partitions, in_parts
from rayclust.clustering.population import Population, gather_rows


def relocate(
    population: Population, partitions: Partitions, centers: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Moves one far row into each empty cluster, farthest row to smallest id; the same rows for any number of workers.

    A row that is alone in its cluster, or lies on its centre, stays. Costs two passes over the rows.

    Args:
        population: of all workers' rows.
        partitions: labels of this worker's rows under `centers`.
        centers: Float[R K D], seen from the origin.
        sums: Float64[R K D] over all workers.
        counts: Int64[R K] over all workers.

    Returns:
        New sums and counts.
    """
    affected = (counts == 0).any(1).nonzero().squeeze(1)
    wanted = int((counts == 0).sum(1).max())
    distances, positions, labels = _everyones(*_farthest(population, partitions, centers, affected, wanted))
    unique, where = torch.unique(positions, return_inverse=True)
    rows = gather_rows(population, unique.cpu()).double()
    sums, counts = sums.clone(), counts.clone()
    for a, r in enumerate(affected.tolist()):
        empty = (counts[r] == 0).nonzero().squeeze(1).tolist()
        for rank, k in enumerate(empty):
            old = int(labels[a, rank])
            if distances[a, rank] <= 0 or counts[r, old] <= 1:
                continue
            row = rows[where[a, rank]]
            sums[r, old] -= row
            sums[r, k] += row
            counts[r, old] -= 1
            counts[r, k] += 1
    return sums, counts


def _farthest(
    population: Population, partitions: Partitions, centers: Tensor, affected: Tensor, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances Float64[A M], positions and labels Int64[A M] of this worker's farthest rows, by affected partition."""
    absolute = (centers[affected].double() + population.origin).to(centers.dtype)
    A = len(affected)
    best = centers.new_full((A, wanted), -1.0, dtype=torch.float64)  # fewer rows than wanted: never moved
    positions, labels = torch.zeros_like(best, dtype=torch.int64), torch.zeros_like(best, dtype=torch.int64)
    start = population.first
    for i, part in enumerate(in_parts(population.blocks, partitions.columns)):
        own = partitions.labels[i][:, affected].T.long()
        far = torch.stack([(part - absolute[a][own[a]]).square().sum(1).double() for a in range(A)])
        here = torch.arange(start, start + len(part), device=part.device).expand(A, -1)
        best, positions, labels = _top(
            torch.cat([best, far], 1), torch.cat([positions, here], 1), torch.cat([labels, own], 1), wanted
        )
        start += len(part)
    return best, positions, labels


def _top(distances: Tensor, positions: Tensor, labels: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest distances of each partition and what goes with them; ties go to the smaller position."""
    order = positions.argsort(dim=1)
    by_distance = distances.gather(1, order).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, by_distance)[:, :wanted]
    return distances.gather(1, order), positions.gather(1, order), labels.gather(1, order)


def _everyones(distances: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The farthest rows over all workers."""
    workers, wanted = collectives.world_size(), distances.shape[1]
    own = torch.stack([distances, positions.double(), labels.double()])
    each = own.new_zeros((workers, *own.shape))
    each[collectives.rank()] = own
    merged = collectives.all_sum(each).movedim(0, 2).flatten(2)
    return _top(merged[0], merged[1].long(), merged[2].long(), wanted)
