"""Balanced samples by hierarchical k-means (Vo et al., arXiv 2405.15613): levels with resampling, quotas, draws.

The centroids of k-means are denser where the data are, but less so; each further level, which clusters the centroids of
the one before and counts each once, flattens them more, and resampling most of all. A quota that is divided evenly from
the top level down then reaches rare concepts.

Whatever is drawn is drawn by the hash of a key, so that the sample does not depend on workers, on the order of the
rows, or on the clusters' numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayclust.arrays import FloatArray, IntArray
from rayclust.clustering import kmeans
from rayclust.errors import ConfigError
from rayclust.settings import KMeansOptions

Draw = Literal["random", "nearest", "diverse"]

_ITERATIONS = 50
_SPLIT_ABOVE = 1024
"""Clusters above which k-means goes in two levels."""
_ROWS_AT_ONCE = 8192


def key_hashes(keys: Iterable[str], seed: int) -> NDArray[np.uint64]:
    """Return UInt64[N], by which rows are drawn: it depends on seed and key alone."""
    digests = b"".join(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


# The levels.


@dataclass(frozen=True)
class Points:
    """Unit rows, some of those in a matrix that may be mapped from a file."""

    x: Tensor
    """Float32[N' D]."""
    places: IntArray | None = None
    """Int64[N], rows of the matrix; None: all."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.x if self.places is None else self.places)

    def blocks(self) -> Iterator[Tensor]:
        """Yield Float32[B D], in order."""
        if self.places is None:
            yield from torch.split(self.x, _ROWS_AT_ONCE)
        else:
            yield from (self.x[ids] for ids in torch.split(torch.from_numpy(self.places), _ROWS_AT_ONCE))

    def at(self, positions: IntArray) -> Points:
        """Return some of the points; they are not copied."""
        return Points(self.x, positions if self.places is None else self.places[positions])


@dataclass(frozen=True)
class Partition:
    """A partition by k-means."""

    centers: Tensor
    """Float32[K D], unit rows."""
    labels: IntArray
    """Int64[N]."""
    distances: FloatArray
    """Float32[N], squared distances to the own centroid."""


@dataclass(frozen=True)
class Levels:
    """Nested partitions: clusters of rows, clusters of these clusters, and so on."""

    leaves: IntArray
    """Int64[N], each row's cluster of the first level."""
    parents: tuple[IntArray, ...]
    """For each level but the last Int64[K], the cluster of the next level in which each lies."""
    clusters: tuple[int, ...]
    """K of each level."""
    distances: FloatArray
    """Float32[N], of each row to the centroid of its first cluster, in any measure."""

    def paths(self, rows: IntArray) -> IntArray:
        """Return Int32[n T], the cluster of each level of some rows, the last level first."""
        path = [self.leaves[rows]]
        path.extend(parent[path[-1]] for parent in self.parents)
        return np.stack(path[::-1], axis=1).astype(np.int32)

    def sums(self, values: IntArray) -> list[IntArray]:
        """Return, for each level, the sums over its clusters of values of the first level's, Int64[K]."""
        found = [values]
        for parent, count in zip(self.parents, self.clusters[1:], strict=True):
            found.append(np.bincount(parent, found[-1], count).astype(np.int64))
        return found


def fit_levels(
    points: Points,
    clusters: Sequence[int],
    *,
    steps: Sequence[int],
    seed: int = 0,
    weights: Literal["count", "rows"] = "count",
) -> Levels:
    """Cluster rows by spherical k-means, then the centroids of each level into the next.

    Args:
        points: the rows.
        clusters: K of each level, falling.
        steps: times that each level is resampled; 0 is plain k-means. The paper: 0 for the rows, then 10.
        seed: of k-means.
        weights: a centroid counts once (`count`, as published) or as its rows do (`rows`).

    Raises:
        ConfigError: there is no level, the numbers do not fall, or the first is above the number of rows.

    Source: arXiv 2405.15613, section 3; each centroid of level t − 1 is one point of level t.
    """
    if not clusters or any(not 1 <= after <= before for before, after in pairwise([len(points), *clusters])):
        raise ConfigError(
            f"curate.sample.levels = {list(clusters)}: must fall, finest level first, from at most {len(points)} rows"
        )
    found: list[Partition] = []
    counts: Any = np.ones(len(points))
    for level, (count, resamples) in enumerate(zip(clusters, steps, strict=True)):
        by_rows = weights == "rows" and level > 0
        weighed = torch.from_numpy(np.maximum(counts, 1)) if by_rows else None
        found.append(resampled_kmeans(points, count, resamples, seed + level, weighed))
        points, counts = Points(found[-1].centers), np.bincount(found[-1].labels, counts, count)
    first, *others = found
    return Levels(first.labels, tuple(other.labels for other in others), tuple(clusters), first.distances)


def resampled_kmeans(points: Points, clusters: int, steps: int, seed: int, weights: Tensor | None = None) -> Partition:
    """Run k-means, and again on the points nearest to each centroid, which are more even than all points.

    Args:
        points: unit rows.
        clusters: K.
        steps: times that the centroids are fitted anew to r points of each cluster, r half the mean size of a cluster.
        seed: of the first centroids; each step has its own.
        weights: Float64[N] of the points in the first fit; None weighs all 1.

    Raises:
        ConfigError: more clusters than points.

    Source: arXiv 2405.15613, section 3.2.
    """
    found = _kmeans(points, clusters, seed, weights)
    size = max(1, round(len(points) / clusters / 2))
    for step in range(1, steps + 1 if size > 1 else 1):
        # 1. The r points nearest to each centroid, ties by position.
        order = np.lexsort((found.distances, found.labels))
        rank = np.arange(len(order)) - np.searchsorted(found.labels[order], found.labels[order])
        sample = points.at(np.sort(order[rank < size]))
        # 2. k-means from scratch of these, and all points anew.
        centers = _kmeans(sample, min(clusters, len(sample)), seed + 1000 * step).centers
        found = _assign(points, centers)
    return found


def _kmeans(points: Points, clusters: int, seed: int, weights: Tensor | None = None) -> Partition:
    """Run spherical k-means; of many clusters in two levels, √K and then an equal share of K within each.

    So did the paper for its first level (100 k clusters, each split by 100): N · √K products instead of N · K.
    """
    if clusters <= _SPLIT_ABOVE:
        options = KMeansOptions(clusters=clusters, restarts=1, max_iterations=_ITERATIONS)
        return _assign(points, kmeans.fit(points.blocks, options, seed=seed, weights=weights).centers)
    # 1. The parents. Each gets as many clusters as the others, whatever its rows: in proportion to the rows, clusters
    # would be as dense as these, which is what the levels are to even out.
    parents = _kmeans(points, round(clusters**0.5), seed, weights)
    rows = np.bincount(parents.labels)
    children = quotas(rows, clusters, _mixed(np.arange(len(rows), dtype=np.uint64), seed))
    # 2. Each parent's rows.
    labels, distances, centers = np.empty(len(points), np.int64), np.empty(len(points), np.float32), list[Tensor]()
    order = np.argsort(parents.labels, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(rows)])
    first = 0
    for parent in np.flatnonzero(rows).tolist():
        members = order[bounds[parent] : bounds[parent + 1]]
        some = None if weights is None else weights[torch.from_numpy(members)]
        own = _kmeans(points.at(members), int(children[parent]), seed + 1 + parent, some)
        labels[members], distances[members] = first + own.labels, own.distances
        centers.append(own.centers)
        first += len(own.centers)
    return Partition(torch.cat(centers), labels, distances)


