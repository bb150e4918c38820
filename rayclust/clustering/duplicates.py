"""Near-duplicates among unit rows: SemDeDup (arXiv 2303.09540), made exact across the borders of clusters.

Rows i and j are near if cos(i, j) ≥ 1 − ε. Of each group of near rows a policy keeps some, in a given order:

- component: the first of each connected component. One row for each group; chains may join rows that are not alike.
- semdedup: rows without an earlier near row, kept or not, as published.
- greedy: rows without an earlier *kept* near row: every row that is removed has a kept one within ε, and no two kept
  rows are near.

Kept sets are nested: component ⊆ semdedup ⊆ greedy. One search at the largest ε serves all smaller ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ShapeError

Policy = Literal["component", "semdedup", "greedy"]

MOST_NEAR = 64
"""Near rows kept for each row, the nearest: memory stays linear in the rows. See `refine`."""
_ROWS_AT_ONCE = 4096
_PAIRS_AT_ONCE = 2**20
_SLACK = 1e-6
"""What a float32 product of unit rows may be wrong by; pairs so close to the bound are decided in float64."""
_HALVINGS = 24
"""Of the interval in which an ε is searched."""
_ROUNDS = 64
"""Parallel rounds of the greedy policy; a chain in order would need one for every second row."""


@dataclass(frozen=True)
class Edges:
    """Pairs of near rows, each once and with the smaller row first, in order."""

    first: IntArray
    """Int64[E]."""
    second: IntArray
    """Int64[E], above `first`."""
    cosine: FloatArray
    """Float64[E]."""

    @classmethod
    def merge(cls, parts: Iterable[Edges]) -> Edges:
        """Return the pairs of all parts, in whatever direction and however often they stand there, without loops."""
        found = list(parts)
        if not found:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        i, j = (np.concatenate([getattr(part, end) for part in found]) for end in ("first", "second"))
        cosine = np.concatenate([part.cosine for part in found])
        low, high = np.minimum(i, j), np.maximum(i, j)
        order = np.lexsort((-cosine, high, low))
        low, high, cosine = low[order], high[order], cosine[order]
        is_new = np.ones(len(low), bool)
        is_new[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
        is_new &= low != high
        return cls(low[is_new], high[is_new], cosine[is_new])

    def within(self, epsilon: float, *, strict: bool = False) -> Edges:
        """Return the pairs with cos ≥ 1 − ε; with `strict`, as published, only those above."""
        near = self.cosine > 1 - epsilon if strict else self.cosine >= 1 - epsilon
        return Edges(self.first[near], self.second[near], self.cosine[near])


def first_of_equal(blocks: Iterable[NDArray[np.generic]]) -> IntArray:
    """Return Int64[N], the first row with the same bytes as each row, of all blocks [B D] in their order."""
    # 1. 128 bits of the hash of each row's bytes.
    digests = list[bytes]()
    for block in blocks:
        require_matrix(block, "rows")
        data = np.ascontiguousarray(block)
        # Joined by block: 16 bytes a row, while an object for each would take some 60.
        digests.append(b"".join(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in data))
    hashes = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    # 2. The first row of each hash.
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes in order of rows
    ordered = hashes[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


# The search.


def near_pairs(
    queries: Tensor, query_ids: Tensor, rows: Tensor, ids: Tensor, least: float, most: int | None = MOST_NEAR
) -> Edges:
    """Find the rows near to each query by blocks of products.

    Args:
        queries: Float32[q D], unit rows.
        query_ids: Int64[q]; a query does not find the row of its own id.
        rows: Float32[m D], unit rows.
        ids: Int64[m].
        least: 1 − ε, smallest cosine, decided in float64.
        most: rows kept for each query, the nearest; None keeps all.

    Returns:
        Pairs (query, row), not yet merged: by query, nearest first.

    Raises:
        ShapeError: the widths differ.
    """
    require_matrix(rows, "rows", queries.shape[1])
    found: list[Edges] = []
    for start in range(0, len(queries), _ROWS_AT_ONCE):
        some, some_ids = queries[start : start + _ROWS_AT_ONCE], query_ids[start : start + _ROWS_AT_ONCE]
        held, waiting = list[Edges](), 0
        for low in range(0, len(rows), _ROWS_AT_ONCE):
            block, block_ids = rows[low : low + _ROWS_AT_ONCE], ids[low : low + _ROWS_AT_ONCE]
            # np.flatnonzero is many times as fast as torch's nonzero where few are.
            flat = torch.from_numpy(np.flatnonzero((some @ block.T >= least - _SLACK).numpy()))
            for part in torch.split(flat, _PAIRS_AT_ONCE) if len(flat) else ():
                q, r = part // len(block), part % len(block)
                cosine = (some[q].double() * block[r].double()).sum(1)
                near = (cosine >= least) & (some_ids[q] != block_ids[r])
                pairs = (some_ids[q[near]], block_ids[r[near]], cosine[near])
                held.append(Edges(*(column.numpy() for column in pairs)))
                waiting += len(held[-1].first)
                if most is not None and waiting > 4 * _PAIRS_AT_ONCE:
                    held = [_nearest_of_each(held, most)]
                    waiting = len(held[0].first)
        if held:
            found.append(_nearest_of_each(held, most))
    return (
        Edges(*(np.concatenate([getattr(part, name) for part in found]) for name in vars(found[0])))
        if found
        else (Edges.merge([]))
    )


def _nearest_of_each(parts: Sequence[Edges], most: int | None) -> Edges:
    """Return each query's `most` nearest rows, ties by row; None keeps all."""
    i, j, cosine = (np.concatenate([getattr(part, name) for part in parts]) for name in ("first", "second", "cosine"))
    order = np.lexsort((j, -cosine, i))
    i, j, cosine = i[order], j[order], cosine[order]
    kept = np.arange(len(i)) - np.searchsorted(i, i) < (len(i) if most is None else most)
    return Edges(i[kept], j[kept], cosine[kept])


