"""Computations on rows that are divided over the workers of the process group; one worker alone holds all rows.

They import little, so that processes that run them start quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayclust import distributed
from rayclust.clustering import kmeans, row_stats
from rayclust.clustering.kmeans import Partitions, relocate
from rayclust.clustering.spectral import Affinity, NormalizedMembership, balance, partition, unit
from rayclust.settings import KMeansOptions, SpectralOptions

LINE = torch.tensor([[0.0], [1], [2], [3], [9], [-5], [-5]])


def planted(
    count: int, clusters: int, width: int = 8, seed: int = 0, offset: float = 0.0, dtype=torch.float32
) -> Tensor:
    """Rows around centres, close enough that k-means needs a while."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, width))
    x = centers[rng.integers(clusters, size=count)] + 0.8 * rng.normal(size=(count, width)) + offset
    return torch.tensor(x, dtype=dtype)


def subspaces(clusters: int, count: int, *, noise: float = 0.3, width: int = 32, seed: int = 0) -> tuple:
    """Rows of random two-dimensional subspaces, in mixed order, and which."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % clusters)
    bases = np.linalg.qr(rng.normal(size=(clusters, width, 2)))[0]
    rows = np.einsum("nr,ndr->nd", rng.normal(size=(count, 2)), bases[labels])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows += noise * rng.normal(size=rows.shape) / np.sqrt(width)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float32)), labels


def moved(x: Tensor, centers: Tensor, block: int = 100) -> tuple[Tensor, Tensor]:
    """Sums and counts of the clusters after `relocate`."""
    stats = row_stats.compute(lambda: x.split(block), "euclidean")
    centered = centers - stats.origin.float()
    partitions = Partitions(centered)
    local = partitions.assign_and_sum(stats.blocks, centered, stats.origin)
    sums, counts, _ = (distributed.all_reduce(part) for part in local)
    before = sums.clone(), counts.clone()
    result = relocate(stats, partitions, centered, sums, counts)
    assert torch.equal(sums, before[0])
    assert torch.equal(counts, before[1])
    return result


def own(x: Tensor, split: int) -> Tensor:
    """This worker's rows: the first `split` on the first of two workers."""
    if distributed.data_group().size == 1:
        return x
    return x[:split] if distributed.data_group().rank == 0 else x[split:]


def fits() -> dict[str, Any]:
    x, results = planted(900, 12), {}
    empties = torch.cat([x[:6], x[:6] + 100.0])  # half of the centres attract nothing at first
    for metric in ("cosine", "euclidean"):
        for split, sample, init in ((300, 65_536, None), (900, 200, None), (777, 65_536, empties)):
            rows = own(x, split)
            blocks = rows.split(100) if len(rows) else (rows,)
            options = KMeansOptions(clusters=12, metric=metric, restarts=2, seeding_rows=sample)
            result = kmeans.fit(lambda blocks=blocks: blocks, options, seed=3, init=init)
            results[f"{metric} {split}"] = [result.centers, result.inertia, result.n_iter]
    return results


def relocated() -> list[Tensor]:
    centers = torch.tensor([[[1.0], [100.0], [200.0]], [[0.0], [9.0], [100.0]]])
    return list(moved(own(LINE, 2), centers, 2))


def statistics() -> list[Any]:
    rows = own(planted(50, 3), 20)
    stats = row_stats.compute(lambda: rows.split(4), "euclidean")
    assert stats.first == 20 * distributed.data_group().rank
    gathered = row_stats.gather_rows(stats, torch.tensor([0, 3, 19, 20, 49]))
    return [stats.count, stats.origin, stats.scatter, stats.variance, gathered]


def operators() -> list[Tensor]:
    codes = unit(torch.randn((61, 5), generator=torch.Generator().manual_seed(0)))
    x = torch.randn((61, 3), generator=torch.Generator().manual_seed(5))
    kept = Affinity(codes, 0.1)
    return [balance(kept).rows, NormalizedMembership(Affinity(codes, 0.1, keep=False), balance(kept)).product(x)]


def partitions() -> dict[int, list[Tensor]]:
    codes, _ = subspaces(4, 700)
    blocks, results = own(codes, 234).split(128), {}
    for dense_rows in (1000, 300):
        found = partition(lambda: blocks, 4, SpectralOptions(temperature=0.1, dense_rows=dense_rows), 0)
        results[dense_rows] = [found.labels(4), found.values]
    return results


CASES: dict[str, Callable[[], Any]] = {
    "k-means": fits,
    "relocation": relocated,
    "row statistics": statistics,
    "membership": operators,
    "spectral": partitions,
}


def run_all(rank: int, world: int) -> dict[str, Any]:
    return {name: case() for name, case in CASES.items()}
