"""Candidates for a partition: k-means from many starts, its refinement, a consensus; and the choice by evidence.

The partitions of k-means from starts in three views of the rows (their leading components, the same at length 1, and
the same averaged over nearest neighbours) are the members of two candidates: the floor, refined without another
structure, and a vote, which may have another. Both end in a linear classifier that is fitted to the surest rows of each
cluster. benchmarks/defaults.py has the sets on which the constants were found.

Parts: k-means++ (Arthur and Vassilvitskii 2007), consensus by alternating alignment (Strehl and Ghosh 2002), label
propagation (Zhou et al. 2004), modularity (Newman and Girvan 2004).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from rayclust.clustering import kmeans
from rayclust.clustering.consensus import ridge_classifier, surest_rows, vote
from rayclust.clustering.neighborhood import modularity, modularity_terms, smooth
from rayclust.distributed import data_group

COMPONENTS, COMPONENTS_PER_CLUSTER = 128, 2
"""Leading principal components that are kept, at least; all there are if fewer."""
OPERATIONS = 6e12
"""Multiplications that the starts of one view may take."""
OPERATION_LIMIT = 2e13
"""Multiplications of one k-means partition above which a single one is made, without candidates."""
MAX_ITERATIONS = 100
VOTING_SHARE = 0.5
"""Share of the members, those of least inertia in the smoothed view, that vote."""
SUREST_SHARE = 0.7
"""ρ, share of each cluster's rows to which the classifier is fitted."""
RIDGE = 1e-3
"""λ of the classifier, per row that it is fitted to."""
PROPAGATION, PROPAGATION_STEPS = 0.8, 10
"""Weight of the neighbours, and steps, of label propagation."""
MAX_AGREEMENT_LOSS = 0.02
"""Share of neighbour pairs that a candidate may keep less than the one before it."""
MAX_EVENNESS_GAIN = 0.05
"""Entropy of the sizes, relative to ln K, by which a candidate may be more even than the one before it."""


@dataclass(frozen=True)
class Candidate:
    """A partition with a linear classifier that gives it, and the evidence for it."""

    name: str
    labels: Tensor
    """Int64[n], what the classifier says."""
    weight: Tensor
    """Float[D K]; row x has the scores x·weight + bias."""
    bias: Tensor
    """Float[K]."""
    evidence: dict[str, float]
    """`inertia` per row, `modularity` and `neighbor_agreement` on the raw graph, `size_entropy` / ln K, `occupied`."""


def choose(
    candidates: Sequence[Candidate],
    agreement_loss: float = MAX_AGREEMENT_LOSS,
    evenness_gain: float = MAX_EVENNESS_GAIN,
) -> Candidate:
    """Return the last candidate for which the evidence holds against the one that would be kept without it.

    It must keep more neighbours together beyond chance (modularity), lose next to none of the pairs that were kept, not
    make sizes more even (which modularity rewards), and lose no cluster.

    Args:
        candidates: the floor first.
        agreement_loss: share of neighbour pairs that it may keep less.
        evenness_gain: entropy of the sizes, relative to ln K, by which it may be more even.
    """
    chosen = candidates[0]
    for candidate in candidates[1:]:
        new, old = candidate.evidence, chosen.evidence
        if (
            new["modularity"] > old["modularity"]
            and new["neighbor_agreement"] > old["neighbor_agreement"] - agreement_loss
            and new["size_entropy"] < old["size_entropy"] + evenness_gain
            and new["occupied"] >= old["occupied"]
        ):
            chosen = candidate
    return chosen


