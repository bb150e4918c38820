"""Clustering losses built on the information that one view carries about another: TEMI, PMI, WMI, SCAN.

All take log-probabilities with the axes H V B K (heads, views of a row, rows of the batch, clusters). View 0 is the
row, view 1 its neighbour; a student's view is only ever compared with a teacher's *other* view. Everything stays in
log space, so a pair that confidently disagrees costs a large number and not an infinite one.

Where a stack of workers divides the clusters, K is this worker's and every sum over clusters goes through all of them:
losses are the same on each, and their gradient in its own log-probabilities is whole.

Source: arXiv 2303.17896 (TEMI, PMI, WMI), arXiv 2005.12320 (SCAN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayclust.collectives import Team, all_sum, differentiable_sum
from rayclust.kernels.divided_softmax import ALONE, log_softmax, logsumexp


@dataclass(frozen=True)
class InformationOptions:
    """What the losses of this file can be told."""

    beta: float = 0.6
    """Power on the product of two views' probabilities, above 0. Above 0.5 confident assignments stay best, below 1 the
    uniform answer beats a collapse into one cluster. SCAN has none."""
    positive_pmi: bool = False
    """Whether a pair's information is cut off at 0 from below, so that disagreeing pairs cost nothing more."""
    entropy_weight: float = 0.0
    """α, what entropy is rewarded with. WMI: the mean entropy of the rows. SCAN: the entropy of the mean student."""
    pool: Callable[[Tensor], Tensor] = lambda agreement: agreement.mean(0, keepdim=True)
    """How TEMI makes one trust Float[1 B] of the heads' agreement Float[H B]; another where workers share heads."""
    stack: Team = ALONE
    """Those who divide the clusters."""


def log_probabilities(logits: Tensor, temperature: float, stack: Team = ALONE) -> Tensor:
    """The logarithm of softmax(logits / temperature), in float32 or wider whatever came in.

    Args:
        logits: Float[... K].
        temperature: above 0.
        stack: those who divide the clusters.

    Returns:
        Float[... K]; float64 for float64 input, else float32.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return log_softmax(wide / temperature, stack)


def agreement(teacher: Tensor, stack: Team = ALONE) -> Tensor:
    """The probability that two views of a row fall into one cluster, averaged over the pairs of views.

    Args:
        teacher: Float[H V B K], log-probabilities; V at least 2.
        stack: those who divide the clusters.

    Returns:
        Float[H B] in [0, 1]; 1 only where all views are the same one-hot.
    """
    views = teacher.shape[1]
    pairs = [teacher[:, a] + teacher[:, b] for a in range(views) for b in range(a + 1, views)]
    total = torch.stack([pair.exp().sum(-1) for pair in pairs]).mean(0)
    return stack.total(total).clamp(max=1.0)


def pointwise_information(
    student: Tensor, teacher: Tensor, log_marginal: Tensor, beta: float, stack: Team = ALONE
) -> Tensor:
    """Pointwise mutual information of two views, ln Σ_c (q_s(c)·q_t(c))^β / p̂(c).

    Args:
        student: Float[... K], log-probabilities.
        teacher: Float[... K], log-probabilities of another view of the same rows.
        log_marginal: Float[... K], ln p̂, broadcast.
        beta: the power on the product, above 0.
        stack: those who divide the clusters.

    Returns:
        Float[...], nats; at most −ln min p̂ for β = 1.

    Source: arXiv 2303.17896, eq. 5 with β; the power is on the product and not on p̂.
    """
    return logsumexp(beta * (student + teacher) - log_marginal, stack)


def _other_views(student: Tensor, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, so rolled along the views that each student's view meets each other view of the teacher once."""
    for shift in range(1, student.shape[1]):
        yield student.roll(shift, dims=1), teacher


def _information_losses(student: Tensor, teacher: Tensor, log_marginal: Tensor, options: InformationOptions) -> Tensor:
    """Float[H B]: −PMI of each row, averaged over the ordered pairs of different views."""
    total = torch.zeros((), dtype=student.dtype, device=student.device)
    for mine, theirs in _other_views(student, teacher):
        information = pointwise_information(mine, theirs, log_marginal[:, None, None], options.beta, options.stack)
        if options.positive_pmi:
            information = information.clamp(min=0.0)
        total = total - information.mean(1)
    return total / (student.shape[1] - 1)


def temi(
    student: Tensor,
    teacher: Tensor,
    log_marginal: Tensor,
    options: InformationOptions,
    trust: Tensor | None = None,
) -> Tensor:
    """TEMI: each row's loss weighted by how far all teachers together trust its pair.

    Args:
        student: Float[H V B K], log-probabilities, with gradient.
        teacher: Float[H V B K], log-probabilities, without gradient.
        log_marginal: Float[H K], ln p̂ of each head.
        options: β and the cut-off at 0.
        trust: Float[H B], the heads' `agreement` where it is known already.

    Returns:
        Float[H], nats: ½·mean over rows of w·(ℓ(b→a) + ℓ(a→b)); the mean is over rows, not divided by Σ w.

    Source: arXiv 2303.17896, eq. 8.
    """
    weights = options.pool(agreement(teacher, options.stack) if trust is None else trust)
    return (weights * _information_losses(student, teacher, log_marginal, options)).mean(1)


