"""k-means, Euclidean and spherical: restarts advance together, over one worker or many, rows in memory or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from rayclust import collectives
from rayclust.arrays import require_matrix
from rayclust.clustering.lloyd import Blocks, Partitions, half_squares, in_parts, nearest
from rayclust.clustering.population import Metric, Population, even_sample, gather_rows, survey
from rayclust.clustering.relocation import relocate
from rayclust.clustering.seeding import kmeans_plusplus
from rayclust.errors import ConfigError, ShapeError
from rayclust.options import Config

_SAMPLED_PER_CLUSTER = 32


class KMeansOptions(Config):
    """Settings of k-means."""

    clusters: int = Field(ge=1)
    """K."""
    metric: Metric = "cosine"
    """`cosine`: rows and centres are unit vectors (spherical k-means). `euclidean`: rows as given, centres means."""
    restarts: int = Field(10, ge=1)
    """Starts from different seeds; the one with the least inertia is kept. They share every pass over the rows."""
    max_iterations: int = Field(300, ge=1)
    """Most passes of one restart."""
    tolerance: float = Field(1e-4, ge=0)
    """A restart stops when the squared shift of its centres, summed, is at most this times the mean variance of a
    dimension; it always stops when no row changes cluster."""
    seeding_rows: int = Field(65_536, ge=1)
    """k-means++ sees all rows up to this many, else an evenly spread sample of this many (at least 32 per cluster)."""


@dataclass(frozen=True)
class KMeansState:
    """All restarts after some passes: enough to go on from."""

    centers: Tensor
    """Float[R K D], seen from the population's origin; unit vectors for cosine."""
    iterations: Tensor
    """Int64[R], passes made."""
    running: Tensor
    """Bool[R], False where a restart has converged."""
    inertia: Tensor
    """Float64[R], sum of squared distances to the nearest of the centres before the last pass; infinite before any."""

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, for a checkpoint; `KMeansState(**tensors)` is its inverse."""
        return dict(vars(self))


@dataclass(frozen=True)
class KMeansResult:
    """The best restart."""

    centers: Tensor
    """Float[K D]; unit vectors for cosine."""
    inertia: float
    """Sum of squared distances of rows to the nearest centre; for cosine 2·(1 − cosine) of each."""
    n_iter: int
    """Passes of the best restart."""
    converged: bool
    """False when it ran out of iterations."""
    inertias: tuple[float, ...]
    """Of every restart."""


def fit(blocks: Blocks, options: KMeansOptions, *, seed: int = 0, init: Tensor | None = None) -> KMeansResult:
    """k-means of all workers' rows; every worker gets the same result, which does not depend on how rows are shared.

    Args:
        blocks: this worker's rows; workers hold the rows in order of rank.
        options: settings.
        seed: of the first centres.
        init: Float[K D] or Float[R K D], first centres instead of k-means++ and `options.restarts`.

    Raises:
        ConfigError: more clusters than rows.
        DataError: rows are missing or not finite.
        ShapeError: `init` has the wrong shape.
    """
    population = survey(blocks, options.metric)
    state = start(population, options, seed, init)
    for reached in advance(population, options, state):
        state = reached
    return finish(population, state)


def start(population: Population, options: KMeansOptions, seed: int, init: Tensor | None = None) -> KMeansState:
    """The state before the first pass; arguments as in `fit`."""
    if options.clusters > population.count:
        raise ConfigError(f"clusters = {options.clusters}: at most the number of rows, {population.count}")
    if init is None:
        size = max(options.seeding_rows, _SAMPLED_PER_CLUSTER * options.clusters)
        sample = gather_rows(population, even_sample(population.count, size, seed))
        seeds = [(seed, restart) for restart in range(options.restarts)]
        init = _from_first_worker(sample[kmeans_plusplus(sample, options.clusters, seeds)])
    centers = init.clone() if init.ndim == 3 else init[None].clone()
    wanted = (options.clusters, len(population.origin))
    if centers.ndim != 3 or tuple(centers.shape[1:]) != wanted:
        raise ShapeError(f"init has shape {tuple(init.shape)}: the last two axes must be clusters and width, {wanted}")
    centers = torch.nn.functional.normalize(centers, dim=2) if options.metric == "cosine" else centers
    R, device = len(centers), population.origin.device
    return KMeansState(
        centers=(centers.to(device).double() - population.origin).to(centers.dtype),
        iterations=torch.zeros(R, dtype=torch.int64, device=device),
        running=torch.ones(R, dtype=torch.bool, device=device),
        inertia=torch.full((R,), torch.inf, dtype=torch.float64, device=device),
    )


def advance(population: Population, options: KMeansOptions, state: KMeansState) -> Iterator[KMeansState]:
    """Lloyd's passes from a state until all restarts have converged or run out of iterations; yields after each."""
    partitions: Partitions | None = None
    while bool((going := state.running & (state.iterations < options.max_iterations)).any()):
        old = state.centers[going]
        if partitions is None:
            partitions, members = Partitions(old), going
        elif not torch.equal(members, going):
            partitions.keep(going[members])
            members = going
        new, inertia = _step(population, options, partitions, old)
        shift = (new - old).double().square().sum((1, 2))
        converged = shift <= options.tolerance * population.variance
        centers, running, inertias = state.centers.clone(), state.running.clone(), state.inertia.clone()
        centers[going], inertias[going] = new, inertia
        running[going] = ~converged
        state = replace(state, centers=centers, iterations=state.iterations + going, running=running, inertia=inertias)
        yield state


