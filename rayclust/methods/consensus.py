"""Consensus: one partition out of those of other runs, or of k-means from many starts, and a classifier that gives it.

The steps and constants are ours; docs/methods.md says what to expect. The vote itself is classical (Strehl and Ghosh,
JMLR 3, 2002). No label is read anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rayclust.clustering import kmeans
from rayclust.clustering.candidates import (
    FEW_ROWS,
    HEADS,
    MAX_ITERATIONS,
    OTHER_GAIN,
    SAME_SHARE,
    TRAINED,
    Bounds,
    is_supported,
    leading_components,
)
from rayclust.clustering.consensus import (
    ConsensusResult,
    MemberEvidence,
    SoftLabels,
    Vote,
    agreements,
    anmi,
    broken_guard,
    consensus,
    evidence,
    hard_labels,
    match_confidence,
    neighbor_shares,
    ridge_classifier,
    shared_neighbors,
    surest_rows,
)
from rayclust.clustering.settings import KMeansOptions
from rayclust.methods.base import BaseTrainer, Pairing, Rows
from rayclust.methods.linear import LinearMethod
from rayclust.methods.settings import ConsensusConfig

logger = logging.getLogger(__name__)

SUREST_SHARE = 0.7
"""ρ, share of each cluster's rows to which the classifier is fitted."""
FLOOR_SHARE = 0.9
"""The same where it is fitted to the best member."""
MAX_LOSS = 0.01
"""Modularity that the classifier may lose before a warning says that it is too simple for its members."""
RIDGE = 1e-3
"""λ, relative to the squared lengths of the centred rows that it is fitted to."""
COMPONENTS = 64
"""Leading principal components on which k-means makes members."""
SAMPLE_ROWS = 65_536
"""Rows whose scores set the temperature of the probabilities."""
BLOCK = 65_536


