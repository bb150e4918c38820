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
from rayclust.collectives import Team, all_sum, rank, team, world_size
from rayclust.kernels.divided_softmax import ALONE
from rayclust.methods.base import Rows
from rayclust.methods.heads import Heads
from rayclust.search.knn import top_k

SAMPLE_ROWS = 65_536
"""Rows that a start and a choice look at, at most."""
SAMPLE_ROWS_PER_CLUSTER = 64
"""Rows that they look at for each cluster, at least."""
RIDGE = 0.01
"""Ridge penalty, relative to the mean variance of a hidden unit."""
ROUNDING = 1e-6
"""Variance of hidden units, relative to their squared mean, that counts as none."""
_BLOCK = 2048
_LOGITS = 1 << 28
"""Logits that a choice makes at once, at most: 1 GiB of float32."""
_ANCHORS = 16_384
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
def start_from_kmeans(heads: Heads, rows: Rows, options: StartOptions, seed: int, stack: Team = ALONE) -> None:
    """Sets each head's layers before the last logits so that its clusters are those of a good k-means partition.

    The best partitions, by modularity, go to the heads in turn. Workers share the work and end with equal heads.

    Args:
        heads: on any device, changed in place.
        rows: read once.
        options: what partitions to make.
        seed: of k-means' first centres and of the sample.
        stack: those who divide the heads' clusters.
    """
    x, neighbors = _sampled(rows, options, seed, heads.direction)
    smoothed = smooth(x, neighbors, options.rounds)
    labels = _partitions(smoothed, options, seed)
    terms = [modularity_terms(one[None], _labels_of(one, neighbors)[None], options.clusters) for one in labels]
    order = modularity(torch.cat(terms)).sort(descending=True, stable=True).indices
    places = heads.shape.first + torch.arange(heads.shape.heads, device=order.device)
    chosen = labels[order[places % len(order)]]
    _solve(heads, x, chosen, stack)


