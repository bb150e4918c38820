"""Candidates for a partition: k-means, its refinement, two consensuses, what trainings add; and the choice by evidence.

The floor is scikit-learn's k-means, which is what a user has without this file: where nothing better is found, nothing
is lost. The second candidate refines it without another structure. The partitions of k-means from starts in three views
of the rows (their leading components, the same at length 1, and the same averaged over nearest neighbours) and in the
spectral embedding of the neighbour graph are members; the third and the fourth candidate are votes of refined members
and of the floor, which names the clusters, so that no single local optimum decides. A caller may train heads that start
at the best of these, and a space in which k-means goes on. All but the floor end in a linear classifier, fitted to the
surest rows of each cluster, or to all where heads say it. benchmarks/defaults.py has the sets on which the constants
were found.

Parts: k-means++ (Arthur and Vassilvitskii 2007), spectral clustering (Ng, Jordan and Weiss 2001), consensus by
alternating alignment (Strehl and Ghosh 2002), label propagation (Zhou et al. 2004), modularity (Newman, Girvan 2004).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from rayclust.clustering import kmeans
from rayclust.clustering.consensus import agreements, ridge_classifier, surest_rows, vote
from rayclust.clustering.neighborhood import (
    graph_eigenpairs,
    mean_of_neighbors,
    modularity,
    modularity_terms,
    smooth,
)
from rayclust.clustering.spectral import unit_means
from rayclust.distributed import data_group
from rayclust.settings import KMeansOptions

HEADS, LEARNT = "trained heads", "k-means in a learnt space"
"""Names of the candidates that trainings make."""
COMPONENTS, COMPONENTS_PER_CLUSTER = 128, 2
"""Leading principal components that are kept, at least; all there are if fewer."""
OPERATIONS = 6e12
"""Multiplications that the starts of one view may take."""
OPERATION_LIMIT = 2e13
"""Multiplications of one k-means partition above which a single one is made, without candidates."""
FLOOR_STARTS, FLOOR_OPERATIONS = 10, 4e10
"""Starts of scikit-learn's k-means, and multiplications above which it would take more than some 7 s of a core: there
the least inertia of the starts among the leading components is the floor."""
MAX_ITERATIONS, USUAL_ITERATIONS = 100, 25
"""Passes of k-means: at most, and those that a start is reckoned to take."""
VOTING_SHARE = 0.5
"""Share of the members, those of least inertia in their view, that vote."""
SUREST_SHARE = 0.7
"""ρ, share of each cluster's rows to which the classifier is fitted."""
RIDGE = 1e-3
"""λ of the classifier, per row that it is fitted to."""
PROPAGATION, PROPAGATION_STEPS = 0.8, 10
"""Weight of the neighbours, and steps, of label propagation."""
MIN_NEIGHBORS, MIN_SPECTRAL_NEIGHBORS = 3, 5
"""Neighbours that are averaged at least; of small clusters √(n / K), so that a row's do not leave its cluster. The
spectral embedding takes more at least, so that the graph holds together."""
SPECTRAL_LIMIT = 6e9
"""n·K² above which there is no spectral embedding."""
SAME_SHARE, OTHER_GAIN = 0.95, 0.015
"""Share of the rows on which a candidate must agree with the one before it to count as the same clusters, a little
moved; modularity that another partition must have more: which of two is nearer to the truth is a matter of chance where
the graph hardly tells them apart."""
MAX_EVENNESS_GAIN = 0.1
"""Entropy of the sizes, relative to ln K, by which a candidate may be more even than the one before it."""
MIN_OCCUPIED = 0.75
"""Share of the clusters that must have rows: where K is too large for the data, a vote leaves some empty."""


@dataclass(frozen=True)
class Bounds:
    """What the neighbour graph may say against a candidate before the one before it is kept."""

    modularity_loss: float = 0.0
    """Modularity that a candidate may have less than the one before it."""
    agreement_loss: float = 0.0
    """Share of neighbour pairs that it may keep less."""
    evenness_gain: float = MAX_EVENNESS_GAIN


FEW_ROWS, FEW = 400, Bounds(modularity_loss=-0.015, agreement_loss=-0.01)
"""Rows below which a partition must speak for itself: modularity of some hundred rows scatters by as much."""
TRAINED = {
    HEADS: Bounds(modularity_loss=0.005, agreement_loss=0.0),
    LEARNT: Bounds(modularity_loss=0.005, agreement_loss=-0.0075),
}
"""For what a training has made of a partition, by its name. Heads must keep neighbours together as well as what they
start from; a learnt space, which may move most rows, 0.75 points better. Modularity may fall a little, as it does
where clusters are right to become uneven."""


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


