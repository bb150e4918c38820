"""Balanced samples by hierarchical k-means (Vo et al., arXiv 2405.15613): levels with resampling, quotas, draws.

The centroids of k-means are denser where the data are, but less so; each further level, which clusters the centroids of
the one before and counts each once, flattens them more, and resampling most of all. A quota that is divided evenly from
the top level down then reaches rare concepts.

Whatever is drawn is drawn by the hash of a key, so that the sample does not depend on workers, on the order of the
rows, or on the clusters' numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayclust.arrays import FloatArray, IntArray
from rayclust.clustering import kmeans
from rayclust.clustering.row_stats import Blocks
from rayclust.errors import ConfigError

Draw = Literal["random", "nearest", "diverse"]

_ITERATIONS = 50
_RANDOM_SEEDS_ABOVE = 4096
"""Clusters above which k-means starts from rows drawn by lot: k-means++ costs K² products of a row."""


def key_hashes(keys: Iterable[str], seed: int) -> NDArray[np.uint64]:
    """Return UInt64[N], by which rows are drawn: it depends on seed and key alone."""
    digests = b"".join(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


# The levels.


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
    """Float32[N], squared distance of each row to the centroid of its first cluster."""

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
    blocks: Blocks,
    clusters: Sequence[int],
    *,
    steps: Sequence[int],
    seed: int = 0,
    weights: Literal["count", "rows"] = "count",
    start: Levels | None = None,
    centers: Tensor | None = None,
) -> Levels:
    """Cluster rows by spherical k-means, then the centroids of each level into the next.

    Args:
        blocks: unit rows; the same blocks at every call.
        clusters: K of each level to fit, falling.
        steps: times that each level is resampled; 0 is plain k-means. The paper: 0 for the rows, then 10.
        seed: of k-means.
        weights: a centroid counts once (`count`, as published) or as its rows do (`rows`).
        start: a first level that is there already, with its `centers`; then `clusters` are those above it.
        centers: Float32[K D] of `start`, unit rows.

    Raises:
        ConfigError: the numbers do not fall, or the first is above the number of rows.

    Source: arXiv 2405.15613, section 3; each centroid of level t − 1 is one point of level t.
    """
    bounds = [*(start.clusters[-1:] if start else ()), *clusters]
    if any(after >= before or after < 1 for before, after in pairwise(bounds)):
        raise ConfigError(f"levels = {list(clusters)}: must fall, finest level first, and stay below {bounds[0]}")
    leaves, distances, parents = None, None, list[IntArray]()
    if start is not None:
        leaves, distances, parents = start.leaves, start.distances, list(start.parents)
    counts: IntArray | None = None if leaves is None else np.bincount(leaves, minlength=bounds[0])
    for level, (count, resamples) in enumerate(zip(clusters, steps, strict=True)):
        is_first = leaves is None
        points = blocks if is_first else partial(list, (centers,))
        weighed = None
        if not is_first and weights == "rows" and counts is not None:
            weighed = torch.from_numpy(np.maximum(counts, 1).astype(np.float64))
        centers, labels, squared = resampled_kmeans(points, count, resamples, seed + level, weighed)
        if is_first:
            leaves, distances = labels, squared
            counts = np.bincount(labels, minlength=count)
        else:
            parents.append(labels)
            counts = np.bincount(labels, counts, count).astype(np.int64)
    if leaves is None or distances is None:
        raise ConfigError("levels = []: at least one is needed")
    return Levels(leaves, tuple(parents), (*(start.clusters if start else ()), *clusters), distances)


def resampled_kmeans(
    blocks: Blocks, clusters: int, steps: int, seed: int, weights: Tensor | None = None
) -> tuple[Tensor, IntArray, FloatArray]:
    """Run k-means, and again on the points nearest to each centroid, which are more even than the points.

    Args:
        blocks: unit rows.
        clusters: K.
        steps: times that the centroids are fitted anew to r points of each cluster, r half the mean size of a cluster.
        seed: of the first centroids; each step has its own.
        weights: Float64[N] of the points in the first fit; None weighs all 1.

    Returns:
        Float32[K D] centroids; Int64[N] labels; Float32[N] squared distances to the own centroid.

    Raises:
        ConfigError: more clusters than rows.

    Source: arXiv 2405.15613, section 3.2.
    """
    centers = _fit(blocks, clusters, seed, weights)
    labels, squared = _assign(blocks, centers)
    size = max(1, round(len(labels) / clusters / 2))
    for step in range(1, steps + 1 if size > 1 else 1):
        # 1. The r points nearest to each centroid, ties by position.
        order = np.lexsort((squared, labels))
        rank = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
        sample = _rows_at(blocks, np.sort(order[rank < size]))
        # 2. k-means from scratch of these, and all points anew.
        centers = _fit(partial(list, (sample,)), min(clusters, len(sample)), seed + 1000 * step)
        labels, squared = _assign(blocks, centers)
    return centers, labels, squared


def _fit(blocks: Blocks, clusters: int, seed: int, weights: Tensor | None = None) -> Tensor:
    options, init = kmeans.KMeansOptions(clusters=clusters, restarts=1, max_iterations=_ITERATIONS), None
    if clusters > _RANDOM_SEEDS_ABOVE:
        count = sum(len(block) for block in blocks())
        drawn = np.random.default_rng(seed).choice(count, clusters, replace=False)
        init = _rows_at(blocks, np.sort(drawn))
    return kmeans.fit(blocks, options, seed=seed, init=init, weights=weights).centers


def _assign(blocks: Blocks, centers: Tensor) -> tuple[IntArray, FloatArray]:
    found = [kmeans.assign(block.float(), centers) for block in blocks()]
    labels = torch.cat([label for label, _ in found]).numpy()
    return labels, torch.cat([squared for _, squared in found]).numpy()


def _rows_at(blocks: Blocks, positions: IntArray) -> Tensor:
    """Return Float32[n D], the rows at sorted positions."""
    found, start = [], 0
    for block in blocks():
        low, high = np.searchsorted(positions, [start, start + len(block)])
        found.append(block[torch.from_numpy(positions[low:high] - start)].float())
        start += len(block)
    return torch.cat(found)


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
    levels: Levels, quota: IntArray, hashes: NDArray[np.uint64], how: Draw = "random", blocks: Blocks | None = None
) -> IntArray:
    """Draw each first-level cluster's quota from its rows.

    Args:
        levels: nested clusters.
        quota: Int64[K] of the first level, at most μ times the rows of each.
        hashes: UInt64[N] of the rows' keys.
        how: random takes the smallest hashes, nearest the rows nearest to the centroid, diverse the farthest-point
            order from the row nearest to the centroid. With more than one copy ⌊quota / rows⌋ of all come first.
        blocks: the rows, for `diverse`.

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
        if blocks is None:
            raise ConfigError("draw = diverse: needs the rows")
        for cluster in np.flatnonzero(rest).tolist():
            members = order[bounds[cluster] : bounds[cluster + 1]]
            places = np.argsort(members)
            x = _rows_at(blocks, members[places])[torch.from_numpy(np.argsort(places))]
            order[bounds[cluster] : bounds[cluster + 1]] = members[_farthest_first(x, int(rest[cluster]))]
    leaf = levels.leaves[order]
    rank = np.arange(len(order)) - bounds[leaf]
    copies = np.empty(len(order), np.int64)
    copies[order] = whole[leaf] + (rank < rest[leaf])
    return copies


def _farthest_first(x: Tensor, count: int) -> IntArray:
    """Return Int64[n]: `count` rows, each the farthest from those before, the first row first; then the others."""
    chosen, nearest = [0], (x - x[0]).square().sum(1)
    while len(chosen) < count:
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return np.concatenate([chosen, np.setdiff1d(np.arange(len(x)), chosen)])