def finish(population: Population, state: KMeansState) -> KMeansResult:
    """The restart with the least inertia, measured at its last centres; ties go to the smaller number."""
    centers = state.centers
    bias = half_squares(centers, population.origin)
    total = bias.new_zeros(len(bias), dtype=torch.float64)
    for part in in_parts(population.blocks, bias.numel()):
        total += nearest(part, centers, bias)[0].sum(0, dtype=torch.float64)
    inertias = _inertia(population, collectives.all_sum(total))
    best = int(inertias.argmin())
    return KMeansResult(
        centers=(centers[best].double() + population.origin).to(centers.dtype),
        inertia=float(inertias[best]),
        n_iter=int(state.iterations[best]),
        converged=not bool(state.running[best]),
        inertias=tuple(inertias.tolist()),
    )


def assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row; ties go to the smaller id.

    Args:
        x: Float[N D]; unit rows where centres come from cosine k-means.
        centers: Float[K D].

    Returns:
        Int64[N] labels; Float[N] squared distances, not below 0.

    Raises:
        ShapeError: the widths differ.
    """
    require_matrix(x, "x", centers.shape[1])
    origin = centers.double().mean(0)
    seen = (centers.double() - origin).to(centers.dtype)[None]
    bias = half_squares(seen, origin)
    labels, distances = [], []
    for part in in_parts(lambda: [x], len(centers)):
        scores, ids = nearest(part, seen, bias)
        labels.append(ids[:, 0])
        lengths = (part - origin.to(part.dtype)).square().sum(1)
        distances.append((lengths - 2.0 * scores[:, 0]).clamp_(min=0))
    return torch.cat(labels), torch.cat(distances)


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """Squared distances of rows to all centres.

    Args:
        x: Float[B D].
        centers: Float[K D].

    Returns:
        Float[B K], not below 0.

    Raises:
        ShapeError: the widths differ.
    """
    require_matrix(x, "x", centers.shape[1])
    origin = centers.mean(0)  # products far from zero lose digits
    rows, seen = x - origin, centers - origin
    lengths = rows.square().sum(1, keepdim=True) + seen.square().sum(1)
    return torch.addmm(lengths, rows, seen.T, alpha=-2.0).clamp_(min=0)


def _step(population: Population, options: KMeansOptions, partitions: Partitions, old: Tensor) -> tuple[Tensor, Tensor]:
    """New centres Float[R K D], the same to the last bit where no row moved; the inertia Float64[R] of the old ones."""
    own = partitions.assign_and_sum(population.blocks, old, population.origin)
    sums, counts, total = (collectives.all_sum(part) for part in own)
    if bool((counts == 0).any()):
        sums, counts = relocate(population, partitions, old, sums, counts)
    if options.metric == "cosine":
        new = torch.nn.functional.normalize(sums, dim=2)
        keeps = sums.square().sum(2, keepdim=True) > 0
    else:
        new = sums / counts.clamp(min=1)[:, :, None] - population.origin
        keeps = counts[:, :, None] > 0
    return torch.where(keeps, new.to(old.dtype), old), _inertia(population, total)


def _inertia(population: Population, scores: Tensor) -> Tensor:
    return (population.scatter - 2.0 * scores).clamp(min=0)


def _from_first_worker(x: Tensor) -> Tensor:
    """Rank 0's values on all workers: draws agree to the last bit even where processors differ."""
    return collectives.all_sum(x if collectives.rank() == 0 else torch.zeros_like(x))