def is_supported(new: Mapping[str, float], old: Mapping[str, float], clusters: int, bounds: Bounds) -> bool:
    """Return whether a partition may replace another: whether the neighbour graph does not speak against it.

    It must keep neighbours together beyond chance (modularity) as well, lose none of the pairs that were kept, within
    bounds, not make sizes much more even (which modularity rewards), and leave few clusters empty.

    Args:
        new: evidence for the one that comes.
        old: evidence for the one that would be kept.
        clusters: K.
        bounds: what it may lose.
    """
    return (
        new["modularity"] > old["modularity"] - bounds.modularity_loss
        and new["neighbor_agreement"] > old["neighbor_agreement"] - bounds.agreement_loss
        and new["size_entropy"] < old["size_entropy"] + bounds.evenness_gain
        and new["occupied"] >= min(old["occupied"], int(MIN_OCCUPIED * clusters))
    )


def choose(
    candidates: Sequence[Candidate], bounds: Mapping[str, Bounds] | None = None, other_gain: float = OTHER_GAIN
) -> Candidate:
    """Return the last candidate that may replace the one kept without it.

    A refinement or a vote that says much the same must keep neighbours together as well; one that cuts the rows
    otherwise, or of few rows, must do it better.

    Args:
        candidates: the floor first.
        bounds: on the evidence, by name; candidates that have none take those above.
        other_gain: modularity that one must have more which cuts the rows otherwise.
    """
    chosen, given = candidates[0], TRAINED | dict(bounds or {})
    usual = FEW if len(chosen.labels) < FEW_ROWS else Bounds()
    for candidate in candidates[1:]:
        limits = given.get(candidate.name, usual)
        if candidate.name not in TRAINED and agreements([chosen.labels, candidate.labels])[0, 1] < SAME_SHARE:
            limits = replace(limits, modularity_loss=min(limits.modularity_loss, -other_gain))
        if is_supported(candidate.evidence, chosen.evidence, candidate.weight.shape[-1], limits):
            chosen = candidate
    return chosen