@dataclass(frozen=True)
class Search:
    """Near pairs of some clusters' rows."""

    pairs: Edges
    """(row, near row) as `near_pairs` gives them: each row's nearest first, pairs perhaps in both directions."""
    wanted: int
    """Clusters that the rows must be compared with for an exact result, summed over the rows."""
    compared: int
    """Pairs of rows that were compared."""


def cluster_pairs(
    x: Tensor, bounds: IntArray, centers: Tensor, clusters: range, *, epsilon: float, probes: int | None = 4
) -> Search:
    """Compare the rows of some clusters with their own cluster and with the others where near rows may lie.

    A row i at the angle α_i from its own centre is compared with the cluster c if angle(i, c) ≤ α_i + θ, where θ is
    arccos(1 − ε). Without a cap no near pair is missed: for a pair in clusters a and b the excesses angle(i, b) − α_i
    and angle(j, a) − α_j sum to at most 2θ, so one of the two is at most θ and finds the pair.

    Args:
        x: Float32[N D], unit rows in order of their clusters.
        bounds: Int64[L + 1], the first row of each cluster, and N.
        centers: Float32[L D], unit rows.
        clusters: those whose rows are compared.
        epsilon: ε.
        probes: most clusters for each row, its own and the nearest ones; None compares with all that are wanted, 1
            is as published.

    Returns:
        Pairs of positions in `x`.

    Raises:
        ShapeError: bounds do not fit the centres.
    """
    require_matrix(centers, "centers", x.shape[1])
    if len(bounds) != len(centers) + 1:
        raise ShapeError(f"bounds has {len(bounds)} entries: {len(centers) + 1} are needed, one more than centers")
    theta, least = math.acos(max(-1.0, 1 - epsilon)), 1 - epsilon
    found, wanted, compared = list[Edges](), 0, 0
    for home in clusters:
        low, high = int(bounds[home]), int(bounds[home + 1])
        for start in range(low, high, _ROWS_AT_ONCE):
            rows = torch.arange(start, min(start + _ROWS_AT_ONCE, high))
            block = x[start : start + len(rows)]
            # 1. The clusters that each row looks into.
            angles = (block @ centers.T).clamp_(-1, 1).acos_()
            angles[:, home] -= 10  # the own one first, and always
            is_wanted = angles <= angles[:, home, None] + 10 + theta
            wanted += int(is_wanted.sum())
            if probes is not None and probes < len(centers):
                nearest = angles.topk(probes, dim=1, largest=False)[1]
                is_probed = torch.zeros_like(is_wanted).scatter_(1, nearest, True)
                is_wanted &= is_probed
            # 2. One product for each of these clusters.
            held = []
            for cluster in np.flatnonzero(is_wanted.any(0).numpy()).tolist():
                own = is_wanted[:, cluster].nonzero().squeeze(1)
                first, last = int(bounds[cluster]), int(bounds[cluster + 1])
                compared += len(own) * (last - first)
                members = torch.arange(first, last)
                held.append(near_pairs(block[own], rows[own], x[first:last], members, least))
            found.append(_nearest_of_each(held, MOST_NEAR))
    pairs = _nearest_of_each(found, MOST_NEAR) if found else Edges.merge([])
    return Search(pairs, wanted, compared)