def make_candidates(
    x: Tensor, neighbors: Tensor, clusters: int, seed: int, *, restarts: int = 16, rounds: int = 2, rivals: bool = True
) -> list[Candidate]:
    """Make the floor, its refinement and the consensus; the floor alone where more would take too long.

    Workers share the passes of k-means; all else is made from the same numbers on each.

    Args:
        x: Float[n D], the same on all workers.
        neighbors: Int64[n M], −1 where a row has fewer.
        clusters: K.
        seed: of all starts.
        restarts: starts of k-means in each view; fewer where they would take long.
        rounds: how often rows are averaged with their neighbours in the smoothed view.
        rivals: whether there is more than the floor.
    """
    K = clusters
    # 1. Leading components of the centred rows.
    mean = x.mean(0)
    basis = leading_components(x - mean, max(COMPONENTS, COMPONENTS_PER_CLUSTER * K))
    p = (x - mean) @ basis
    operations = 25.0 * len(p) * K * p.shape[1]
    restarts = max(1, min(restarts, int(OPERATIONS / operations)))
    seeds = np.random.SeedSequence(seed).generate_state(3).tolist()

    def measured(name: str, weight: Tensor, bias: Tensor) -> Candidate:
        """Return the candidate of a classifier of p."""
        labels = (p @ weight + bias).argmax(1)
        evidence = _evidence(p, labels, neighbors, K)
        return Candidate(name, labels, basis @ weight, bias - mean @ (basis @ weight), evidence)

    def floor(labels: Tensor) -> Candidate:
        """Return a k-means partition; its classifier compares |p − c|², less |p|²."""
        centers = _means(p, labels[None], K)[0]
        empty = torch.bincount(labels, minlength=K) == 0
        bias = (-0.5 * centers.square().sum(1)).masked_fill(empty, -torch.inf)
        return measured("k-means", centers.T, bias)

    def classified(name: str, labels: Tensor, confidence: Tensor, margin: Tensor) -> Candidate:
        """Return the classifier that is fitted to the surest rows of each cluster."""
        kept = surest_rows(labels, confidence, margin, SUREST_SHARE).to(p.device)
        return measured(name, *ridge_classifier(p[kept], labels[kept], K, RIDGE * int(kept.sum())))

    options = kmeans.KMeansOptions(clusters=K, metric="euclidean", restarts=restarts, max_iterations=MAX_ITERATIONS)
    raw, raw_inertia = kmeans.fit_all(p, options, seeds[0])
    if not rivals or operations > OPERATION_LIMIT or len(p) <= K:
        return [floor(raw[int(raw_inertia.argmin())])]
    # 2. k-means of the other views. Partitions of raw rows go on in the smoothed view, those of the smoothed view in
    # the raw one: each structure is then known by its inertia in both.
    unit, smoothed = functional.normalize(p, dim=1), smooth(p, neighbors, rounds)
    cosine, _ = kmeans.fit_all(unit, options, seeds[1])
    fresh, fresh_inertia = kmeans.fit_all(smoothed, options, seeds[2])
    moved, moved_inertia = kmeans.fit_all(smoothed, options, seeds[2], _means(smoothed, torch.cat([raw, cosine]), K))
    back, back_inertia = kmeans.fit_all(p, options, seeds[0], _means(p, torch.cat([cosine, fresh]), K))
    structures, inertia = torch.cat([raw, back]), torch.cat([raw_inertia, back_inertia])
    members, smooth_inertia = torch.cat([moved, fresh]), torch.cat([moved_inertia, fresh_inertia])
    # 3. The floor: the least inertia of the raw rows.
    best = int(inertia.argmin())
    candidates = [floor(structures[best])]
    # 4. The same structure in the smoothed view, propagated over the graph and classified, twice.
    labels = members[best]
    for _ in range(2):
        shares = _propagate(labels, neighbors, K)
        top = shares.topk(2, dim=1).values
        refined = classified("refined k-means", shares.argmax(1), top[:, 0], top[:, 0] - top[:, 1])
        labels = refined.labels
    candidates.append(refined)
    # 5. The vote of the members of least inertia in the smoothed view.
    voters = smooth_inertia.argsort(stable=True)[: max(1, int(VOTING_SHARE * len(members)))]
    result = vote(list(members[voters]), K, members[voters[0]])
    candidates.append(classified("consensus", result.labels, result.confidence, result.margin))
    return candidates


def leading_components(x: Tensor, width: int) -> Tensor:
    """Return the leading principal axes of centred rows: Float[D d], d = min(width, D, n − 1), equal on all workers."""
    width = max(1, min(width, x.shape[1], len(x) - 1))
    wide = x.double()
    if len(x) >= x.shape[1]:
        axes = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -width:].flip(1)
    else:  # fewer rows than dimensions: of the rows' Gram matrix
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        lengths = values[-width:].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        axes = (wide.T @ vectors[:, -width:] / lengths).flip(1)
    return data_group().broadcast(axes.float().contiguous())


def _means(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Return the clusters' means in R partitions Int64[R n]: Float[R K d]; the origin for an empty cluster."""
    means = x.new_zeros((len(labels), clusters, x.shape[1]))
    for mean, one in zip(means, labels, strict=True):
        mean.index_add_(0, one, x).div_(torch.bincount(one, minlength=clusters).clamp(min=1)[:, None])
    return means


def _propagate(labels: Tensor, neighbors: Tensor, clusters: int) -> Tensor:
    """Spread labels over the neighbour graph: F ← α W F + (1 − α) Y, W the mean over neighbours, Y the labels.

    Returns:
        Float32[n K], rows sum to at most 1.

    Source: Zhou et al., Learning with local and global consistency, 2004, section 2, with W row-stochastic.
    """
    count, ids = len(labels), neighbors.cpu().numpy()
    rows, columns = (ids >= 0).nonzero()
    each = 1.0 / np.maximum((ids >= 0).sum(1), 1)
    graph = sparse.csr_array((each[rows].astype(np.float32), (rows, ids[rows, columns])), shape=(count, count))
    own = np.zeros((count, clusters), dtype=np.float32)
    own[np.arange(count), labels.cpu().numpy()] = 1.0
    spread = own
    for _ in range(PROPAGATION_STEPS):
        spread = PROPAGATION * (graph @ spread) + (1 - PROPAGATION) * own
    return torch.from_numpy(spread).to(labels.device)


def _evidence(p: Tensor, labels: Tensor, neighbors: Tensor, clusters: int) -> dict[str, float]:
    near = labels[neighbors.clamp(min=0)].masked_fill(neighbors < 0, -1)
    terms = modularity_terms(labels[None], near[None], clusters)
    shares = torch.bincount(labels, minlength=clusters).double() / len(labels)
    distances = (p - _means(p, labels[None], clusters)[0][labels]).square().sum(1)
    return {
        "inertia": float(distances.mean(dtype=torch.float64)),
        "modularity": float(modularity(terms)[0]),
        "neighbor_agreement": float(terms[0, -2] / terms[0, -1].clamp(min=1)),
        "size_entropy": float(-torch.xlogy(shares, shares).sum() / math.log(clusters)),
        "occupied": float((shares > 0).sum()),
    }
