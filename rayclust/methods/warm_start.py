"""Heads that start from k-means of the rows instead of from chance, and the choice among heads by the neighbour graph.

Random heads need thousands of steps before they cluster at all, and most settle where two classes share a cluster.
Here k-means is run from many seeds on rows averaged over their neighbours; the partitions that keep most neighbours
together are kept; and each head's last hidden layer is solved, by ridge regression, to say what one of them says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.clustering import kmeans
from rayclust.clustering.neighborhood import modularity, modularity_terms, smooth
from rayclust.clustering.population import even_sample, survey
from rayclust.collectives import all_sum, rank, world_size
from rayclust.methods.base import Rows
from rayclust.methods.heads import Heads
from rayclust.search.knn import top_k

SAMPLE_ROWS = 65_536
"""Rows that a start and a choice look at, at most."""
SAMPLE_ROWS_PER_CLUSTER = 64
"""Rows that they look at for each cluster, at least."""
RIDGE = 0.01
"""Ridge penalty, relative to the mean variance of a hidden unit."""
_BLOCK = 2048
_ITERATIONS = 100


@dataclass(frozen=True)
class StartOptions:
    """How heads start."""

    clusters: int
    """K."""
    restarts: int
    """Partitions to choose from."""
    columns: int
    """Nearest neighbours that are averaged and counted."""
    rounds: int
    """How often rows are averaged with their neighbours; 0 takes them as they are."""


@torch.no_grad()
def start_from_kmeans(heads: Heads, rows: Rows, options: StartOptions, seed: int) -> None:
    """Sets each head's layers before the last logits so that its clusters are those of a good k-means partition.

    The best partitions, by modularity, go to the heads in turn. Workers share the work and end with equal heads.

    Args:
        heads: on any device, changed in place.
        rows: read once.
        options: what partitions to make.
        seed: of k-means' first centres and of the sample.
    """
    x, neighbors = _sampled(rows, options, seed, heads.direction)
    smoothed = smooth(x, neighbors, options.rounds)
    labels = _partitions(smoothed, options, seed)
    terms = modularity_terms(labels, _neighbor_labels(labels, neighbors), options.clusters)
    order = modularity(terms).sort(descending=True, stable=True).indices
    chosen = labels[order[torch.arange(heads.shape.heads, device=order.device) % len(order)]]
    _solve(heads, x, chosen)


@torch.no_grad()
def best_by_modularity(heads: Heads, rows: Rows, columns: int, seed: int) -> tuple[int, Tensor]:
    """The head whose clusters keep most neighbours together.

    Args:
        heads: whose argmax is asked.
        rows: read once; at most `SAMPLE_ROWS` of them are asked, with their neighbours.
        columns: nearest neighbours that count.
        seed: of the sample.

    Returns:
        The head's number, and Float64[H], the modularity of every head; see `clustering.neighborhood.modularity`.
    """
    K, like = heads.shape.clusters, heads.direction
    anchors = _own(even_sample(rows.count, _sample_size(rows.count, K), seed))
    x, neighbors = rows.tensor(), rows.neighbors()
    total = like.new_zeros((heads.shape.heads, K + 2), dtype=torch.float64)
    for part in anchors.split(_BLOCK):
        ids = neighbors[part.to(neighbors.device), :columns].long()
        asked, where = torch.cat([part.to(ids.device)[:, None], ids.clamp(min=0)], dim=1).unique(return_inverse=True)
        labels = torch.cat([_labels(heads, x[some.to(x.device)].to(like)) for some in asked.split(_BLOCK)], dim=1)
        found = labels[:, where.to(labels.device)]
        total += modularity_terms(found[:, :, 0], found[:, :, 1:].masked_fill((ids < 0).to(found.device), -1), K)
    values = modularity(all_sum(total))
    return int(values.argmax()), values


def _labels(heads: Heads, x: Tensor) -> Tensor:
    """Int64[H B]."""
    return heads(x).argmax(-1)


def _sample_size(count: int, clusters: int) -> int:
    return min(count, max(SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER * clusters))


def _own(ids: Tensor) -> Tensor:
    """This worker's stretch."""
    return ids[rank() * len(ids) // world_size() : (rank() + 1) * len(ids) // world_size()]


def _sampled(rows: Rows, options: StartOptions, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Float[S D] rows and Int64[S M], their neighbours among them, on the device of `like`; equal on all workers."""
    ids = even_sample(rows.count, _sample_size(rows.count, options.clusters), seed)
    x = rows.tensor()
    if len(ids) == rows.count:
        return x.to(like), rows.neighbors()[:, : options.columns].to(like.device).long()
    x = x[ids.to(x.device)].to(like)
    places = torch.arange(len(x), device=x.device)
    unit = functional.normalize(x, dim=1)
    return x, top_k(unit, unit, options.columns, query_ids=places, database_ids=places)[0]


def _partitions(x: Tensor, options: StartOptions, seed: int) -> Tensor:
    """Int64[R N]: k-means of all workers' rows, from each seed."""
    own = _own(torch.arange(len(x)))
    block = x[own.to(x.device)]
    settings = kmeans.KMeansOptions(
        clusters=options.clusters, restarts=options.restarts, max_iterations=_ITERATIONS, tolerance=1e-3
    )
    population = survey(lambda: [block], settings.metric)
    state = kmeans.start(population, settings, seed)
    for reached in kmeans.advance(population, settings, state):
        state = reached
    return torch.stack([kmeans.assign(x, centers)[0] for centers in state.centers])


def _neighbor_labels(labels: Tensor, neighbors: Tensor) -> Tensor:
    return labels[:, neighbors.clamp(min=0)].masked_fill(neighbors < 0, -1)


def _solve(heads: Heads, x: Tensor, labels: Tensor) -> None:
    """Ridge regression of each head's labels on what comes before its bottleneck.

    Args:
        heads: whose last hidden layer is set, in place, with its length kept.
        x: Float[N D], the same on all workers.
        labels: Int64[H N], the same on all workers.
    """
    K, last = heads.shape.clusters, heads.weights[-1]
    own = _own(torch.arange(len(x)))
    gram, cross, sums = torch.zeros(()), torch.zeros(()), torch.zeros(())
    gram, cross, sums = (part.to(last) for part in (gram, cross, sums))
    for ids in own.to(x.device).split(_BLOCK):
        units = heads.hidden(x[ids])
        members = functional.one_hot(labels[:, ids], K).to(units)
        gram, cross, sums = gram + units.mT @ units, cross + units.mT @ members, sums + units.sum(1)
    shape = (heads.shape.heads, last.shape[2])
    gram = all_sum(gram.expand(*shape, shape[1]).double()) / len(x)
    cross = all_sum(cross.expand(*shape, K).double()) / len(x)
    mean = all_sum(sums.expand(shape).double()) / len(x)
    shares = functional.one_hot(labels, K).double().mean(1)
    gram = gram - mean[:, :, None] * mean[:, None]
    cross = cross - mean[:, :, None] * shares[:, None]
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    penalty = RIDGE * scale[:, None, None] * torch.eye(shape[1], dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + penalty, cross)  # H × hidden × K
    weight = functional.normalize(heads.direction.double(), dim=2).mT @ solution.mT  # H × bottleneck × hidden
    length = weight.flatten(1).norm(dim=1)
    factor = last.double().flatten(1).norm(dim=1) / length.clamp(min=1e-30)
    weight = weight * factor[:, None, None]
    bias = -(weight @ mean[:, :, None])[:, :, 0]
    usable = (length > 0) & weight.isfinite().all(2).all(1)
    _set(last, weight, usable)
    _set(heads.biases[-1], bias, usable)


def _set(parameter: Tensor, value: Tensor, usable: Tensor) -> None:
    """Takes the first worker's values, for the heads whose values can be used."""
    value = torch.where(usable.view(-1, *[1] * (value.dim() - 1)), value, parameter.to(value))
    value = all_sum(value if rank() == 0 else torch.zeros_like(value))
    parameter.copy_(value)