def refine(
    x: Tensor, edges: Edges, rank: IntArray, saturated: NDArray[np.bool_], *, policy: Policy, epsilon: float
) -> Edges:
    """Add near pairs that the cap on near rows left out, until no two kept rows are near because of it.

    A pair is left out only where both rows have as many nearer rows as are kept for each (`saturated`): kept rows of
    that kind are compared with each other, and the policy is asked again.

    Args:
        x: Float32[N D], unit rows.
        edges: found so far.
        rank: Int64[N], the order of the rows.
        saturated: Bool[N], rows whose list of near rows was full.
        policy: see the module.
        epsilon: ε.

    Returns:
        All pairs, the new ones among them.
    """
    while len(rows := np.flatnonzero(kept_rows(edges.within(epsilon), rank, policy) & saturated)) > 1:
        ids = torch.from_numpy(rows)
        some = x[ids]
        more = Edges.merge([edges, near_pairs(some, ids, some, ids, 1 - epsilon)])
        if len(more.first) == len(edges.first):
            break
        edges = more
    return edges


def recall(x: Tensor, edges: Edges, sample: IntArray, epsilon: float, rows: IntArray | None = None) -> float | None:
    """Return the share of the near pairs of a sample of rows that is among the edges, by brute force.

    Args:
        x: Float32[N D], unit rows.
        edges: what was found.
        sample: Int64[n], rows.
        epsilon: ε.
        rows: Int64[m], the rows that can be found; None: all.

    Returns:
        Share in [0, 1]; None if the sample has no near pair.
    """
    queries = torch.from_numpy(sample)
    ids = torch.arange(len(x)) if rows is None else torch.from_numpy(rows)
    true = Edges.merge(
        near_pairs(x[queries], queries, x[some], some, 1 - epsilon, most=None) for some in torch.split(ids, 2**16)
    )
    if not len(true.first):
        return None
    pairs = [e.first.astype(np.int64) * len(x) + e.second for e in (true, edges.within(epsilon))]
    return float(np.isin(pairs[0], pairs[1]).mean())


# What is kept.


def components(edges: Edges, count: int) -> IntArray:
    """Return Int64[N], the smallest row of each row's connected component; it does not depend on the edges' order."""
    from scipy import sparse

    ones = np.ones(len(edges.first), bool)
    graph = sparse.coo_array((ones, (edges.first, edges.second)), shape=(count, count))
    number, component = sparse.csgraph.connected_components(graph, directed=False)
    smallest = np.full(number, count, np.int64)
    np.minimum.at(smallest, component, np.arange(count))
    return np.asarray(smallest[component])


def kept_rows(edges: Edges, rank: IntArray, policy: Policy) -> NDArray[np.bool_]:
    """Return Bool[N], the rows that a policy keeps.

    Args:
        edges: near pairs.
        rank: Int64[N], the place of each row in the order; smaller is kept first.
        policy: see the module.
    """
    if policy == "component":
        group = components(edges, len(rank))
        best = np.full(len(rank), len(rank), np.int64)
        np.minimum.at(best, group, rank)
        return np.asarray(rank == best[group])
    kept = np.ones(len(rank), bool)
    is_first = rank[edges.first] < rank[edges.second]
    early, late = np.where(is_first, [edges.first, edges.second], [edges.second, edges.first])
    if policy == "semdedup":
        kept[late] = False
        return kept
    # greedy: a row is decided once all its earlier near rows are. Rounds over the open edges, then one by one.
    for _ in range(_ROUNDS):
        if not len(early):
            return kept
        has_earlier = np.zeros(len(rank), bool)
        has_earlier[late] = True  # `early` is never a removed row here
        removing = ~has_earlier[early]
        kept[late[removing]] = False
        is_open = kept[early] & kept[late] & ~removing
        early, late = early[is_open], late[is_open]
    order = np.argsort(rank[late], kind="stable")
    for a, b in zip(early[order].tolist(), late[order].tolist(), strict=True):
        if kept[a]:
            kept[b] = False
    return kept