def make_candidates(
    x: Tensor,
    neighbors: Tensor,
    clusters: int,
    seed: int,
    *,
    restarts: int = 16,
    rounds: int = 2,
    rivals: bool = True,
    heads: Callable[[Tensor, Candidate], Tensor] | None = None,
    learn: Callable[[Tensor], Tensor] | None = None,
) -> list[Candidate]:
    """Make the floor, its refinement, the votes and what trainings add; the floor alone where more takes too long.

    Workers share the passes of k-means; all else is made from the same numbers on each.

    Args:
        x: Float[n D], the same on all workers.
        neighbors: Int64[n M], nearest first, −1 where a row has fewer.
        clusters: K.
        seed: of all starts.
        restarts: starts of k-means in each view; fewer where they would take long.
        rounds: how often rows are averaged with their neighbours in the smoothed view.
        rivals: whether there is more than the floor.
        heads: called with the leading principal axes of the rows, Float[D d], and the best of these; trains heads that
            start there on the rows' components and returns their clusters, Int64[n]. None: none are.
        learn: called with these axes; trains on the components and returns unit rows Float[n L] of a space in which
            clusters are apart. None: there is none.
    """
    K, space = clusters, _Space(x, neighbors, clusters)
    p, n = space.p, len(x)
    operations = float(USUAL_ITERATIONS) * n * K * p.shape[1]
    restarts = max(1, min(restarts, int(OPERATIONS / operations)))
    seeds = np.random.SeedSequence(seed).generate_state(4).tolist()
    options = KMeansOptions(clusters=K, metric="euclidean", restarts=restarts, max_iterations=MAX_ITERATIONS)
    # 1. The floor.
    affordable = FLOOR_STARTS * USUAL_ITERATIONS * x.numel() * K <= FLOOR_OPERATIONS
    is_alone = not rivals or operations > OPERATION_LIMIT or n <= K
    if is_alone and affordable:
        return [space.plain_kmeans(seed)]
    raw, raw_inertia = kmeans.fit_all(p, options, seeds[0])
    if affordable:
        floor = space.plain_kmeans(seed)
    else:  # the classifier that compares |p − c|², less |p|², with the clusters' means c
        best = raw[int(raw_inertia.argmin())]
        means = _means(p, best[None], K)[0]
        empty = torch.bincount(best, minlength=K) == 0
        floor = space.candidate("k-means", means.T, (-0.5 * means.square().sum(1)).masked_fill(empty, -torch.inf))
    if is_alone:
        return [floor]
    # 2. The same structure, refined twice.
    columns = max(MIN_NEIGHBORS, round(math.sqrt(n / K)))
    graph = mean_of_neighbors(neighbors[:, :columns])
    refined = space.refined("refined k-means", space.refined("", floor.labels, graph).labels, graph)
    # 3. k-means of the other views. All partitions but those of the smoothed view, the floor first, go on in it.
    unit, smoothed = functional.normalize(p, dim=1), smooth(p, neighbors[:, :columns], rounds)
    cosine, _ = kmeans.fit_all(unit, options, seeds[1])
    fresh, fresh_inertia = kmeans.fit_all(smoothed, options, seeds[2])
    others = _means(smoothed, torch.cat([floor.labels[None], raw, cosine]), K)
    moved, moved_inertia = kmeans.fit_all(smoothed, options, seeds[2], others)
    # 4. The vote of the floor and of the members of least inertia in the smoothed view, each refined.
    members, inertia = torch.cat([moved[1:], fresh]), torch.cat([moved_inertia[1:], fresh_inertia])
    first, *voters = (space.refined("", one, graph).labels for one in (moved[0], *members[_better_half(inertia)]))
    candidates = [floor, refined, space.voted("consensus", [first, *voters])]
    # 5. The vote of every second of them with as many spectral partitions, which join what the graph joins.
    if n * K * K <= SPECTRAL_LIMIT:
        dense = mean_of_neighbors(neighbors[:, : max(MIN_SPECTRAL_NEIGHBORS, columns)])
        vectors = data_group().broadcast(graph_eigenpairs(dense, K, seeds[3]).vectors)
        embedded = functional.normalize(vectors, dim=1).to(p)
        cut, cut_inertia = kmeans.fit_all(embedded, options, seeds[3])
        spectral = [space.refined("", one, graph).labels for one in cut[_better_half(cut_inertia)]]
        candidates.append(space.voted("consensus with spectral clusters", [first, *voters[::2], *spectral]))
    # 6. The best of these as heads trained on pairs of neighbours have it. The classifier is fitted to all rows: labels
    # that are near linear already lose some by the surest alone.
    if heads is not None:
        labels = heads(space.basis, choose(candidates))
        candidates.append(space.candidate(HEADS, *ridge_classifier(p, labels, K, RIDGE * n)))
    # 7. The best of these after k-means that goes on from it in a learnt space; the surest rows are those nearest to
    # their mean there.
    if learn is not None:
        one_start = KMeansOptions(clusters=K, metric="euclidean", max_iterations=MAX_ITERATIONS)
        labels, learnt = choose(candidates).labels, learn(space.basis)
        own = kmeans.fit_all(learnt, one_start, 0, unit_means(learnt, labels, K))[0][0]
        distances = kmeans.squared_distances(learnt, unit_means(learnt, own, K)).clamp(min=0).sqrt()
        nearest = distances.topk(2, dim=1, largest=False).values
        candidates.append(space.classified(LEARNT, own, -nearest[:, 0], nearest[:, 1] - nearest[:, 0]))
    return candidates


