"""Inverted lists for the neighbours of all rows: their centres in two levels, and which of them a row looks into."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from rayclust.arrays import require_matrix

_ROWS_PER_LIST = 39
"""Fewest rows per list, on average."""
_PARENTS_TRIED = 4
"""Parents whose lists a row is compared with."""
_ITERATIONS = 10
_FIRST_REACH = 64
_BEYOND = 2**31


def list_count(count: int) -> int:
    """Number of lists for N rows: 4·√N, at least one, and not more than give each list some rows."""
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
        """The list of each row: the one with the nearest centre among those of the four nearest parents.

        Args:
            x: Float32[B D], unit or zero rows.

        Returns:
            Int64[B].

        Raises:
            ShapeError: `x` is not as wide as the centres.
        """
        require_matrix(x, "x", self.centers.shape[1])
        most = min(_PARENTS_TRIED, len(self.parents))
        tried = torch.cat([(part @ self.parents.T).topk(most, dim=1)[1] for part in torch.split(x, 4096)])
        best = torch.full((len(x),), -torch.inf)
        found = torch.zeros(len(x), dtype=torch.int64)
        order = tried.flatten().argsort(stable=True)
        bounds = torch.searchsorted(tried.flatten()[order], torch.arange(len(self.parents) + 1)).tolist()
        for parent, (low, high) in enumerate(pairwise(bounds)):
            first, end = self.starts[parent : parent + 2].tolist()
            for rows in torch.split(order[low:high] // most, 4096):
                similarity, own = (x[rows] @ self.centers[first:end].T).max(dim=1)
                # Parents come in order, so that of equally near lists the first stays.
                nearer = similarity > best[rows]
                best[rows[nearer]], found[rows[nearer]] = similarity[nearer], own[nearer] + first
        return found


def train_centers(sample: Tensor, lists: int, seed: int = 0) -> ListCenters:
    """Spherical k-means of a sample in two levels: √L parents, and lists within each in proportion to its rows.

    With S rows a pass takes 2·S·√L products instead of S·L. It runs in one thread, so that the sums have one order.

    Args:
        sample: Float32[S D], unit or zero rows, in a random order or spread over all rows.
        lists: L that are wanted; there are some more or less, and not more than rows.
        seed: of the first centres.
    """
    x = np.ascontiguousarray(sample.numpy())
    parents = _kmeans(x, min(len(x), max(1, round(lists**0.5))), seed)
    nearest = torch.cat([(part @ torch.from_numpy(parents).T).argmax(1) for part in torch.split(sample, 4096)]).numpy()
    rows = np.bincount(nearest, minlength=len(parents))
    own = np.minimum(rows, np.maximum(1, np.rint(lists * rows / len(x)).astype(np.int64)))
    centers = [_kmeans(x[nearest == parent], size, seed) for parent, size in enumerate(own) if size]
    kept = own > 0
    starts = np.concatenate([[0], own[kept].cumsum()])
    return ListCenters(*map(torch.from_numpy, (np.concatenate(centers), parents[kept], starts)))


def _kmeans(x: np.ndarray[Any, np.dtype[np.float32]], k: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32[k D] unit centres of at least k rows."""
    if k == len(x):
        return x
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        means: Any = faiss.Kmeans(
            x.shape[1], int(k), niter=_ITERATIONS, spherical=True, seed=seed, min_points_per_centroid=1
        )
        means.train(x)
    finally:
        faiss.omp_set_num_threads(threads)
    found: np.ndarray[Any, np.dtype[np.float32]] = means.centroids
    return found


@dataclass(frozen=True)
class Probing:
    """Which lists a row looks into: its own, then those with the nearest centres among the lists around its own."""

    centers: Tensor
    """Float32[L D]."""
    sizes: Tensor
    """Int64[L], rows of each list."""
    k: int
    """Neighbours that each row must find: more lists are opened where those opened hold too few rows."""
    reach: int
    """Lists around a list that are ranked for its rows."""
    nprobe: int
    """Lists opened for a row, its own among them."""

    def opened(self, x: Tensor, home: int) -> tuple[Tensor, Tensor]:
        """The lists that rows of one list look into.

        Args:
            x: Float32[n D], unit or zero rows.
            home: their list.

        Returns:
            Int64[p] places of the rows, Int64[p] lists: each pair once, in order of the place, the own list first.
        """
        lists, needed = ranked_lists(self.centers, self.sizes, x, home, self.k, self.reach)
        needed[:, : self.nprobe] = True
        return needed.nonzero()[:, 0], lists[needed]


def ranked_lists(centers: Tensor, sizes: Tensor, x: Tensor, home: int, k: int, reach: int) -> tuple[Tensor, Tensor]:
    """The lists around a list, by the nearness of their centres to each of its rows.

    Args:
        centers: Float32[L D].
        sizes: Int64[L], rows of each list, more than `k` in all.
        x: Float32[n D], rows of the list.
        home: the list.
        k: neighbours that each row must find.
        reach: lists ranked, at most L; more where these hold too few rows.

    Returns:
        Int64[n M] lists, the own first; Bool[n M], those that must be opened so that more than `k` rows are seen.
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
    return lists, rows.cumsum(1) - rows <= k


def choose_probes(
    centers: Tensor, sizes: Tensor, queries: Tensor, homes: Tensor, truth: Tensor, min_recall: float
) -> tuple[int, int]:
    """The fewest lists to open, from where the true neighbours of some rows lie: nothing is searched.

    Args:
        centers: Float32[L D].
        sizes: Int64[L], rows of each list.
        queries: Float32[q D], some of the rows.
        homes: Int64[q], their lists.
        truth: Int64[q k], the list of each of their true neighbours.
        min_recall: share of the true neighbours that must lie in lists that are opened, from 0 to 1.

    Returns:
        `reach` and `nprobe` of `Probing`.
    """
    reach = min(_FIRST_REACH, len(centers))
    while True:
        ranks = torch.cat([
            _ranks(*ranked_lists(centers, sizes, query[None], home, truth.shape[1], reach), own)
            for query, home, own in zip(queries, homes.tolist(), truth, strict=True)
        ])  # fmt: skip
        last = int(ranks.sort()[0][max(0, int(np.ceil(min_recall * len(ranks) - 1e-9)) - 1)])
        # Where four times as many are ranked as are opened, these are all but what a ranking of all lists gives.
        if reach == len(centers) or 4 * (last + 1) <= reach:
            return reach, last + 1
        reach = min(2 * reach, len(centers))


def _ranks(lists: Tensor, needed: Tensor, truth: Tensor) -> Tensor:
    """Int64[k]: the place of each true neighbour's list in Int64[1 M] lists; 0 where it is opened in any case."""
    same = lists == truth[:, None]
    rank = same.long().argmax(1).masked_fill(~same.any(1), _BEYOND)
    return rank.masked_fill((same & needed).any(1), 0)
