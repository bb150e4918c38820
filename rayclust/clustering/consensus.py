"""One partition out of many: vote of aligned members, and one round of self-training on its surest rows.

The forms are classical (Strehl and Ghosh, JMLR 3, 2002; Fred and Jain, PAMI 2005): members are renamed to agree with
the partition, rows take the name that most members give them, in turn until nothing changes. A linear classifier that
is fitted to the rows on which members agree then labels all rows, those outside the fit included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from rayclust.arrays import IntArray, require_matrix
from rayclust.errors import DataError, ShapeError

NO_OPINION = -1
"""Label of a member that leaves a row out."""
MOST_DENSE = 5_000
"""Clusters up to which the matching is solved on a dense matrix; a few seconds at this size."""
_VOTES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Vote:
    """The partition on which members agree most."""

    labels: Tensor
    """Int64[N]."""
    confidence: Tensor
    """Float32[N], share of the members' weight that a row's label has, in [0, 1]."""
    margin: Tensor
    """Float32[N], the same less the share of the second label."""
    agreement: float
    """G = Σ_h w_h · (rows on which member h, renamed, agrees); it never falls from round to round."""
    names: tuple[IntArray, ...]
    """Of each member: Int64[K_h], the label that each of its clusters stands for; −1 for none."""
    rounds: int
    """Rounds until nothing changed."""


def match_clusters(overlaps: sparse.csr_array) -> IntArray:
    """Name each of a member's clusters after the reference's cluster so that most rows agree.

    With at most as many clusters as the reference, no two have the same name (maximum-weight matching); with more, each
    has the name that most of its rows have.

    Args:
        overlaps: Int64[K_h K], rows that a cluster of the member shares with one of the reference.

    Returns:
        Int64[K_h], names in [0, K); −1 for an empty cluster of a member with more clusters than the reference.
    """
    K_h, K = overlaps.shape
    if K_h > K:
        filled = np.diff(overlaps.indptr) > 0
        best = np.full(K_h, NO_OPINION, dtype=np.int64)
        best[filled] = np.asarray(overlaps[filled].argmax(axis=1)).ravel()
        return best
    if max(K_h, K) <= MOST_DENSE:
        return np.asarray(linear_sum_assignment(overlaps.toarray(), maximize=True)[1], dtype=np.int64)
    # Each row gets a column of its own, at the cost of no overlap, so that a full matching on the nonzeros exists.
    most = int(overlaps.max())
    costs = sparse.csr_array(overlaps.astype(np.float64))
    costs.data = most + 1.0 - costs.data
    spare = sparse.diags_array(np.full(K_h, most + 1.0), format="csr")
    rows, columns = min_weight_full_bipartite_matching(sparse.csr_array(sparse.hstack([costs, spare])))
    names = np.empty(K_h, dtype=np.int64)
    names[rows] = columns
    unmatched = names >= K
    names[unmatched] = np.setdiff1d(np.arange(K), names[~unmatched])[: int(unmatched.sum())]
    return names


def vote(
    members: Sequence[Tensor], clusters: int, start: Tensor, weights: Sequence[float] | None = None, rounds: int = 20
) -> Vote:
    """Find the partition with which the members, renamed, agree most; each half-step of a round is exact.

    Args:
        members: Int64[N] each, labels from 0, −1 where a member has no opinion; any numbers of clusters.
        clusters: K of the result.
        start: Int64[N], labels in [0, K), which the first renaming follows; ties keep it.
        weights: of the members, not below 0; None weighs all alike.
        rounds: most rounds; few are needed.

    Raises:
        DataError: there are no members, or all weights are 0.
        ShapeError: a member is not as long as the start.
    """
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(members) == 0 or float(shares.sum()) <= 0:
        raise DataError("members = 0: a vote needs at least one with a weight above 0")
    for member in members:
        if member.shape != start.shape:
            raise ShapeError(f"member has shape {tuple(member.shape)}: {tuple(start.shape)} is needed, as of the start")
    labels, count = start.clone(), len(start)
    known = [member >= 0 for member in members]
    sizes = [int(member.max()) + 1 if bool(mask.any()) else 0 for member, mask in zip(members, known, strict=True)]
    block = max(1, _VOTES_AT_ONCE // clusters)
    done = 0
    while True:
        # 1. Rename each member to agree with the labels.
        names = []
        for member, mask, size in zip(members, known, sizes, strict=True):
            pairs = (member[mask].cpu().numpy(), labels[mask].cpu().numpy())
            ones = np.ones(len(pairs[0]), dtype=np.int64)
            names.append(match_clusters(sparse.coo_array((ones, pairs), shape=(size, clusters)).tocsr()))
        # 2. Each row takes the name with the most weight; ties keep the present label.
        confidence, margin = torch.zeros(count), torch.zeros(count)
        new = labels.clone()
        for low in range(0, count, block):
            span = slice(low, low + block)
            votes = torch.zeros((len(labels[span]), clusters), dtype=torch.float64)
            for member, name, weight in zip(members, names, shares, strict=True):
                renamed = torch.from_numpy(np.append(name, NO_OPINION))[member[span].cpu()]  # −1 takes the last entry
                here = (renamed >= 0).nonzero()[:, 0]
                votes[here, renamed[here]] += weight
            present = votes.gather(1, labels[span].cpu()[:, None])[:, 0]
            top, ids = votes.topk(min(2, clusters), dim=1)
            kept = present >= top[:, 0]
            new[span] = torch.where(kept, labels[span].cpu(), ids[:, 0]).to(new.device)
            confidence[span] = (top[:, 0] / shares.sum()).float()
            margin[span] = ((top[:, 0] - (top[:, 1] if clusters > 1 else 0.0)) / shares.sum()).float()
        done += 1
        changed = not torch.equal(new, labels)
        labels = new
        if not changed or done >= rounds:
            total = float(confidence.sum(dtype=torch.float64)) * float(shares.sum())
            return Vote(labels, confidence, margin, total, tuple(names), done)


def surest_rows(labels: Tensor, confidence: Tensor, margin: Tensor, share: float) -> Tensor:
    """Return the surest rows of each cluster, so that no cluster is lost whatever their number.

    Args:
        labels: Int64[N].
        confidence: Float[N].
        margin: Float[N]; decides between rows of equal confidence, and then the row's number.
        share: ρ, share of a cluster's rows that is kept; at least one is.

    Returns:
        Bool[N].
    """
    order = torch.from_numpy(np.lexsort((-margin.cpu().numpy(), -confidence.cpu().numpy(), labels.cpu().numpy())))
    sizes = torch.bincount(labels.cpu())
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(labels)) - starts[labels.cpu()[order]]
    quota = (share * sizes).long().clamp(min=1)
    kept = torch.zeros(len(labels), dtype=torch.bool)
    kept[order] = place < quota[labels.cpu()[order]]
    return kept


def ridge_classifier(x: Tensor, labels: Tensor, clusters: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier by ridge regression to one-hot labels; its score is x·w_c + b_c.

    Args:
        x: Float[N D].
        labels: Int64[N].
        clusters: K.
        penalty: λ, added to the diagonal of the centred Gram matrix; above 0.

    Returns:
        Float[D K] weights and Float[K] biases, in the dtype of `x`. For λ → ∞ scores are the clusters' shares.
    """
    require_matrix(x, "x")
    rows = x.double()
    mean = rows.mean(0)
    centered = rows - mean
    # Xᵀ Y is the sum of the rows of each cluster: no N × K matrix.
    sums = torch.zeros((clusters, rows.shape[1]), dtype=torch.float64, device=x.device).index_add_(0, labels, centered)
    shares = torch.bincount(labels, minlength=clusters).double() / len(labels)
    gram = centered.T @ centered
    gram.diagonal().add_(penalty)
    weight = torch.cholesky_solve(sums.T, torch.linalg.cholesky(gram))
    return weight.to(x.dtype), (shares - mean @ weight).to(x.dtype)