def ranks(values: FloatArray | None, count: int, *, largest_first: bool = True) -> IntArray:
    """Return Int64[N], the place of each row in the order of its value, ties by row; None is the order of the rows."""
    rank = np.arange(count, dtype=np.int64)
    if values is not None:
        rank[np.argsort(-values if largest_first else values, kind="stable")] = np.arange(count)
    return rank


def even_ranges(bounds: IntArray, rows: int) -> list[range]:
    """Return ranges of consecutive clusters with at least `rows` rows each, but for the last."""
    cuts, start = [0], 0
    for cluster in range(1, len(bounds)):
        if bounds[cluster] - bounds[start] >= rows or cluster == len(bounds) - 1:
            cuts.append(cluster)
            start = cluster
    return [range(low, high) for low, high in pairwise(cuts)]


# All of it together.


@dataclass(frozen=True)
class Decision:
    """Which rows stay, at one ε."""

    edges: Edges
    """All pairs known, up to the largest ε."""
    epsilon: float
    """ε, as given or found for a share."""
    kept: NDArray[np.bool_]
    """Bool[N]."""
    keeper: IntArray
    """Int64[N], the row that stands for each: itself if it is kept, else the nearest kept one for `greedy`. The other
    policies may leave a removed row without a kept one near to it: the first of its component stands for it."""
    group: IntArray
    """Int64[N], the smallest row of each row's group, identical rows among them."""
    curve: tuple[dict[str, float], ...]
    """The share of the rows that is kept, by ε up to the largest."""


def decide(
    x: Tensor,
    edges: Edges,
    first: IntArray,
    rank: IntArray,
    saturated: NDArray[np.bool_],
    *,
    policy: Policy,
    largest: float,
    epsilon: float | None = None,
    keep_share: float | None = None,
) -> Decision:
    """Decide which rows stay.

    Args:
        x: Float32[N D], unit rows.
        edges: near pairs up to the largest ε, of rows that are the first of their identical ones.
        first: Int64[N] of `first_of_equal`.
        rank: Int64[N], the order of the rows.
        saturated: Bool[N]; see `refine`.
        policy: see the module; `semdedup` takes pairs with cos > 1 − ε, as published.
        largest: the largest ε.
        epsilon: ε; None finds the one at which `keep_share` of the rows stays.
        keep_share: in (0, 1].
    """
    rows, strict = np.arange(len(first)), policy == "semdedup"
    is_first = first == rows

    def share(at: float) -> float:
        return float((kept_rows(edges.within(at, strict=strict), rank, policy) & is_first).mean())

    # 1. ε; for a share by bisection, the largest where more rows are kept even there.
    full = saturated & is_first
    edges = refine(x, edges, rank, full, policy=policy, epsilon=largest)
    if epsilon is None:
        wanted, low, epsilon = 1.0 if keep_share is None else keep_share, 0.0, largest
        if share(largest) <= wanted:
            for _ in range(_HALVINGS):
                middle = (low + epsilon) / 2
                low, epsilon = (low, middle) if share(middle) <= wanted else (middle, epsilon)
    # 2. The rows that stay.
    edges = refine(x, edges, rank, full, policy=policy, epsilon=epsilon)
    near = edges.within(epsilon, strict=strict)
    kept = kept_rows(near, rank, policy) & is_first
    group = components(near, len(first))
    # 3. Who stands for each of the others; identical rows follow the first of them, which is the smallest.
    keeper = rows.copy()
    if policy == "greedy":
        i, j = np.concatenate([near.first, near.second]), np.concatenate([near.second, near.first])
        cosine = np.concatenate([near.cosine, near.cosine])
        standing = kept | ~is_first
        useful = ~standing[i] & standing[j]
        i, j, cosine = i[useful], j[useful], cosine[useful]
        order = np.lexsort((j, -cosine, i))
        removed, place = np.unique(i[order], return_index=True)
        keeper[removed] = j[order][place]
    else:
        order = np.lexsort((rank, group))
        keeper = np.where(kept | ~is_first, rows, order[np.searchsorted(group[order], group)])
    curve = tuple(
        {"epsilon": float(at), "share_kept": share(at)} for at in [0.0, *np.geomspace(largest / 100, largest, 9)]
    )
    return Decision(edges, epsilon, kept, np.where(kept, rows, keeper[first]), group[first], curve)