@torch.no_grad()
def best_by_modularity(
    heads: Heads, rows: Rows, columns: int, seed: int, column: Team = ALONE, stack: Team = ALONE
) -> tuple[int, Tensor]:
    """The head whose clusters keep most neighbours together.

    Args:
        heads: whose argmax is asked.
        rows: read once; at most `SAMPLE_ROWS` of them are asked, with their neighbours.
        columns: nearest neighbours that count.
        seed: of the sample.
        column: those who divide the heads.
        stack: those who divide the clusters of each head.

    Returns:
        The head's number, and Float64[H], the modularity of every head; see `clustering.neighborhood.modularity`.
    """
    K, like = heads.shape.all_clusters or heads.shape.clusters, heads.direction
    block = max(1, min(_BLOCK, _LOGITS // (heads.shape.heads * -(-K // stack.size))))
    anchors = _anchors(rows, even_sample(rows.count, _sample_size(rows.count, K), seed))
    x, neighbors = rows.tensor(), rows.neighbors()
    total = like.new_zeros((heads.shape.heads, K + 2), dtype=torch.float64)
    for part in torch.split(anchors, _ANCHORS):
        ids = neighbors[part.to(neighbors.device), :columns].long()
        asked, where = torch.unique(
            torch.cat([part.to(ids.device)[:, None], ids.clamp(min=0)], dim=1), return_inverse=True
        )
        labels = torch.cat(
            [_clusters(heads, x[some.to(x.device)].to(like), stack) for some in torch.split(asked, block)], dim=1
        )
        found = labels[:, where.to(labels.device)]
        total += modularity_terms(found[:, :, 0], found[:, :, 1:].masked_fill((ids < 0).to(found.device), -1), K)
    every_head = int(column.all_sum(torch.tensor(len(total), device=like.device)))
    values = column.joined(modularity(all_sum(total)), every_head)
    return int(values.argmax()), values


def _clusters(heads: Heads, x: Tensor, stack: Team) -> Tensor:
    """Int64[H B]: the cluster of each row under each head, among those of all workers that divide them."""
    logits: Tensor = heads(x)
    best, own = logits.max(-1)
    if stack.size == 1:
        return own
    first = stack.gathered(best).argmax(0)
    return stack.gathered(own + heads.shape.first_cluster).gather(0, first[None])[0]


def _sample_size(count: int, clusters: int) -> int:
    return min(count, max(SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER * clusters))


def _anchors(rows: Rows, ids: Tensor) -> Tensor:
    """The places of this worker's part of some rows: a stretch of them, or those that it alone holds."""
    owned = rows.owned()
    return _own(ids) if owned is None else torch.isin(owned, ids).nonzero()[:, 0]


def _own(ids: Tensor) -> Tensor:
    """This worker's stretch."""
    return ids[rank() * len(ids) // world_size() : (rank() + 1) * len(ids) // world_size()]


def _sampled(rows: Rows, options: StartOptions, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Float[S D] rows and Int64[S M], their neighbours among them, on the device of `like`; equal on all workers."""
    ids = even_sample(rows.count, _sample_size(rows.count, options.clusters), seed)
    if len(ids) == rows.count and rows.owned() is None:
        return rows.tensor().to(like), rows.neighbors()[:, : options.columns].to(like.device).long()
    x = _rows_at(rows, ids, like)
    places = torch.arange(len(x), device=x.device)
    unit = functional.normalize(x, dim=1)
    return x, top_k(unit, unit, options.columns, query_ids=places, database_ids=places)[0]


def _rows_at(rows: Rows, ids: Tensor, like: Tensor) -> Tensor:
    """Float[S D]: some rows, whoever holds them, on the device of `like`; equal on all workers."""
    x, owned = rows.tensor(), rows.owned()
    if owned is None:
        return x[ids.to(x.device)].to(like)
    found = like.new_zeros(len(ids), x.shape[1])
    found[torch.isin(ids, owned).to(like.device)] = x[torch.isin(owned, ids).to(x.device)].to(like)
    return all_sum(found)


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


def _labels_of(labels: Tensor, ids: Tensor) -> Tensor:
    return labels[ids.clamp(min=0)].masked_fill(ids < 0, -1)


@dataclass(frozen=True)
class _Moments:
    """Of each head's hidden units, and of them with the clusters; seen from the mean."""

    gram: Tensor
    """Float64[H I I]."""
    cross: Tensor
    """Float64[H I K], K those of this worker."""
    mean: Tensor
    """Float64[H I]."""


def _moments(heads: Heads, x: Tensor, labels: Tensor) -> _Moments:
    H, width, K = heads.shape.heads, heads.weights[-1].shape[2], heads.shape.clusters
    gram, cross, mean = (x.new_zeros(shape) for shape in ((H, width, width), (H, width, K), (H, width)))
    clusters = heads.shape.first_cluster + torch.arange(K, device=labels.device)
    for ids in torch.split(_own(torch.arange(len(x))).to(x.device), _BLOCK):
        units = heads.hidden(x[ids])
        members = (labels[:, ids, None] == clusters).to(units)
        gram.baddbmm_(units.mT, units)
        cross.baddbmm_(units.mT, members)
        mean += units.sum(1)
    gram, cross, mean = (all_sum(part.double()) / len(x) for part in (gram, cross, mean))
    counts = torch.stack([torch.bincount(one, minlength=heads.shape.all_clusters or K)[clusters] for one in labels])
    shares = counts.double() / len(x)
    return _Moments(gram - mean[:, :, None] * mean[:, None], cross - mean[:, :, None] * shares[:, None], mean)


def _solve(heads: Heads, x: Tensor, labels: Tensor, stack: Team) -> None:
    """Ridge regression of each head's clusters on what comes before its bottleneck.

    The bottleneck then is Σ_c (score of c) · ŵ_c, so that the last layer, left as it is, reads the scores off again.

    Args:
        heads: whose last hidden layer is set, in place; its weights keep their length.
        x: Float[N D], the same on all workers.
        labels: Int64[H N], the same on all workers.
        stack: those who divide the clusters, over which the sum goes.
    """
    moments, last = _moments(heads, x, labels), heads.weights[-1]
    variance = moments.gram.diagonal(dim1=1, dim2=2).mean(1)
    penalty = (RIDGE * variance).clamp(min=torch.finfo(last.dtype).tiny)[:, None].expand(-1, last.shape[2])
    # By Cholesky: the matrix is positive definite, and batched LU fails in some builds of MKL on two threads.
    factor, failed = torch.linalg.cholesky_ex(moments.gram + torch.diag_embed(penalty))
    factor = torch.where(failed.view(-1, 1, 1) > 0, torch.eye(last.shape[2]).to(factor), factor)
    scores = torch.cholesky_solve(moments.cross, factor)
    weight = stack.all_sum(functional.normalize(heads.direction.double(), dim=2).mT @ scores.mT)
    length = weight.flatten(1).norm(dim=1)
    alike = variance <= ROUNDING * moments.mean.square().mean(1)  # such rows tell a head nothing
    usable = (length > 0) & ~alike & (failed == 0)
    weight = weight * (last.double().flatten(1).norm(dim=1) / length.where(usable, 1.0))[:, None, None]
    _set(last, weight, usable, stack)
    _set(heads.biases[-1], -(weight @ moments.mean[:, :, None])[:, :, 0], usable, stack)


def _set(parameter: Tensor, value: Tensor, usable: Tensor, stack: Team) -> None:
    """Takes the first worker's values, for the heads whose values can be used."""
    value = torch.where(usable.view(-1, *[1] * (value.dim() - 1)), value, parameter.to(value))
    parameter.copy_(stack.first_one(team().first_one(value)))