def wmi(
    student: Tensor,
    teacher: Tensor,
    log_marginal: Tensor,
    options: InformationOptions,
    trust: Tensor | None = None,
) -> Tensor:
    """WMI: as `temi` with each head's own trust, and α·mean Σ q ln q of the student where α > 0.

    Source: arXiv 2303.17896, eq. 6.
    """
    trust = agreement(teacher, options.stack) if trust is None else trust
    losses = (trust * _information_losses(student, teacher, log_marginal, options)).mean(1)
    if options.entropy_weight:
        negative_entropy = options.stack.total((student.exp() * student).sum(-1).mean((1, 2)))
        losses = losses + options.entropy_weight * negative_entropy
    return losses


def pmi(
    student: Tensor,
    teacher: Tensor,
    log_marginal: Tensor,
    options: InformationOptions,
    trust: Tensor | None = None,
) -> Tensor:
    """PMI: as `temi` with weight 1 for each pair. Source: arXiv 2303.17896, eq. 5."""
    return _information_losses(student, teacher, log_marginal, options).mean(1)


def scan(
    student: Tensor,
    teacher: Tensor,
    log_marginal: Tensor,
    options: InformationOptions,
    trust: Tensor | None = None,
) -> Tensor:
    """SCAN: agreement of neighbours, and an even spread of the mean student over the clusters.

    The mean student p̄ is that of the batch of all workers, and the gradient goes through it: a sum over each worker's
    own rows would be another loss for each number of workers. `log_marginal` is not used.

    Returns:
        Float[H], nats: −ln Σ_c q_s q_t over the other views + α·mean over views of Σ_c p̄(c) ln p̄(c).

    Source: arXiv 2005.12320, eq. 2, with the teacher in place of the second student.
    """
    losses = torch.zeros((), dtype=student.dtype, device=student.device)
    for mine, theirs in _other_views(student, teacher):
        losses = losses - logsumexp(mine + theirs, options.stack).mean((1, 2))
    losses = losses / (student.shape[1] - 1)
    rows = all_sum(torch.tensor(float(student.shape[2]), dtype=student.dtype, device=student.device))
    mean = differentiable_sum(student.exp().sum(2)) / rows
    tiny = torch.finfo(mean.dtype).tiny
    negative_entropy = options.stack.total((mean * mean.clamp(min=tiny).log()).sum(-1).mean(1))
    return losses + options.entropy_weight * negative_entropy


InformationLoss = Callable[[Tensor, Tensor, Tensor, InformationOptions, Tensor | None], Tensor]

LOSSES: dict[str, InformationLoss] = {"temi": temi, "pmi": pmi, "wmi": wmi, "scan": scan}
"""The losses by the name that a config gives them."""


class Marginal(nn.Module):
    """p̂, the running share of each cluster under the teacher, for H heads.

    p̂ ← m·p̂ + (1−m)·mean of the teacher's probabilities over all rows and views of all workers; starts even; carries no
    gradient. A loss of a step uses p̂ *after* that step's update.

    Args:
        heads: H.
        clusters: K, those of this worker.
        momentum: m.
        all_clusters: those of all workers that divide them; None: these are all.

    Source: arXiv 2303.17896, section 3.2.
    """

    shares: Tensor

    def __init__(self, heads: int, clusters: int, momentum: float = 0.9, all_clusters: int | None = None) -> None:
        super().__init__()
        self.momentum, self.even = momentum, 1.0 / (all_clusters or clusters)
        self.register_buffer("shares", torch.full((heads, clusters), self.even))

    @torch.no_grad()
    def update(self, teacher: Tensor) -> Tensor:
        """Takes in a batch and gives ln p̂.

        Args:
            teacher: Float[H V B K], log-probabilities of this worker's rows.

        Returns:
            Float[H K], ln p̂, finite; the same bits on every worker.
        """
        return self.take_in(teacher.exp().sum((1, 2)), teacher.shape[1] * teacher.shape[2])

    @torch.no_grad()
    def take_in(self, sums: Tensor, rows: int) -> Tensor:
        """As `update`, from sums.

        Args:
            sums: Float[H K], the teacher's probabilities summed over this worker's rows and views.
            rows: how many were summed.
        """
        total = all_sum(torch.cat([sums.flatten(), sums.new_full((1,), float(rows))]))
        mean = (total[:-1] / total[-1]).view_as(sums)
        self.shares.lerp_(mean.to(self.shares.dtype), 1.0 - self.momentum)
        return self.log()

    def log(self) -> Tensor:
        """The logarithm of p̂, Float[H K]; the share of a dead cluster counts as the smallest normal number."""
        return self.shares.clamp(min=torch.finfo(self.shares.dtype).tiny).log()

    def entropy(self) -> Tensor:
        """Float[H], nats, in [0, ln K]: ln K when the clusters are even; adds up over workers that divide them."""
        entropy: Tensor = torch.special.entr(self.shares).sum(-1)
        return entropy

    def live(self) -> Tensor:
        """Int[H]: the clusters whose share is above a tenth of an even one; adds up as well."""
        return (self.shares > 0.1 * self.even).sum(-1)