class Consensus(LinearMethod):
    """The consensus of members on rows of width `dimension`.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the starts of k-means.
    """

    config_type = ConsensusConfig
    config: ConsensusConfig
    report: list[dict[str, Any]]
    """Of the fit, a row for each member, one for the vote and one for the classifier: `candidate`, its name; `chosen`,
    0 or 1; `note`; and the evidence."""

    def __init__(self, config: ConsensusConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.pairing = Pairing(columns=config.neighbors)

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Let the members vote and fit the classifier; every worker does the same.

        Reports a row of metrics for each member, for the vote, and for the classifier.
        """
        K, x = self.config.clusters, rows.tensor()
        neighbors = rows.neighbors()[:, : self.config.neighbors].cpu().long()
        # 1. Members, the gate and the vote.
        members, names = rows.members(), list(self.config.members)
        if members is None:
            members = kmeans_members(x.to(trainer.device), K, self.config.restarts, self.seed)
        if len(members) != len(names):  # heads are several to a name
            names = [f"member {place}" for place in range(len(members))]
        soft = [SoftLabels.of(member) if member.dim() > 1 else member.cpu().long() for member in members]
        found, members = consensus(soft, K, neighbors, self.seed), [hard_labels(member) for member in soft]
        # 2. The vote, unless the graph speaks for the best member.
        kept, is_vote = found.vote.labels, True
        evidence_of = {"vote": evidence(kept, neighbors, K, found.vote.agreement / len(kept) / len(found.voters))}
        if found.best is not None:
            best, name = members[found.best], torch.from_numpy(found.vote.names[found.voters.index(found.best)])
            agreement = float(agreements([best, kept])[0, 1])
            if not _may_replace(evidence_of["vote"], found.members[found.best], agreement, K):
                kept, is_vote = torch.where(best >= 0, name[best], kept), False
        # 3. One round of self-training on the surest rows of each cluster; guards, else the clusters' mean rows.
        centers, lengths = _means(x, kept, K)
        chosen = _fitted_rows(kept, found.vote if is_vote else None, neighbors)
        penalty = max(RIDGE * lengths * len(chosen), torch.finfo(torch.float32).tiny)
        weight, bias = ridge_classifier(x, kept, K, penalty, chosen)
        if refused := broken_guard(kept, _predict(x, weight, bias), K):
            logger.warning("consensus: the classifier is not kept: %s; rows go to the nearest mean row", refused)
            empty = (torch.bincount(kept, minlength=K) == 0).to(x.device)
            weight, bias = centers.T, (-0.5 * centers.square().sum(1)).masked_fill(empty, -torch.inf)
        trained = _predict(x, weight, bias)
        same = float((trained == kept).double().mean())
        title = ("vote" if is_vote else "best member") + (", nearest means" if refused else ", self-training")
        evidence_of[title] = evidence(trained, neighbors, K, same)
        loss = evidence(kept, neighbors, K).modularity - evidence_of[title].modularity
        if loss > MAX_LOSS and not refused:
            refused = f"says less than its members do: its modularity is {loss:.3f} below that of what it is fitted to"
            logger.warning("consensus: a linear classifier %s; a member's own clusters may be better", refused)
        # 4. The report, and probabilities as sure as the members are.
        self._report(found, names, evidence_of, refused)
        voters = [members[h] for h in found.voters]
        self.report[-2]["kept_neighbors"] = float(shared_neighbors(voters, neighbors).sum(1).double().mean())
        for row, labels in zip(self.report[-2:], (found.vote.labels, trained), strict=True):
            row["anmi"] = anmi(labels, voters)
        for place, row in enumerate(self.report):
            step = {"epoch": place, "step": place + 1, "loss": 1.0 - row["neighbor_agreement"]}
            trainer.report(step | {"seconds": trainer.seconds()} | row)
        sample = x[:: max(1, len(x) // SAMPLE_ROWS)]
        temperature = match_confidence(sample @ weight + bias, float(found.vote.confidence.mean()))
        self.keep(trainer.device, weight, bias, centers, temperature)

    def _report(
        self, found: ConsensusResult, names: Sequence[str], evidence_of: dict[str, MemberEvidence], refused: str
    ) -> None:
        """Write `report`: members in their order, the vote, and what is kept."""
        renamed = dict(zip(found.voters, found.vote.names, strict=True))
        self.report = []
        for h, (name, one) in enumerate(zip(names, found.members, strict=True)):
            best = {"largest modularity": found.best, "medoid": found.medoid}
            note = one.dropped or ", ".join(role for role, place in best.items() if place == h)
            matched = renamed[h].tolist() if h in renamed else None
            self.report.append({"candidate": name, "note": note, "names": matched, "anmi": None} | asdict(one))
        for title, one in evidence_of.items():
            note = f"of {len(found.voters)} members" if title == "vote" else refused
            self.report.append({"candidate": title, "note": note, "names": None, "anmi": None} | asdict(one))
        for row in self.report:
            row["weight"] = 0.0 if row.pop("dropped") else 1.0
            row["chosen"] = float(row is self.report[-1])
        logger.info(
            "consensus: %d of %d members vote, in %d rounds; mean confidence %.3f; kept is %s",
            *(len(found.voters), len(found.members), found.vote.rounds, float(found.vote.confidence.mean())),
            self.report[-1]["candidate"],
        )


def _may_replace(vote: MemberEvidence, best: MemberEvidence, agreement: float, clusters: int) -> bool:
    """Return whether a vote may replace the best member; the bounds are those of the default method.

    A vote that moves few rows must keep more neighbours together, at little less modularity; one that cuts the rows
    otherwise must have clearly more: which of two cuts is right is a matter of chance where the graph hardly tells.

    Args:
        vote: its evidence.
        best: that of the voter with the largest modularity.
        agreement: share of rows on which the two say the same.
        clusters: K.
    """
    bounds = TRAINED[HEADS] if agreement >= SAME_SHARE else Bounds(modularity_loss=-OTHER_GAIN)
    return is_supported(asdict(vote), asdict(best), clusters, bounds)


def _fitted_rows(labels: Tensor, vote: Vote | None, neighbors: Tensor) -> Tensor:
    """Return the rows to which the classifier is fitted, Int64[n]: the surest of each cluster.

    Members agree on most rows: neighbours tell which of these lie inside a cluster, but not among few rows.

    Args:
        labels: Int64[N].
        vote: whose labels they are; None for those of one member.
        neighbors: Int64[N M], −1 where a row has fewer.
    """
    is_few = len(labels) < FEW_ROWS
    if is_few and vote is None:
        return torch.arange(len(labels))
    inside = torch.zeros(len(labels)) if is_few else neighbor_shares(labels, neighbors)
    if vote is None:
        return surest_rows(labels, inside, inside, FLOOR_SHARE).nonzero()[:, 0]
    return surest_rows(labels, vote.confidence + inside, vote.margin, SUREST_SHARE).nonzero()[:, 0]


def kmeans_members(x: Tensor, clusters: int, restarts: int, seed: int) -> list[Tensor]:
    """Return the partitions of k-means on leading components, each from other random rows: Int64[N] each."""
    mean, sample = x.mean(0), x[:: max(1, len(x) // SAMPLE_ROWS)]
    p = (x - mean) @ leading_components(sample - sample.mean(0), COMPONENTS)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(p), generator=generator)[:clusters] for _ in range(restarts)]
    options = KMeansOptions(clusters=clusters, metric="euclidean", max_iterations=MAX_ITERATIONS)
    labels, _ = kmeans.fit_all(p, options, seed, torch.stack([p[rows.to(p.device)] for rows in drawn]))
    return list(labels.cpu())


def _means(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, float]:
    """Return the clusters' mean rows, Float[K D], 0 for an empty one, and the mean squared length of centred rows."""
    sums, squares = x.new_zeros((clusters, x.shape[1]), dtype=torch.float64), 0.0
    for part, own in zip(torch.split(x, BLOCK), torch.split(labels, BLOCK), strict=True):
        sums.index_add_(0, own.to(x.device), part.double())
        squares += float(part.double().square().sum())
    sizes = torch.bincount(labels, minlength=clusters).to(x.device)
    length = squares / len(x) - float((sums.sum(0) / len(x)).square().sum())
    return (sums / sizes.clamp(min=1)[:, None]).to(x.dtype), max(length, 0.0)


def _predict(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the classifier's labels Int64[N]."""
    return torch.cat([(part @ weight + bias).argmax(1).cpu() for part in torch.split(x, BLOCK)])
