"""One partition out of many: a gate, a vote of aligned members, and one round of self-training on its surest rows.

The forms are classical (Strehl and Ghosh, JMLR 3, 2002; Fred and Jain, PAMI 2005): members are renamed to agree with
the partition, rows take the name that most members give them, in turn until nothing changes. A linear classifier that
is fitted to the rows on which members agree then labels all rows, those outside the fit included. How they are put
together, and the constants, are ours and no paper's.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.special import xlogy
from torch import Tensor

from rayclust.arrays import IntArray, require_matrix
from rayclust.clustering import kmeans
from rayclust.clustering.neighborhood import modularity, modularity_terms
from rayclust.errors import DataError, ShapeError
from rayclust.settings import KMeansOptions

NO_OPINION = -1
"""Label of a member that leaves a row out."""
MOST_DENSE = 5_000
"""Clusters up to which the matching is solved on a dense matrix; a few seconds at this size."""
COMPARED_ROWS = 1_000_000
"""Rows on which members are compared with each other, evenly spread."""
MIN_OCCUPIED, MIN_SIZE_ENTROPY, MIN_KEPT = 0.9, 0.7, 3
"""Bounds of the gate: share of K that is occupied, entropy of sizes / ln K, members that are kept at least."""
TIE = 1e-9
"""By how much more a member weighs than the next one in modularity: it decides ties, and nothing else."""
MIN_SHARED, MIN_NEIGHBORS = 0.5, 3
"""Share of members that must join a row with a neighbour that is kept, and neighbours that are kept at least."""
MAX_ENTROPY_LOSS, MIN_VOTE_AGREEMENT = 0.05, 0.8
"""Guards of self-training: share of the sizes' entropy that may be lost, share of rows that keep the vote's label."""
_VOTES_AT_ONCE = 1 << 24
_RIDGE_VALUES = 1 << 27


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


@dataclass(frozen=True)
class SoftLabels:
    """The few most probable clusters of each row."""

    clusters: Tensor
    """Int64[N S], −1 for none."""
    shares: Tensor
    """Float[N S], their probabilities."""

    @classmethod
    def of(cls, member: Tensor | SoftLabels, columns: int = 4) -> SoftLabels:
        """Return a member on the CPU: labels Int64[N] as they are, or of Float[N K] the largest few of each row.

        `columns` says how many; they are kept whatever they sum to.
        """
        if isinstance(member, SoftLabels):
            return member
        if member.dim() == 1:
            return cls(member.cpu()[:, None], torch.ones(()).expand(len(member), 1))
        shares, clusters = member.cpu().topk(min(columns, member.shape[1]), dim=1)
        return cls(clusters, shares)


def hard_labels(member: Tensor | SoftLabels) -> Tensor:
    """Return Int64[N], the most probable cluster of each row; of labels the same labels, on the CPU."""
    return SoftLabels.of(member).clusters[:, 0]


def match_clusters(overlaps: sparse.csr_array) -> IntArray:
    """Match each of a member's clusters to one of the reference's so that most rows agree.

    With at most as many clusters as the reference, no two have the same name (maximum-weight matching); with more, each
    has the name that most of its rows have.

    Args:
        overlaps: Int64 or Float64[K_h K], rows that a cluster of the member shares with one of the reference.

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
    most = float(overlaps.max())
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
    members: Sequence[Tensor | SoftLabels],
    clusters: int,
    start: Tensor,
    weights: Sequence[float] | None = None,
    rounds: int = 20,
) -> Vote:
    """Find the partition with which the members, renamed, agree most; each half-step of a round is exact.

    Args:
        members: Int64[N] each, labels from 0, −1 where a member has no opinion; or soft. Any numbers of clusters.
        clusters: K of the result.
        start: Int64[N], labels in [0, K), which the first renaming follows; ties keep it. −1 takes no part.
        weights: of the members, not below 0; None weighs all alike.
        rounds: most rounds; few are needed.

    Raises:
        DataError: there are no members, or all weights are 0.
        ShapeError: a member is not as long as the start.
    """
    shares = np.ones(len(members)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(members) == 0 or float(shares.sum()) <= 0:
        raise DataError("members = 0: a vote needs at least one with a weight above 0")
    soft = [SoftLabels.of(member) for member in members]
    for member in soft:
        if len(member.clusters) != len(start):
            given = tuple(member.clusters[:, 0].shape)
            raise ShapeError(f"member has shape {given}: {tuple(start.shape)} is needed, as of the start")
    labels, count, done = start.cpu().clone(), len(start), 0
    sizes = [_cluster_count(member) for member in soft]
    block = max(1, _VOTES_AT_ONCE // clusters)
    while True:
        # 1. Rename each member to agree with the labels.
        names = [
            match_clusters(_overlaps(member, labels, size, clusters)) for member, size in zip(soft, sizes, strict=True)
        ]
        # 2. Each row takes the name with the most weight; ties keep the present label.
        confidence, margin = torch.zeros(count), torch.zeros(count)
        new = labels.clone()
        for low in range(0, count, block):
            span = slice(low, low + block)
            votes = torch.zeros((len(labels[span]), clusters), dtype=torch.float64)
            for member, name, weight in zip(soft, names, shares, strict=True):
                renaming = torch.from_numpy(np.append(name, NO_OPINION))  # −1 takes the last entry
                for ids, part in zip(member.clusters[span].T, member.shares[span].T, strict=True):
                    renamed = renaming[ids]
                    here = (renamed >= 0).nonzero()[:, 0]
                    votes[here, renamed[here]] += weight * part[here].double()
            present = votes.gather(1, labels[span].clamp(min=0)[:, None])[:, 0]
            top, ids = votes.topk(min(2, clusters), dim=1)
            kept = (present >= top[:, 0]) & (labels[span] >= 0)
            new[span] = torch.where(kept, labels[span], ids[:, 0])
            confidence[span] = (top[:, 0] / shares.sum()).float()
            margin[span] = ((top[:, 0] - (top[:, 1] if clusters > 1 else 0.0)) / shares.sum()).float()
        done += 1
        changed = not torch.equal(new, labels)
        labels = new
        if not changed or done >= rounds:
            total = float(confidence.sum(dtype=torch.float64)) * float(shares.sum())
            return Vote(labels.to(start.device), confidence, margin, total, tuple(names), done)


def _cluster_count(member: SoftLabels) -> int:
    """Return K_h, the largest label and 1."""
    return int(member.clusters.max()) + 1 if member.clusters.numel() else 0


def _overlaps(member: SoftLabels, labels: Tensor, K_h: int, K: int) -> sparse.csr_array:  # noqa: N803 - legend of arrays.py
    """Return Float64[K_h K], the rows that clusters of a member share with those of labels Int64[N], −1 left out."""
    known = (member.clusters >= 0) & (labels >= 0)[:, None]
    others = labels[:, None].expand_as(member.clusters)[known].numpy()
    pairs = (member.clusters[known].numpy(), others)
    return sparse.coo_array((member.shares[known].double().numpy(), pairs), shape=(K_h, K)).tocsr()


@dataclass(frozen=True)
class MemberEvidence:
    """What is known of a member without labels, and why the gate drops it."""

    clusters: int
    """K_h."""
    occupied: int
    """Clusters with rows."""
    size_entropy: float
    """Of the sizes, relative to ln K_h."""
    modularity: float
    """On the neighbour graph, among the rows with an opinion."""
    neighbor_agreement: float
    """Share of neighbour pairs that it keeps together."""
    agreement: float
    """Mean share of rows on which the others, matched one to one, say the same."""
    dropped: str
    """Reason; empty for a member that votes."""


def evidence(labels: Tensor, neighbors: Tensor, clusters: int, agreement: float = 1.0) -> MemberEvidence:
    """Measure a partition without labels.

    Args:
        labels: Int64[N], −1 for rows without an opinion, which are left out.
        neighbors: Int64[N M], −1 where a row has fewer.
        clusters: K_h.
        agreement: with other partitions, as it is to be noted.
    """
    known, block = (labels >= 0).nonzero()[:, 0], max(1, _VOTES_AT_ONCE // max(1, neighbors.shape[1]))
    terms = torch.zeros(clusters + 2, dtype=torch.float64)
    for rows in torch.split(known, block):
        ids = neighbors[rows]
        near = torch.where(ids >= 0, labels[ids.clamp(min=0)], NO_OPINION)
        terms += modularity_terms(labels[rows][None], near[None], clusters)[0]
    shares = (terms[:-2] / terms[:-2].sum().clamp(min=1)).numpy()
    return MemberEvidence(
        clusters=clusters,
        occupied=int((shares > 0).sum()),
        size_entropy=float(-xlogy(shares, shares).sum() / np.log(max(clusters, 2))),
        modularity=float(modularity(terms[None])[0]),
        neighbor_agreement=float(terms[-2] / terms[-1].clamp(min=1)),
        agreement=agreement,
        dropped="",
    )


def agreements(members: Sequence[Tensor]) -> Tensor:
    """Return the shares of rows on which members say the same when their clusters are matched one to one.

    Takes Int64[N] each, −1 left out, to Float64[H H], symmetric with a diagonal of 1; on a sample of many rows.
    """
    stride = max(1, len(members[0]) // COMPARED_ROWS)
    soft = [SoftLabels.of(member[::stride].contiguous()) for member in members]
    sizes = [_cluster_count(member) for member in soft]
    shared = torch.eye(len(members), dtype=torch.float64)
    for g, h in itertools.combinations(range(len(members)), 2):
        small, large = (g, h) if sizes[g] <= sizes[h] else (h, g)
        table = _overlaps(soft[small], soft[large].clusters[:, 0], sizes[small], sizes[large])
        matched = table[np.arange(sizes[small]), match_clusters(table)].sum() if sizes[small] else 0.0
        shared[g, h] = shared[h, g] = float(matched) / max(float(table.sum()), 1.0)
    return shared


def gate(members: Sequence[Tensor], clusters: int, neighbors: Tensor, shared: Tensor) -> list[MemberEvidence]:
    """Choose the members that vote: no copies, none with lost clusters, and of the rest the upper half by modularity.

    Where no member passes the bounds on clusters, they are not applied.

    Args:
        members: Int64[N] each, −1 where a member has no opinion.
        clusters: K of the result.
        neighbors: Int64[N M], −1 where a row has fewer.
        shared: Float[H H], `agreements`.
    """
    count = len(members)
    others = ((shared.sum(1) - 1.0) / max(count - 1, 1)).tolist()
    found = [
        evidence(member, neighbors, max(int(member.max()) + 1, 1), other)
        for member, other in zip(members, others, strict=True)
    ]
    reasons = [""] * count
    first = dict[str, int]()
    for place, (member, one) in enumerate(zip(members, found, strict=True)):
        twin = first.setdefault(hashlib.sha256(member.cpu().numpy().tobytes()).hexdigest(), place)
        if twin != place:
            reasons[place] = f"a copy of member {twin}"
        elif one.clusters == clusters and one.occupied < MIN_OCCUPIED * clusters:
            reasons[place] = f"{one.occupied} of {clusters} clusters have rows"
        elif one.size_entropy < MIN_SIZE_ENTROPY:
            reasons[place] = f"sizes have {one.size_entropy:.2f} of the largest entropy"
    if all(reasons):
        reasons = [reason if reason.startswith("a copy") else "" for reason in reasons]
    left = sorted((h for h in range(count) if not reasons[h]), key=lambda h: -found[h].modularity)
    for h in left[max(MIN_KEPT, -(-len(left) // 2)) :]:
        reasons[h] = "in the lower half by modularity"
    return [replace(one, dropped=reason) for one, reason in zip(found, reasons, strict=True)]


@dataclass(frozen=True)
class ConsensusResult:
    """The vote of the members that pass the gate."""

    vote: Vote
    members: tuple[MemberEvidence, ...]
    voters: tuple[int, ...]
    """Members that vote, in the order of their modularity; the vote's `names` are in this order."""
    best: int | None
    """The voter of largest modularity among those with K clusters."""
    medoid: int
    """The voter on which the others agree most."""


def consensus(
    members: Sequence[Tensor | SoftLabels], clusters: int, neighbors: Tensor, seed: int = 0
) -> ConsensusResult:
    """Filter members by `gate`, and let the rest vote from two starts; the larger agreement wins.

    The starts are the voter of largest modularity and the medoid, of those with K clusters; where none has K, the
    clusters of all voters are themselves clustered.

    Args:
        members: Int64[N] each, −1 where a member has no opinion, or soft; any numbers of clusters.
        clusters: K.
        neighbors: Int64[N M], −1 where a row has fewer.
        seed: of the clusters of clusters.

    Raises:
        DataError: there are no members, or one has no opinion at all.
        ShapeError: a member does not have one label for each row.
    """
    hard = [hard_labels(member) for member in members]
    if not hard:
        raise DataError("members = 0: a consensus needs at least one")
    for place, member in enumerate(hard):
        if len(member) != len(neighbors):
            raise ShapeError(f"members.{place} has {len(member)} labels: {len(neighbors)} are needed, one for each row")
        if int(member.max()) < 0:
            raise DataError(f"members.{place}: has no opinion on any row")
    shared = agreements(hard)
    found = gate(hard, clusters, neighbors.cpu(), shared)
    voters = sorted((h for h, one in enumerate(found) if not one.dropped), key=lambda h: -found[h].modularity)
    chosen = [members[h] for h in voters]
    medoid = voters[int(shared[voters][:, voters].sum(1).argmax())]
    weights = [1.0 + TIE * (len(voters) - place) for place in range(len(voters))]
    own = [h for h in voters if found[h].clusters == clusters]
    if own:
        near = own[int(shared[own][:, voters].sum(1).argmax())]
        starts = [hard[h] for h in dict.fromkeys([own[0], near])]
    else:
        starts = [meta_clusters([hard[h] for h in voters], clusters, seed)]
    votes = [vote(chosen, clusters, start, weights) for start in starts]
    best = max(votes, key=lambda one: one.agreement)
    return ConsensusResult(best, tuple(found), tuple(voters), own[0] if own else None, medoid)


def meta_clusters(members: Sequence[Tensor], clusters: int, seed: int = 0) -> Tensor:
    """Cluster the clusters of all members, for members without a common number of them.

    Two clusters are as near as the rows they share are among all of theirs (Jaccard); leading eigenvectors of that
    matrix, k-means weighted by sizes, and each row goes where the mean of its clusters' indicators is largest.

    Args:
        members: Int64[N] each, −1 left out.
        clusters: K.
        seed: of the k-means.

    Returns:
        Int64[N].

    Source: Strehl and Ghosh, JMLR 3, 2002, section 3.4 (MCLA), with a spectral partition in place of METIS.
    """
    # 1. The indicator A of all U clusters, and J_uv = |u ∩ v| / |u ∪ v| from AᵀA.
    sizes = [int(member.max()) + 1 for member in members]
    starts = np.cumsum([0, *sizes])
    rows, columns = [], []
    for member, start in zip(members, starts, strict=False):
        known = (member >= 0).nonzero()[:, 0].cpu().numpy()
        rows.append(known)
        columns.append(member.cpu().numpy()[known] + start)
    pairs = (np.concatenate(rows), np.concatenate(columns))
    indicator = sparse.coo_array((np.ones(len(pairs[0])), pairs), shape=(len(members[0]), int(starts[-1]))).tocsc()
    rows_of = np.asarray(indicator.sum(axis=0)).ravel()
    jaccard = (indicator.T @ indicator).tocoo()
    u, v = jaccard.coords
    jaccard.data = jaccard.data / (rows_of[u] + rows_of[v] - jaccard.data)
    # 2. Spectral embedding of the clusters with rows, and their k-means.
    filled = np.flatnonzero(rows_of)
    nearness = jaccard.tocsr()[filled][:, filled].toarray()
    scale = 1.0 / np.sqrt(nearness.sum(axis=1))
    leading = np.linalg.eigh(scale[:, None] * nearness * scale)[1][:, -min(clusters, len(filled)) :]
    codes = torch.nn.functional.normalize(torch.from_numpy(leading), dim=1)
    options = KMeansOptions(clusters=codes.shape[1], metric="euclidean", restarts=10)
    weights = torch.from_numpy(rows_of[filled])
    centers = kmeans.fit(lambda: [codes], options, seed=seed, weights=weights).centers
    groups = kmeans.assign(codes, centers.to(codes))[0].numpy()
    # 3. Rows by the mean indicator of each group of clusters.
    joined = sparse.coo_array((np.ones(len(filled)), (filled, groups)), shape=(int(starts[-1]), clusters)).tocsr()
    means = indicator.tocsr() @ joined @ sparse.diags_array(1.0 / np.bincount(groups, minlength=clusters).clip(min=1))
    return torch.from_numpy(np.asarray(means.tocsr().argmax(axis=1)).ravel().astype(np.int64))


def shared_neighbors(members: Sequence[Tensor], neighbors: Tensor) -> Tensor:
    """Keep the neighbours that most members put into the row's own cluster, at least three.

    Args:
        members: Int64[N] each, −1 where a member has no opinion, which counts as another cluster.
        neighbors: Int64[N M], nearest first, −1 where a row has fewer.

    Returns:
        Bool[N M]: a_ij, the share of the members that join row and neighbour, is at least ½, or among the three
        largest, nearer ones first where they are equal.
    """
    kept = torch.zeros_like(neighbors, dtype=torch.bool)
    block = max(1, _VOTES_AT_ONCE // max(1, neighbors.shape[1]))
    for rows in torch.split(torch.arange(len(neighbors)), block):
        ids = neighbors[rows].cpu()
        joined = torch.zeros(ids.shape)
        for member in members:
            own = member[rows].cpu()[:, None]
            joined += ((member.cpu()[ids.clamp(min=0)] == own) & (own >= 0)).float()
        joined = torch.where(ids >= 0, joined / len(members), -1.0)
        first = joined.argsort(dim=1, descending=True, stable=True)[:, :MIN_NEIGHBORS]
        kept[rows] = ((joined >= MIN_SHARED).scatter(1, first, value=True) & (ids >= 0)).to(kept.device)
    return kept


def neighbor_shares(labels: Tensor, neighbors: Tensor) -> Tensor:
    """Return the share of each row's neighbours that its own cluster has, Float32[N]; 0 without neighbours.

    Args:
        labels: Int64[N].
        neighbors: Int64[N M], −1 where a row has fewer.
    """
    shares = torch.empty(len(labels))
    for rows in torch.split(torch.arange(len(labels)), max(1, _VOTES_AT_ONCE // max(1, neighbors.shape[1]))):
        ids = neighbors[rows]
        is_known = ids >= 0
        is_same = (labels[ids.clamp(min=0)] == labels[rows][:, None]) & is_known
        shares[rows] = is_same.sum(1) / is_known.sum(1).clamp(min=1)
    return shares


def anmi(labels: Tensor, members: Sequence[Tensor]) -> float:
    """Return the mean mutual information with the members, divided by the geometric mean of the two entropies.

    From 0 to 1, larger is better; 1 where all members are renamings of the labels. Rows without an opinion are left out
    of the member's term; a partition into one cluster has 0 with any other.

    Source: Strehl and Ghosh, JMLR 3, 2002, eq. 4 and 6.
    """
    terms = []
    for member in members:
        soft = SoftLabels.of(member)
        table = _overlaps(soft, labels.cpu(), _cluster_count(soft), int(labels.max()) + 1)
        joint = table.toarray() / max(table.sum(), 1)
        p, q = joint.sum(axis=1), joint.sum(axis=0)
        h_p, h_q = -xlogy(p, p).sum(), -xlogy(q, q).sum()
        information = h_p + h_q + xlogy(joint, joint).sum()
        terms.append(information / np.sqrt(h_p * h_q) if h_p * h_q > 0 else 0.0)
    return float(np.mean(terms))


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


def ridge_classifier(
    x: Tensor, labels: Tensor, clusters: int, penalty: float, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier by ridge regression to one-hot labels; its score is x·w_c + b_c.

    Args:
        x: Float[N D]; taken in blocks of rows.
        labels: Int64[N].
        clusters: K.
        penalty: λ, added to the diagonal of the centred Gram matrix; above 0.
        chosen: Int64[n], the rows to which it is fitted; None takes all.

    Returns:
        Float[D K] weights and Float[K] biases, in the dtype of `x`. For λ → ∞ scores are the clusters' shares.
    """
    require_matrix(x, "x")
    chosen = torch.arange(len(x)) if chosen is None else chosen
    blocks = torch.split(chosen, max(1, _RIDGE_VALUES // x.shape[1]))
    mean = torch.stack([x[rows.to(x.device)].double().sum(0) for rows in blocks]).sum(0) / len(chosen)
    gram = torch.zeros((x.shape[1], x.shape[1]), dtype=torch.float64, device=x.device)
    # Xᵀ Y is the sum of the rows of each cluster: no N × K matrix.
    sums = torch.zeros((clusters, x.shape[1]), dtype=torch.float64, device=x.device)
    for rows in blocks:
        centered = x[rows.to(x.device)].double() - mean
        sums.index_add_(0, labels[rows.to(labels.device)].to(x.device), centered)
        gram += centered.T @ centered
    shares = torch.bincount(labels[chosen.to(labels.device)], minlength=clusters).double().to(x.device) / len(chosen)
    gram.diagonal().add_(penalty)
    weight = torch.cholesky_solve(sums.T, torch.linalg.cholesky(gram))
    return weight.to(x.dtype), (shares - mean @ weight).to(x.dtype)


def broken_guard(voted: Tensor, trained: Tensor, clusters: int) -> str:
    """Return why a classifier's labels, Int64[N], may not replace the vote's; empty if they may."""
    occupied, entropies = [], []
    for labels in (voted, trained):
        shares = (torch.bincount(labels, minlength=clusters).double() / len(labels)).cpu().numpy()
        occupied.append(int((shares > 0).sum()))
        entropies.append(float(-xlogy(shares, shares).sum()))
    if occupied[1] < occupied[0]:
        return f"clusters with rows fell from {occupied[0]} to {occupied[1]}"
    if entropies[1] < (1.0 - MAX_ENTROPY_LOSS) * entropies[0]:
        return f"the entropy of sizes fell from {entropies[0]:.3f} to {entropies[1]:.3f} nats"
    same = float((voted == trained).double().mean())
    return f"{same:.1%} of the rows keep the vote's label" if same < MIN_VOTE_AGREEMENT else ""


def match_confidence(scores: Tensor, target: float) -> Tensor:
    """Return the temperature at which the mean largest probability of scores Float[N K] is `target`, by bisection.

    Targets are held between 1.5 / K and 0.999; scores of −∞ stay without probability.
    """
    target = min(max(target, 1.5 / scores.shape[1]), 0.999)
    scale = float(scores[scores.isfinite()].std()) or 1.0
    low, high = -12.0, 12.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        sharpness = float((scores / (scale * math.exp(middle))).softmax(1).amax(1).mean())
        low, high = (middle, high) if sharpness > target else (low, middle)
    return scores.new_tensor(scale * math.exp(0.5 * (low + high)))