def _assign(points: Points, centers: Tensor) -> Partition:
    found = [kmeans.assign(block, centers) for block in points.blocks()]
    labels, squared = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    return Partition(centers, labels, squared)


# The quotas.


def cut(sizes: IntArray, total: int) -> int:
    """Return the largest x for which Σ_j min(x, n_j) is at most `total`; the largest size where all fits.

    Args:
        sizes: Int64[K] n_j, at least 0.
        total: t, at least 0.

    Source: arXiv 2405.15613, the cut of its hierarchical sampling.
    """
    n = np.sort(sizes)
    if total >= n.sum():
        return int(n[-1]) if len(n) else 0
    # Σ_j min(n_k, n_j) for each k; x lies between the last of these that fits and the next.
    before = np.concatenate([[0], np.cumsum(n)[:-1]])
    others = len(n) - np.arange(len(n))
    k = int(np.searchsorted(before + n * others, total, side="right"))
    return int((total - before[k]) // others[k])


def quotas(sizes: IntArray, total: int, ties: NDArray[np.uint64]) -> IntArray:
    """Divide a total among clusters as evenly as their sizes allow.

    Args:
        sizes: Int64[K], what each can give.
        total: at least 0; above the sum of the sizes it is that.
        ties: UInt64[K]; what is left after the cut goes, one each, to those with the smallest.

    Returns:
        Int64[K], min(x, n_j) or one more, with the sum min(total, Σ n_j).
    """
    x = cut(sizes, total)
    found = np.minimum(sizes, x)
    left = min(total, int(sizes.sum())) - int(found.sum())
    larger = np.flatnonzero(sizes > x)
    found[larger[np.argsort(ties[larger], kind="stable")[:left]]] += 1
    return found


def allocate(levels: Levels, total: int, hashes: NDArray[np.uint64], copies: int = 1) -> list[IntArray]:
    """Divide a total from the last level down to the first.

    Args:
        levels: nested clusters.
        total: rows to draw, copies counted.
        hashes: UInt64[N] of the rows' keys. The least of its rows names a cluster in ties, whatever its number.
        copies: μ, times that one row may be drawn.

    Returns:
        For each level Int64[K], the quotas of its clusters, first level first.
    """
    capacity = [copies * size for size in levels.sums(np.bincount(levels.leaves, minlength=levels.clusters[0]))]
    names = [np.full(levels.clusters[0], np.iinfo(np.uint64).max, np.uint64)]
    np.minimum.at(names[0], levels.leaves, hashes)
    for parent, count in zip(levels.parents, levels.clusters[1:], strict=True):
        names.append(np.full(count, np.iinfo(np.uint64).max, np.uint64))
        np.minimum.at(names[-1], parent, names[-2])
    # Levels draw apart: else the cluster with the smallest hash would win every tie from the top to its rows.
    ties = [_mixed(name, level + 1) for level, name in enumerate(names)]
    found = [quotas(capacity[-1], total, ties[-1])]
    for level in range(len(levels.parents) - 1, -1, -1):
        parent, own = levels.parents[level], np.zeros(levels.clusters[level], np.int64)
        order = np.argsort(parent, kind="stable")
        bounds = np.searchsorted(parent[order], np.arange(levels.clusters[level + 1] + 1))
        for quota, (low, high) in zip(found[0].tolist(), pairwise(bounds.tolist()), strict=True):
            children = order[low:high]
            if quota:
                own[children] = quotas(capacity[level][children], quota, ties[level][children])
        found.insert(0, own)
    return found


def _mixed(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """Return other hashes of hashes, by the finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


# The draw.


def draw(
    levels: Levels, quota: IntArray, hashes: NDArray[np.uint64], how: Draw = "random", points: Points | None = None
) -> IntArray:
    """Draw each first-level cluster's quota from its rows.

    Args:
        levels: nested clusters.
        quota: Int64[K] of the first level, at most μ times the rows of each.
        hashes: UInt64[N] of the rows' keys.
        how: random takes the smallest hashes, nearest the rows nearest to the centroid, diverse the farthest-point
            order from the row nearest to the centroid. With more than one copy ⌊quota / rows⌋ of all come first.
        points: the rows, for `diverse`.

    Returns:
        Int64[N], copies of each row; 0 is not drawn.

    Raises:
        ConfigError: `diverse` without rows.
    """
    keys = (hashes, levels.leaves) if how == "random" else (hashes, levels.distances, levels.leaves)
    order = np.lexsort(keys)
    bounds = np.searchsorted(levels.leaves[order], np.arange(levels.clusters[0] + 1))
    sizes = np.diff(bounds)
    whole, rest = np.divmod(quota, np.maximum(sizes, 1))
    if how == "diverse":
        if points is None:
            raise ConfigError("draw = diverse: needs the rows")
        for cluster in np.flatnonzero(rest).tolist():
            members = order[bounds[cluster] : bounds[cluster + 1]]
            x = torch.cat(list(points.at(members).blocks()))
            # Each row the farthest from those before, the first row first; then the others.
            chosen, nearest = [0], (x - x[0]).square().sum(1)
            while len(chosen) < rest[cluster]:
                nearest[chosen[-1]] = -1.0
                chosen.append(int(nearest.argmax()))
                nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
            farthest_first = np.concatenate([chosen, np.setdiff1d(np.arange(len(x)), chosen)])
            order[bounds[cluster] : bounds[cluster + 1]] = members[farthest_first]
    leaf = levels.leaves[order]
    rank = np.arange(len(order)) - bounds[leaf]
    copies = np.empty(len(order), np.int64)
    copies[order] = whole[leaf] + (rank < rest[leaf])
    return copies
