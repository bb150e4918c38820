"""Consensus: one partition out of those of other runs, or of k-means from many starts, and a classifier that gives it.

The classifier is linear, or a head of TEMI where members are not linear.

The steps and constants are ours; docs/methods.md says what to expect. The vote itself is classical (Strehl and Ghosh,
JMLR 3, 2002). No label is read anywhere.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rayclust import distributed
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
from rayclust.methods.base import BaseTrainer, Batch, Method, Pairing, Rows
from rayclust.methods.graph import DerivedRows
from rayclust.methods.layers import ema_update
from rayclust.methods.linear import LinearMethod
from rayclust.methods.settings import ConsensusConfig, Plan, TrainedConfig
from rayclust.methods.temi import Heads
from rayclust.methods.temi_settings import HeadShape
from rayclust.methods.temi_start import solve_last_hidden
from rayclust.settings import KMeansOptions

logger = logging.getLogger(__name__)

SUREST_SHARE = 0.7
"""ρ, share of each cluster's rows to which the classifier is fitted."""
FLOOR_SHARE = 0.9
"""The same where it is fitted to the best member."""
MAX_LOSS = 0.005
"""Modularity that a linear classifier may lose before a head takes its place, or a warning says that it is too simple
for its members."""
HEAD_EPOCHS, HEAD_STEPS, HEAD_BATCH, HEAD_RATE = 20, 200, 256, 1e-3
"""Training of the head: epochs, steps at least, rows of a batch, and Adam's rate for each 256 of them."""
HEAD_TEMPERATURE, HEAD_MOMENTUM = 0.1, 0.999
"""Temperature of its softmax; weight of the moving average's past, less in the first steps."""
RIDGE = 1e-3
"""λ, relative to the squared lengths of the centred rows that it is fitted to."""
COMPONENTS = 64
"""Leading principal components on which k-means makes members."""
SAMPLE_ROWS = 65_536
"""Rows whose scores set the temperature of the probabilities."""
BLOCK = 65_536


class VoteHeadConfig(TrainedConfig):
    """The training of a head that learns a vote."""

    name: str = "vote head"
    """For messages."""
    columns: int = 15
    """Neighbours of a row, of which one stands beside it each time."""