class _Space:
    """Leading components of the rows, and classifiers on them.

    Args:
        x: Float[n D], the same on all workers.
        neighbors: Int64[n M], −1 where a row has fewer.
        clusters: K.
    """

    def __init__(self, x: Tensor, neighbors: Tensor, clusters: int) -> None:
        self._x, self._mean, self._neighbors, self._clusters = x, x.mean(0), neighbors, clusters
        self.basis = leading_components(x - self._mean, component_count(clusters))
        self.p = (x - self._mean) @ self.basis

    def plain_kmeans(self, seed: int) -> Candidate:
        """Return scikit-learn's k-means of the rows: what it finds with `random_state` at `seed`."""
        from sklearn.cluster import KMeans  # takes a second to load, and no run that is done needs it
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: some stay empty
            model = KMeans(self._clusters, n_init=FLOOR_STARTS, random_state=seed % 2**32).fit(self._x.cpu().numpy())
        # Broadcast rank 0's: rounding may differ between processors.
        found = data_group().broadcast(torch.from_numpy(model.cluster_centers_).to(self._x))
        weight = (found - self._mean).T.contiguous()
        return self.candidate("k-means", weight, -0.5 * weight.square().sum(0), self._x - self._mean)

    def refined(self, name: str, labels: Tensor, graph: sparse.csr_array) -> Candidate:
        """Spread labels over the graph, and classify by the surest rows."""
        shares = _propagate(labels, graph, self._clusters)
        top = shares.topk(2, dim=1).values
        return self.classified(name, shares.argmax(1), top[:, 0], top[:, 0] - top[:, 1])

    def voted(self, name: str, voters: list[Tensor]) -> Candidate:
        """Let partitions vote, from the first on, and classify by the surest rows."""
        result = vote(voters, self._clusters, voters[0])
        return self.classified(name, result.labels, result.confidence, result.margin)

    def classified(self, name: str, labels: Tensor, confidence: Tensor, margin: Tensor) -> Candidate:
        """Classify by the surest rows of each cluster."""
        kept = surest_rows(labels, confidence, margin, SUREST_SHARE).to(self.p.device)
        penalty = RIDGE * int(kept.sum())
        return self.candidate(name, *ridge_classifier(self.p[kept], labels[kept], self._clusters, penalty))

    def candidate(self, name: str, weight: Tensor, bias: Tensor, centered: Tensor | None = None) -> Candidate:
        """Classify and measure; the classifier is one of the components, or of the centred rows if they are given."""
        labels = ((self.p if centered is None else centered) @ weight + bias).argmax(1)
        found = evidence(self.p, labels, self._neighbors, self._clusters)
        folded = self.basis @ weight if centered is None else weight
        return Candidate(name, labels, folded, bias - self._mean @ folded, found)


def _better_half(inertia: Tensor) -> list[int]:
    """Return the numbers of the partitions of least inertia, best first."""
    order: list[int] = inertia.argsort(stable=True).tolist()
    return order[: max(1, int(VOTING_SHARE * len(order)))]


def component_count(clusters: int) -> int:
    """Return how many leading components of the rows are looked at for K clusters, where there are as many."""
    return max(COMPONENTS, COMPONENTS_PER_CLUSTER * clusters)


def leading_components(x: Tensor, width: int) -> Tensor:
    """Return the leading principal axes of centred rows: Float[D d], d = min(width, D, n − 1), equal on all workers.

    An axis along which no row differs, as with rows that are there twice, may be zero.
    """
    width = max(1, min(width, x.shape[1], len(x) - 1))
    wide = x.double()
    if len(x) >= x.shape[1]:
        axes = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -width:].flip(1)
    else:  # fewer rows than dimensions: of the rows' Gram matrix
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        squares, rounding = values[-width:], len(x) * torch.finfo(torch.float64).eps
        lengths = squares.where(squares > rounding * values[-1], torch.inf).sqrt()
        axes = (wide.T @ vectors[:, -width:] / lengths).flip(1)
    return data_group().broadcast(axes.float().contiguous())


def _means(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Return the clusters' means in R partitions Int64[R n]: Float[R K d]; the origin for an empty cluster."""
    means = x.new_zeros((len(labels), clusters, x.shape[1]))
    for mean, one in zip(means, labels, strict=True):
        mean.index_add_(0, one, x).div_(torch.bincount(one, minlength=clusters).clamp(min=1)[:, None])
    return means


def _propagate(labels: Tensor, graph: sparse.csr_array, clusters: int) -> Tensor:
    """Spread labels over the neighbour graph: F ← α W F + (1 − α) Y, W the mean over neighbours, Y the labels.

    Returns:
        Float32[n K], rows sum to at most 1.

    Source: Zhou et al., Learning with local and global consistency, 2004, section 2, with W row-stochastic.
    """
    own = np.zeros((len(labels), clusters), dtype=np.float32)
    own[np.arange(len(labels)), labels.cpu().numpy()] = 1.0
    spread = own
    for _ in range(PROPAGATION_STEPS):
        spread = PROPAGATION * (graph @ spread) + (1 - PROPAGATION) * own
    return torch.from_numpy(spread).to(labels.device)


def evidence(p: Tensor, labels: Tensor, neighbors: Tensor, clusters: int) -> dict[str, float]:
    """Measure a partition without labels.

    Args:
        p: Float[n d].
        labels: Int64[n].
        neighbors: Int64[n M], −1 where a row has fewer.
        clusters: K.

    Returns:
        What `Candidate.evidence` holds.
    """
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
