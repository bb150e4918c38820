"""Inverted lists for the neighbours of all rows: their centres in two levels, and the lists that a row probes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayclust.arrays import require_matrix

_ROWS_PER_LIST = 39
"""Fewest rows per list, on average; faiss asks for as many to train a list's centre."""
_PARENTS_TRIED = 4
"""Parents whose lists a row is compared with."""
_ITERATIONS = 10
_ROWS_AT_ONCE = 4096
_FIRST_REACH = 64
_UNREACHED = 2**31


def list_count(count: int) -> int:
    """Return the number of lists for N rows: 4·√N, at least one, and at most one per 39 rows."""
    return max(1, min(int(4 * count**0.5), count // _ROWS_PER_LIST))


@dataclass(frozen=True)
class ListCenters:
    """Centres of inverted lists in two levels; lists of one parent have consecutive numbers."""

    centers: Tensor
    """Float32[L D], unit rows."""
    parents: Tensor
    """Float32[P D], unit rows."""
    starts: Tensor
    """Int64[P + 1]: the first list of each parent, and L."""

    def assign(self, x: Tensor) -> Tensor:
        """Return Int64[B], the list of each of Float32[B D] unit or zero rows.

        It is the one with the nearest centre among those of the four nearest parents.

        Raises:
            ShapeError: `x` is not as wide as the centres.
        """
        require_matrix(x, "x", self.centers.shape[1])
        # 1. The nearest parents of each row, grouped by parent.
        count = min(_PARENTS_TRIED, len(self.parents))
        tried = torch.cat([(part @ self.parents.T).topk(count, dim=1)[1] for part in torch.split(x, _ROWS_AT_ONCE)])
        order = tried.flatten().argsort(stable=True)
        bounds = torch.searchsorted(tried.flatten()[order], torch.arange(len(self.parents) + 1)).tolist()
        # 2. The nearest centre among each parent's lists.
        best = torch.full((len(x),), -torch.inf)
        lists = torch.zeros(len(x), dtype=torch.int64)
        for parent, (low, high) in enumerate(pairwise(bounds)):
            first, end = self.starts[parent : parent + 2].tolist()
            for rows in torch.split(order[low:high] // count, _ROWS_AT_ONCE):
                similarity, child = (x[rows] @ self.centers[first:end].T).max(dim=1)
                # Parents are visited in order, so that of equally near lists the first is kept.
                nearer = similarity > best[rows]
                best[rows[nearer]], lists[rows[nearer]] = similarity[nearer], child[nearer] + first
        return lists


def train_centers(sample: Tensor, lists: int, seed: int = 0) -> ListCenters:
    """Compute centres by spherical k-means of a sample in two levels: √L parents, then lists in proportion to rows.

    With S rows a pass costs 2·S·√L products instead of S·L. It runs in one thread, so that sums have a fixed order.

    Args:
        sample: Float32[S D], unit or zero rows, in a random order or spread over all rows.
        lists: L, about; the result may have a few more or less, and never more than rows.
        seed: of the first centres.
    """
    x = np.ascontiguousarray(sample.numpy())

    def spherical_kmeans(rows: NDArray[np.float32], k: int) -> NDArray[np.float32]:
        """Float32[k D] unit centres of at least k rows."""
        if k == len(rows):
            return rows
        options = {"niter": _ITERATIONS, "spherical": True, "seed": seed, "min_points_per_centroid": 1}
        means = faiss.Kmeans(x.shape[1], int(k), **options)
        means.train(rows)
        return np.asarray(means.centroids)

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        # 1. Parents, and the rows of each.
        parents = spherical_kmeans(x, min(len(x), max(1, round(lists**0.5))))
        parts = torch.split(sample, _ROWS_AT_ONCE)
        nearest = torch.cat([(part @ torch.from_numpy(parents).T).argmax(1) for part in parts]).numpy()
        rows = np.bincount(nearest, minlength=len(parents))
        # 2. Lists within each parent.
        sizes = np.minimum(rows, np.maximum(1, np.rint(lists * rows / len(x)).astype(np.int64)))
        centers = [spherical_kmeans(x[nearest == parent], size) for parent, size in enumerate(sizes) if size]
    finally:
        faiss.omp_set_num_threads(threads)
    used = sizes > 0
    starts = np.concatenate([[0], sizes[used].cumsum()])
    return ListCenters(*map(torch.from_numpy, (np.concatenate(centers), parents[used], starts)))


def ranked_lists(
    centers: Tensor, sizes: Tensor, x: Tensor, home: int, *, k: int, reach: int, nprobe: int = 1
) -> tuple[Tensor, Tensor]:
    """Rank the lists around a list by the nearness of their centres to each of its rows, and open the first of them.

    Args:
        centers: Float32[L D].
        sizes: Int64[L], rows of each list, more than `k` in all.
        x: Float32[n D], rows of the list, unit or zero.
        home: the list.
        k: neighbours that each row must find.
        reach: lists ranked, at most L; more where these hold too few rows.
        nprobe: lists opened for a row, its own among them; more where these hold at most `k` rows.

    Returns:
        Int64[n M] lists, the own first; Bool[n M], those that are opened.
    """
    similarity = centers @ centers[home]
    similarity[home] = torch.inf
    around = similarity.topk(reach)[1]
    while int(sizes[around].sum()) <= k:
        around = similarity.topk(min(2 * len(around), len(centers)))[1]
    scores = x @ centers[around].T
    scores[:, 0] = torch.inf
    lists = around[scores.argsort(dim=1, descending=True, stable=True)]
    rows = sizes[lists]
    opened = rows.cumsum(1) - rows <= k
    opened[:, :nprobe] = True
    return lists, opened


def choose_probes(
    centers: Tensor, sizes: Tensor, queries: Tensor, homes: Tensor, truth: Tensor, min_recall: float
) -> tuple[int, int]:
    """Return `reach` and `nprobe` of `ranked_lists`, the fewest, from where the true neighbours of some rows lie.

    Args:
        centers: Float32[L D].
        sizes: Int64[L], rows of each list.
        queries: Float32[q D], some of the rows.
        homes: Int64[q], their lists.
        truth: Int64[q k], the list of each of their true neighbours.
        min_recall: share of the true neighbours that must lie in lists that are opened, from 0 to 1.
    """
    k, reach = truth.shape[1], min(_FIRST_REACH, len(centers))
    while True:
        # 1. The rank of each true neighbour's list; 0 where that list is opened in any case.
        ranks = []
        for query, home, neighbor_lists in zip(queries, homes.tolist(), truth, strict=True):
            lists, opened = ranked_lists(centers, sizes, query[None], home, k=k, reach=reach)
            same = lists == neighbor_lists[:, None]
            rank = same.long().argmax(1).masked_fill(~same.any(1), _UNREACHED)
            ranks.append(rank.masked_fill((same & opened).any(1), 0))
        # 2. The rank within which the share `min_recall` of them lies.
        ordered = torch.cat(ranks).sort()[0]
        last = int(ordered[max(0, int(np.ceil(min_recall * len(ordered) - 1e-9)) - 1)])
        # With four times as many lists ranked as opened, the result is nearly that of a ranking of all lists.
        if reach == len(centers) or 4 * (last + 1) <= reach:
            return reach, last + 1
        reach = min(2 * reach, len(centers))