class VoteHead(Method):
    """A head of TEMI that learns the shares of the votes of each row and of its neighbours, by cross-entropy.

    Classes weigh alike: a batch's loss is the mean over present classes of the mean over their rows. The clusters are
    those of the head's moving average.

    Args:
        config: the settings.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights.

    Source: arXiv 2005.12320, section 2.3, for learning one's own sure labels, with classes weighed alike; the moving
    average is the published program's.
    """

    config_type = VoteHeadConfig
    config: VoteHeadConfig
    votes: SoftLabels
    """[N S], the labels that voters give to each row and their shares; −1 for none."""

    def __init__(self, config: VoteHeadConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.plan, self.pairing = Plan.of(config, count), Pairing(columns=config.columns)
        shape = HeadShape(heads=1, dimension=dimension, clusters=config.clusters)
        self.student = Heads(shape, seed, "fp32")
        self.average = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of one worker's part of a batch."""
        logits = self.student(batch.x.flatten(0, 1), training=True)[0] / HEAD_TEMPERATURE
        # 1. Shares of the votes of each row, Float[B K]; they sum to 1, without votes to 0.
        rows, votes = batch.rows, self.votes
        clusters, shares = (part[rows.cpu()].to(rows.device) for part in (votes.clusters, votes.shares))
        targets = torch.zeros((len(rows), self.config.clusters), device=rows.device)
        targets.scatter_add_(1, clusters.clamp(min=0), shares * (clusters >= 0))
        targets = targets / targets.sum(1, keepdim=True).clamp(min=torch.finfo(targets.dtype).tiny)
        each = -(targets * logits.log_softmax(1).view(len(batch.x), *targets.shape)).sum(2).mean(0)
        # 2. A row weighs one over the rows of its class, that of the largest share, in the batch of all workers.
        top, classes = targets.max(1)
        counts = distributed.all_reduce(torch.zeros_like(targets[0]).index_add_(0, classes, (top > 0).to(targets)))
        weights, present = (top > 0) / counts[classes].clamp(min=1), (counts > 0).sum().clamp(min=1)
        # 3. The worker's share of a sum over the whole batch, since losses are averaged by rows over workers.
        share = distributed.data_group().size / batch.weight
        return {"loss": share * (weights * each).sum() / present}

    def on_step_end(self, step: int) -> None:
        """Move the average towards the head, the faster the fewer steps were made."""
        ema_update(self.average, self.student, min(HEAD_MOMENTUM, (1 + step) / (10 + step)))


@dataclass(frozen=True)
class Target:
    """The partition that a classifier is fitted to."""

    labels: Tensor
    """Int64[N]."""
    is_vote: bool
    """Whether it is the vote's; else it is the best member's."""
    neighbors: Tensor
    """Int64[N M], −1 where a row has fewer."""
    modularity: float

    def loss(self, labels: Tensor, clusters: int) -> float:
        """Return the modularity that a classifier's labels, Int64[N], lose."""
        return self.modularity - evidence(labels, self.neighbors, clusters).modularity


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
    row_table: dict[str, Tensor]
    """What members say of each fitted row: the vote's cluster, its share of the voters and how far it is before the
    next; voters for it and against it; and of how many of its neighbours most voters say that they are in its
    cluster."""
    head: Heads | None
    """Where its scores are the result; the linear classifier is not used then."""

    def __init__(self, config: ConsensusConfig, dimension: int, count: int, seed: int) -> None:
        super().__init__(config, dimension, count, seed)
        self.head = None

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
        labels, is_vote = found.vote.labels, True
        evidence_of = {"vote": evidence(labels, neighbors, K, found.vote.agreement / len(labels) / len(found.voters))}
        if found.best is not None:
            best, name = members[found.best], torch.from_numpy(found.vote.names[found.voters.index(found.best)])
            # A vote that moves few rows must keep more neighbours together, at little less modularity, as by the bounds
            # of the default method; one that cuts the rows otherwise must have clearly more: which of two cuts is right
            # is a matter of chance where the graph hardly tells.
            moves_few = float(agreements([best, labels])[0, 1]) >= SAME_SHARE
            bounds = TRAINED[HEADS] if moves_few else Bounds(modularity_loss=-OTHER_GAIN)
            if not is_supported(asdict(evidence_of["vote"]), asdict(found.members[found.best]), K, bounds):
                labels, is_vote = torch.where(best >= 0, name[best], labels), False
        target = Target(labels, is_vote, neighbors, evidence(labels, neighbors, K).modularity)
        # 3. One round of self-training.
        trained, how, note = self._self_train(rows, target, found, soft, trainer)
        same = float((trained == labels).double().mean())
        title = f"{'vote' if is_vote else 'best member'}, {how}"
        evidence_of[title] = evidence(trained, neighbors, K, same)
        # 4. The report, and probabilities as sure as the members are.
        self._report(found, names, evidence_of, note)
        voters = [members[h] for h in found.voters]
        shared, opinions = shared_neighbors(voters, neighbors).sum(1), torch.stack([one >= 0 for one in voters]).sum(0)
        votes_for = found.vote.confidence * len(voters)
        self.row_table = {
            "vote": found.vote.labels.int(),
            "confidence": found.vote.confidence,
            "margin": found.vote.margin,
            "votes_for": votes_for,
            "votes_against": (opinions - votes_for).clamp(min=0),
            "kept_neighbors": shared.to(torch.int16),
        }
        self.report[-2]["kept_neighbors"] = float(shared.double().mean())
        for row, said in zip(self.report[-2:], (found.vote.labels, trained), strict=True):
            row["anmi"] = anmi(said, voters)
        for place, row in enumerate(self.report):
            step = {"epoch": place, "step": place + 1, "loss": 1.0 - row["neighbor_agreement"]}
            trainer.report(step | {"seconds": trainer.seconds()} | row)
        sample = self.scores(x[:: max(1, len(x) // SAMPLE_ROWS)])
        self.temperature.copy_(match_confidence(sample, float(found.vote.confidence.mean())))

    def _self_train(
        self,
        rows: Rows,
        target: Target,
        found: ConsensusResult,
        members: Sequence[Tensor | SoftLabels],
        trainer: BaseTrainer,
    ) -> tuple[Tensor, str, str]:
        """Fit a linear classifier to the surest rows, or a head; where guards refuse it, the nearest mean row decides.

        Args:
            rows: all workers'.
            target: the partition that it is fitted to.
            found: who votes.
            members: all of them.
            trainer: of the head.

        Returns:
            Int64[N], the labels that it gives; what it is called; and what is to be said of it, or nothing.
        """
        K, x, kind = self.config.clusters, rows.tensor(), self.config.classifier
        centers, lengths = _means(x, target.labels, K)
        # 1. The surest rows of each cluster. Members agree on most: neighbours tell which of these lie inside one, but
        # not among few rows.
        count = len(target.labels)
        is_few = count < FEW_ROWS
        inside = torch.zeros(count) if is_few else neighbor_shares(target.labels, target.neighbors)
        if target.is_vote:
            is_sure = surest_rows(target.labels, found.vote.confidence + inside, found.vote.margin, SUREST_SHARE)
        elif is_few:
            is_sure = torch.ones(count, dtype=torch.bool)
        else:
            is_sure = surest_rows(target.labels, inside, inside, FLOOR_SHARE)
        chosen = is_sure.nonzero()[:, 0]
        # 2. Ridge regression.
        penalty = max(RIDGE * lengths * len(chosen), torch.finfo(torch.float32).tiny)
        weight, bias = ridge_classifier(x, target.labels, K, penalty, chosen)
        self.keep(trainer.device, weight, bias, centers, torch.ones(()))
        trained, how = self._labels(x), "self-training"
        refused, loss = broken_guard(target.labels, trained, K), target.loss(trained, K)
        # 3. The head, where it is asked for or where members are not linear.
        if kind == "head" or (kind == "auto" and (refused or loss > MAX_LOSS)):
            voters = [hard_labels(members[h]) for h in found.voters] if target.is_vote else [target.labels]
            # Beside a row stand those of its neighbours that most voters say are in its cluster, in their order.
            shared = shared_neighbors(voters, target.neighbors)
            near = target.neighbors.masked_fill(~shared, -1)
            near = near.gather(1, shared.to(torch.int8).argsort(dim=1, descending=True, stable=True))
            # It learns the voters' clusters by their names in the vote, or the best member's labels.
            if target.is_vote:
                renamed, shares = list[Tensor](), list[Tensor]()
                for h, name in zip(found.voters, found.vote.names, strict=True):
                    member = members[h]
                    clusters = member.clusters if isinstance(member, SoftLabels) else member[:, None]
                    renamed.append(torch.from_numpy(name)[clusters.clamp(min=0)].masked_fill(clusters < 0, -1))
                    shares.append(member.shares if isinstance(member, SoftLabels) else torch.ones(clusters.shape))
                votes = SoftLabels(torch.cat(renamed, dim=1), torch.cat(shares, dim=1))
                del renamed, shares  # as large as the votes
            else:
                votes = SoftLabels(target.labels[:, None], torch.ones(len(target.labels), 1))
            self.head = self._train_head(DerivedRows(rows, neighbors=near), target, votes, trainer)
            by_head = self._labels(x)
            head_loss = target.loss(by_head, K)
            if no := broken_guard(target.labels, by_head, K):
                logger.warning("consensus: the head is not kept: %s", no)
                self.head = None
            elif kind == "auto" and not refused and head_loss >= loss:
                self.head = None
            else:
                trained, how, refused, loss = by_head, "head", "", head_loss
        # 4. The mean rows.
        if refused:
            logger.warning("consensus: the classifier is not kept: %s; rows go to the nearest mean row", refused)
            empty = (torch.bincount(target.labels, minlength=K) == 0).to(x.device)
            bias = (-0.5 * centers.square().sum(1)).masked_fill(empty, -torch.inf)
            self.keep(trainer.device, centers.T, bias, centers, torch.ones(()))
            return self._labels(x), "nearest means", refused
        if loss <= MAX_LOSS:
            return trained, how, ""
        note = f"says less than its members do: its modularity is {loss:.3f} below that of what it is fitted to"
        logger.warning("consensus: the classifier %s; a member's own clusters may be better", note)
        return trained, how, note

    def _train_head(self, rows: Rows, target: Target, votes: SoftLabels, trainer: BaseTrainer) -> Heads:
        """Train a head on votes, and return its moving average.

        Args:
            rows: all workers', with the neighbours that stand beside them.
            target: the clusters at which it starts.
            votes: what it learns of each row.
            trainer: runs the steps.

        Returns:
            The same head on all workers.
        """
        batch = min(HEAD_BATCH, rows.count)
        config = VoteHeadConfig(
            clusters=self.config.clusters,
            steps=max(HEAD_STEPS, HEAD_EPOCHS * (rows.count // batch)),
            batch_size=batch,
            learning_rate=HEAD_RATE,
            min_learning_rate=0.0,
            warmup_steps=0,
            columns=target.neighbors.shape[1],
        )
        method = VoteHead(config, self.dimension, rows.count, self.seed).to(trainer.device)
        method.votes, like = votes, method.student.direction
        solve_last_hidden(method.student, rows.tensor().to(like), target.labels[None].to(like.device))
        method.average.load_state_dict(method.student.state_dict())
        with torch.enable_grad():
            trainer.without_checkpoints().fit(method, rows)
        for parameter in method.average.parameters():
            parameter.copy_(distributed.data_group().broadcast(parameter))  # rounding may differ between processors
        return method.average

    def scores(self, x: Tensor) -> Tensor:
        """Return the scores of the head where one was trained, else of the linear classifier."""
        return super().scores(x) if self.head is None else self.head(x.to(self.weight))[0]

    def _labels(self, x: Tensor) -> Tensor:
        """Return the clusters of all rows, Int64[N], on the CPU."""
        return torch.cat([self.scores(part).argmax(1).cpu() for part in torch.split(x, BLOCK)])

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the classifier, and the head if there is one."""
        if "head.direction" in tensors:
            shape = HeadShape(heads=1, dimension=self.dimension, clusters=self.config.clusters)
            self.head = Heads(shape, self.seed, "fp32").requires_grad_(False)
        super().load_tensors(tensors)

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
