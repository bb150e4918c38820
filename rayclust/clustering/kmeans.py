"""k-means, Euclidean and spherical: restarts advance together, over one worker or many, rows in memory or streamed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.clustering import row_stats
from rayclust.clustering.row_stats import Blocks, RowStats, even_sample, gather_rows
from rayclust.clustering.seeding import kmeans_plusplus
from rayclust.errors import ConfigError, ShapeError
from rayclust.kernels.screening import MIN_COLUMNS, RoundedRows, has_fast_bf16, pair_products, screen
from rayclust.settings import KMeansOptions

logger = logging.getLogger(__name__)

_SAMPLED_PER_CLUSTER = 32
_SCORES_ON_CPU, _SCORES_ON_GPU = 2**20, 2**26
_MOVED_AT_ONCE = 1024
_MULTIPLIED_AT_ONCE = 512
_SCREENED_WIDTH = 128
_REFINED_SHARE, _REFINED_PASSES = 4, 10
"""Rows per row of the sample from which the seeds first move in the sample, and their passes there."""


@dataclass(frozen=True)
class KMeansState:
    """State of all restarts after some passes; training resumes from it."""

    centers: Tensor
    """Float[R K D] minus the origin of the row statistics; unit vectors for cosine."""
    iterations: Tensor
    """Int64[R], passes made."""
    running: Tensor
    """Bool[R], False where a restart has converged."""
    inertia: Tensor
    """Float64[R], sum of squared distances to the nearest of the centres before the last pass; infinite before any."""


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


def fit(
    blocks: Blocks, options: KMeansOptions, *, seed: int = 0, init: Tensor | None = None, weights: Tensor | None = None
) -> KMeansResult:
    """Run k-means on all workers' rows; the result is the same on every worker and for every sharding of the rows.

    Args:
        blocks: this worker's rows; workers hold the rows in order of rank.
        options: settings.
        seed: of the first centres.
        init: Float[K D] or Float[R K D], first centres instead of k-means++ and `options.restarts`.
        weights: Float64[N'] above 0, of this worker's rows: a row counts as so many; None weighs all 1.

    Raises:
        ConfigError: more clusters than rows.
        DataError: rows are missing or not finite.
        ShapeError: `init` has the wrong shape.
    """
    stats = row_stats.compute(blocks, options.metric, weights)
    state = start(stats, options, seed, init)
    for number, reached in enumerate(advance(stats, options, state), 1):
        state = reached
        if logger.isEnabledFor(logging.DEBUG):
            least, running = float(state.inertia.min()), int(state.running.sum())
            logger.debug("k-means: pass %d, inertia %.6g, %d starts go on", number, least, running)
    return finish(stats, state)


def fit_all(x: Tensor, options: KMeansOptions, seed: int, init: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run k-means to its end and return the partition of every start, not of the best alone.

    Args:
        x: Float[N D], the same on all workers, which share the passes.
        options: settings.
        seed: of the first centres.
        init: Float[K D] or Float[R K D], first centres instead of k-means++ and `options.restarts`.

    Returns:
        Int64[R N] labels; Float64[R] inertia per row.

    Raises:
        ConfigError: more clusters than rows.
        ShapeError: `init` has the wrong shape.
    """
    own = x[distributed.own_slice(len(x))]
    stats = row_stats.compute(lambda: [own], options.metric)
    state = start(stats, options, seed, init)
    for reached in advance(stats, options, state):
        state = reached
    nearest_centers = [assign(x, (centers.double() + stats.origin).to(x.dtype)) for centers in state.centers]
    labels, distances = (torch.stack(parts) for parts in zip(*nearest_centers, strict=True))
    return labels, distances.mean(1, dtype=torch.float64)


def start(stats: RowStats, options: KMeansOptions, seed: int, init: Tensor | None = None) -> KMeansState:
    """Return the state before the first pass.

    Args:
        stats: of all workers' rows.
        options: settings.
        seed: of the first centres.
        init: Float[K D] or Float[R K D], first centres instead of k-means++ and `options.restarts`.

    Raises:
        ConfigError: more clusters than rows.
        ShapeError: `init` has the wrong shape.
    """
    if options.clusters > stats.count:
        raise ConfigError(f"clusters = {options.clusters}: at most the number of rows, {stats.count}")
    if init is None:
        size = max(options.seeding_rows, _SAMPLED_PER_CLUSTER * options.clusters)
        places = even_sample(stats.count, size, seed)
        sample, weights = gather_rows(stats, places), _weights_at(stats, places)
        seeds = [(seed, restart) for restart in range(options.restarts)]
        # Broadcast rank 0's centres: draws may differ in the last bit on different processors.
        init = distributed.data_group().broadcast(sample[kmeans_plusplus(sample, options.clusters, seeds, weights)])
        if stats.count >= _REFINED_SHARE * len(sample):
            # Passes over the sample are cheap, and few over all rows are left then. Workers share its rows.
            own = distributed.own_slice(len(sample))
            own_weights = None if weights is None else weights[own]
            sampled = row_stats.compute(lambda: [sample[own]], options.metric, own_weights)
            short = options.model_copy(update={"max_iterations": _REFINED_PASSES})
            state = start(sampled, short, seed, init)
            for reached in advance(sampled, short, state):
                state = reached
            init = (state.centers.double() + sampled.origin).to(init.dtype)
    centers = init.clone() if init.ndim == 3 else init[None].clone()
    expected = (options.clusters, len(stats.origin))
    if centers.ndim != 3 or tuple(centers.shape[1:]) != expected:
        raise ShapeError(
            f"init has shape {tuple(init.shape)}: the last two axes must be clusters and width, {expected}"
        )
    centers = functional.normalize(centers, dim=2) if options.metric == "cosine" else centers
    R, device = len(centers), stats.origin.device
    return KMeansState(
        centers=(centers.to(device).double() - stats.origin).to(centers.dtype),
        iterations=torch.zeros(R, dtype=torch.int64, device=device),
        running=torch.ones(R, dtype=torch.bool, device=device),
        inertia=torch.full((R,), torch.inf, dtype=torch.float64, device=device),
    )


def advance(stats: RowStats, options: KMeansOptions, state: KMeansState) -> Iterator[KMeansState]:
    """Make Lloyd's passes until all restarts have converged or run out of iterations; yield the state after each.

    Centres are the same to the last bit where no row moved.

    Args:
        stats: of all workers' rows.
        options: settings.
        state: from which to go on.
    """
    partitions: Partitions | None = None
    while bool((active := state.running & (state.iterations < options.max_iterations)).any()):
        old = state.centers[active]
        if partitions is None:
            partitions, members = Partitions(old), active
        elif not torch.equal(members, active):
            partitions.keep(active[members])
            members = active
        # 1. Assign rows and add up clusters, over all workers.
        local = partitions.assign_and_sum(stats.blocks, old, stats.origin, stats.weights)
        sums, counts, scores = (distributed.all_reduce(part) for part in local)
        inertia = (stats.scatter - 2.0 * scores).clamp(min=0)
        # 2. Fill empty clusters.
        if bool((counts == 0).any()):
            sums, counts = relocate(stats, partitions, old, sums, counts)
        # 3. Move the centres.
        if options.metric == "cosine":
            new = functional.normalize(sums, dim=2)
            is_defined = sums.square().sum(2, keepdim=True) > 0
        else:
            new = sums / counts.where(counts > 0, 1)[:, :, None] - stats.origin
            is_defined = counts[:, :, None] > 0
        new = torch.where(is_defined, new.to(old.dtype), old)
        # 4. Stop the restarts that have converged.
        converged = (new - old).double().square().sum((1, 2)) <= options.tolerance * stats.variance
        centers, running, inertias = state.centers.clone(), state.running.clone(), state.inertia.clone()
        centers[active], inertias[active], running[active] = new, inertia, ~converged
        state = replace(state, centers=centers, iterations=state.iterations + active, running=running, inertia=inertias)
        yield state


def finish(stats: RowStats, state: KMeansState) -> KMeansResult:
    """Return the restart with the least inertia, measured at its last centres; ties go to the smaller number."""
    centers = state.centers
    bias = half_squares(centers, stats.origin)
    rounded = round_centers(centers, bias)
    scores = bias.new_zeros(len(bias), dtype=torch.float64)
    place = 0
    for part in in_parts(stats.blocks, len(bias) if rounded else bias.numel()):
        found = nearest(part, centers, bias, rounded)[0]
        if stats.weights is not None:
            found = found * stats.weights[place : place + len(part), None]
        scores += found.sum(0, dtype=torch.float64)
        place += len(part)
    inertias = (stats.scatter - 2.0 * distributed.all_reduce(scores)).clamp(min=0)
    best = int(inertias.argmin())
    return KMeansResult(
        centers=(centers[best].double() + stats.origin).to(centers.dtype),
        inertia=float(inertias[best]),
        n_iter=int(state.iterations[best]),
        converged=not bool(state.running[best]),
        inertias=tuple(inertias.tolist()),
    )


def assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centre of each row; ties go to the smaller id.

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
    centered = (centers.double() - origin).to(centers.dtype)[None]
    bias = half_squares(centered, origin)
    rounded = round_centers(centered, bias)
    labels, distances = [], []
    for part in in_parts(lambda: [x], 1 if rounded else len(centers)):
        scores, ids = nearest(part, centered, bias, rounded)
        labels.append(ids[:, 0])
        lengths = (part - origin.to(part.dtype)).square().sum(1)
        distances.append((lengths - 2.0 * scores[:, 0]).clamp_(min=0))
    return torch.cat(labels), torch.cat(distances)


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """Return the squared distances of rows to all centres.

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
    rows, centered = x - origin, centers - origin
    lengths = rows.square().sum(1, keepdim=True) + centered.square().sum(1)
    return torch.addmm(lengths, rows, centered.T, alpha=-2.0).clamp_(min=0)


def in_parts(blocks: Blocks, columns: int) -> Iterator[Tensor]:
    """Split the rows into parts whose scores against `columns` centres fit the processor's caches.

    Args:
        blocks: this worker's rows.
        columns: centres that every row is compared with.

    Yields:
        Float[B D] parts of at most 4096 rows (more on a GPU), half precision widened to float32.
    """
    for block in blocks():
        rows = (_SCORES_ON_GPU if block.is_cuda else _SCORES_ON_CPU) // max(columns, 1)
        for part in torch.split(block, max(256, min(rows, 2**20 if block.is_cuda else 4096))):
            yield part if part.dtype in (torch.float32, torch.float64) else part.float()


def half_squares(centers: Tensor, origin: Tensor) -> Tensor:
    """Return the bias b for which x·e − b orders centres e by their distance to a row x.

    With y = x − origin, |y − e|² = |y|² − 2·(x·e − b), b = origin·e + ½|e|². Rows far from zero lose few digits,
    although they are never centred: |origin||e| is rounded, not |origin|².

    Args:
        centers: Float[R K D] minus the origin.
        origin: Float64[D].

    Returns:
        Float[R K] b, in the centres' dtype, summed in float64.
    """
    wide = centers.double()
    return (wide @ origin + 0.5 * wide.square().sum(-1)).to(centers.dtype)


def _screens(centers: Tensor) -> bool:
    """Return whether scores of Float[R K D] centres are screened by bf16 products."""
    _, K, D = centers.shape
    is_large = K >= MIN_COLUMNS and D >= _SCREENED_WIDTH
    return is_large and centers.device.type == "cpu" and centers.dtype == torch.float32 and has_fast_bf16("cpu")


def round_centers(centers: Tensor, bias: Tensor) -> list[RoundedRows] | None:
    """Round the centres of each partition for `nearest`, whose scores they get by a single bf16 product.

    Args:
        centers: Float[R K D] minus the origin.
        bias: Float[R K] of `half_squares`.

    Returns:
        R of them; None where products of float32 take no longer.
    """
    if not _screens(centers):
        return None
    # Three numbers of 8 bits hold a bias of 24 bits: rows have three columns of 1 beside them.
    pieces, rest = [], -bias
    for _ in range(3):
        pieces.append(rest.bfloat16())
        rest = rest - pieces[-1]
    return [RoundedRows.of(*one) for one in zip(centers, torch.stack(pieces, dim=2), strict=True)]


def nearest(
    x: Tensor, centers: Tensor, bias: Tensor, rounded: list[RoundedRows] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the nearest centre of each row in each of R partitions; ties go to the smaller id.

    Args:
        x: Float[B D].
        centers: Float[R K D] minus the origin.
        bias: Float[R K] of `half_squares`.
        rounded: of `round_centers`; changes scores by rounding only.

    Returns:
        Float[B R] scores x·e − b of the nearest centres; Int64[B R] their ids.
    """
    R, K, D = centers.shape
    if rounded is not None and x.dtype == torch.float32 and len(x) >= MIN_COLUMNS:
        # Products of the few centres that may be nearest, where they are few.
        rows, found = RoundedRows.of(x, torch.ones(len(x), 3, dtype=torch.bfloat16), padded=False), []
        for r, one in enumerate(rounded):
            pairs = screen(rows, one, 1)
            if pairs is None:
                break
            row, k = pairs
            score = pair_products(x, centers[r], row, k) - bias[r, k]
            most = score.new_full((len(x),), -torch.inf).scatter_reduce_(0, row, score, "amax")
            ties = score == most[row]
            ids = k.new_full((len(x),), K).scatter_reduce_(0, row[ties], k[ties], "amin")
            found.append((most, ids))
        else:
            scores, labels = zip(*found, strict=True)
            return torch.stack(scores, dim=1), torch.stack(labels, dim=1)
    products = torch.addmm(-bias.reshape(1, R * K), x, centers.reshape(R * K, D).T)
    best: tuple[Tensor, Tensor] = products.view(-1, R, K).max(-1)
    return best


class Partitions:
    """R partitions of this worker's rows into K clusters: labels, and sums and counts of the clusters.

    A pass compares every row with every centre, but adds up only rows that changed cluster since the pass before: after
    a few passes those are few, and float64 sums do not drift. Rows are read once for all R partitions.

    Args:
        centers: Float[R K D], for shapes, dtype and device.
    """

    def __init__(self, centers: Tensor) -> None:
        R, K, _ = centers.shape
        self.labels: list[Tensor] = []
        """Int32[B R] of each part of the rows, in order; empty before the first pass."""
        self.sums = centers.new_zeros(centers.shape, dtype=torch.float64)
        """Float64[R K D] over this worker's rows, without an origin."""
        self.counts = centers.new_zeros((R, K), dtype=torch.int64)
        """Int64[R K] over this worker's rows; Float64[R K] sums of their weights where they have some."""
        self.columns = R if _screens(centers) else R * K
        """Argument of `in_parts`; constant, so that parts stay the same when partitions are dropped."""

    def assign_and_sum(
        self, blocks: Blocks, centers: Tensor, origin: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Assign every row to its nearest centre and update the sums of the clusters.

        Args:
            blocks: this worker's rows; the same at every call.
            centers: Float[R K D] minus the origin.
            origin: Float64[D].
            weights: Float64[N'] of the rows; their sums are made anew at every call, so that an empty cluster's is 0.

        Returns:
            Float64[R K D] sums and Int64[R K] counts of this worker's rows by cluster, not to be changed by the caller;
            Float64[R] totals of the nearest centres' scores (see `half_squares`). All are weighted.
        """
        R, K, _ = self.sums.shape
        if weights is not None:
            self.labels, self.sums, self.counts = [], torch.zeros_like(self.sums), self.sums.new_zeros((R, K))
        place = 0
        bias = half_squares(centers, origin)
        rounded = round_centers(centers, bias)
        total = centers.new_zeros(len(centers), dtype=torch.float64)
        for i, part in enumerate(in_parts(blocks, self.columns)):
            scores, labels = nearest(part, centers, bias, rounded)
            own = None if weights is None else weights[place : place + len(part)]
            total += (scores if own is None else scores * own[:, None]).sum(0, dtype=torch.float64)
            place += len(part)
            # Rows that entered a cluster are added to it, and subtracted from the one that they left.
            old = self.labels[i] if i < len(self.labels) else None
            moved = (torch.ones_like(labels, dtype=torch.bool) if old is None else labels != old).nonzero()
            row, partition = moved.unbind(1)
            entered = partition * K + labels[row, partition]
            left = None if old is None else partition * K + old[row, partition].long()
            counts = self.counts.view(-1)
            counts += torch.bincount(entered, None if own is None else own[row], minlength=R * K)
            if left is not None:
                counts -= torch.bincount(left, minlength=R * K)
            # Measured on AVX-512 cores: a row that moves costs as much as 100 columns of a float64 product for a row.
            dense = not part.is_cuda and len(row) > len(part) * (0.4 + 0.01 * R * K)
            self._add(part, row, entered, left, own, by_product=dense)
            self.labels[i : i + 1] = [labels.int()]
        return self.sums, self.counts, total

    def keep(self, chosen: Tensor) -> None:
        """Drop all partitions but the chosen ones, Bool[R]."""
        self.labels = [labels[:, chosen] for labels in self.labels]
        self.sums, self.counts = self.sums[chosen], self.counts[chosen]

    def _add(
        self, x: Tensor, row: Tensor, entered: Tensor, left: Tensor | None, weights: Tensor | None, *, by_product: bool
    ) -> None:
        """Add rows to the sums of the clusters that they entered and subtract them from those that they left.

        `by_product` does it by a product with +1 where a row entered and −1 where it left: faster when most rows move.
        """
        sums = self.sums.view(-1, x.shape[1])
        if by_product:
            signs = sums.new_zeros((len(x), len(sums)))
            signs[row, entered] = 1.0 if weights is None else weights[row]
            if left is not None:
                signs[row, left] = -1.0
            for low in range(0, len(x), _MULTIPLIED_AT_ONCE):
                span = slice(low, low + _MULTIPLIED_AT_ONCE)
                sums.addmm_(signs[span].T, x[span].double())
            return
        for low in range(0, len(row), _MOVED_AT_ONCE):
            span = slice(low, low + _MOVED_AT_ONCE)
            values = x[row[span]].double()
            values = values if weights is None else values * weights[row[span], None]
            sums.index_add_(0, entered[span], values)
            if left is not None:
                sums.index_add_(0, left[span], values, alpha=-1)


def relocate(
    stats: RowStats, partitions: Partitions, centers: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Move one far row into each empty cluster, the farthest row to the smallest id, whatever the sharding of rows.

    A row that is alone in its cluster, or lies on its centre, stays. It takes its weight along. Costs two passes over
    the rows.

    Args:
        stats: of all workers' rows.
        partitions: labels of this worker's rows under `centers`.
        centers: Float[R K D] minus the origin.
        sums: Float64[R K D] over all workers.
        counts: Int64[R K] over all workers, or the weights' sums.

    Returns:
        New Float64[R K D] sums and Int64[R K] counts.
    """
    affected = (counts == 0).any(1).nonzero().squeeze(1)
    A, M = len(affected), int((counts == 0).sum(1).max())
    absolute = (centers[affected].double() + stats.origin).to(centers.dtype)

    def farthest(candidates: Tensor) -> Tensor:
        """Float64[3 A M] of Float64[3 A n] distances, positions and labels: the M farthest, ties by position."""
        order = candidates[1].argsort(dim=1)
        by_distance = candidates[0].gather(1, order).argsort(dim=1, descending=True, stable=True)
        return candidates.gather(2, order.gather(1, by_distance)[:, :M].expand(3, -1, -1))

    # 1. This worker's farthest rows. A distance of −1 stands for a missing row, which is never moved.
    best = centers.new_zeros((3, A, M), dtype=torch.float64)
    best[0] = -1.0
    position = stats.first
    for i, part in enumerate(in_parts(stats.blocks, partitions.columns)):
        labels = partitions.labels[i][:, affected].T.long()
        distances = torch.stack([(part - absolute[a][labels[a]]).square().sum(1).double() for a in range(A)])
        here = torch.arange(position, position + len(part), device=part.device).expand(A, -1)
        best = farthest(torch.cat([best, torch.stack([distances, here.double(), labels.double()])], 2))
        position += len(part)
    # 2. The farthest rows over all workers.
    merged = farthest(distributed.data_group().all_gather(best).movedim(0, 2).flatten(2))
    distances, positions, labels = merged[0], merged[1].long(), merged[2].long()
    unique, where = torch.unique(positions, return_inverse=True)
    rows, weights = gather_rows(stats, unique.cpu()).double(), _weights_at(stats, unique.cpu())
    weights = counts.new_ones(len(rows)) if weights is None else weights
    rows = rows * weights[:, None]
    # 3. Move them, one to each empty cluster.
    sums, counts = sums.clone(), counts.clone()
    for a, r in enumerate(affected.tolist()):
        for rank, k in enumerate((counts[r] == 0).nonzero().squeeze(1).tolist()):
            old, row, weight = int(labels[a, rank]), rows[where[a, rank]], weights[where[a, rank]]
            if distances[a, rank] <= 0 or counts[r, old] <= weight:
                continue
            sums[r, old] -= row
            sums[r, k] += row
            counts[r, old] -= weight
            counts[r, k] += weight
    return sums, counts


def _weights_at(stats: RowStats, positions: Tensor) -> Tensor | None:
    """Return the weights of the rows at Int64[S] positions, on every worker; see `gather_rows`."""
    if stats.weights is None:
        return None
    column = stats.weights[:, None]
    return gather_rows(replace(stats, blocks=lambda: [column]), positions)[:, 0]
