"""TEMI from the partitions that its heads start at to the head that is kept, neither of which is the paper's.

Random heads need thousands of steps before they cluster at all, and most settle where two classes share a cluster. Here
k-means is run from many seeds on rows averaged over their neighbours; the partitions that keep most neighbours together
are kept; and each head's last hidden layer is solved, by ridge regression, to predict one of them. Or all heads start
at the partition that the method `auto` chooses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.clustering import kmeans
from rayclust.clustering.candidates import (
    Bounds,
    Candidate,
    choose,
    evidence,
    is_supported,
    leading_components,
    make_candidates,
)
from rayclust.clustering.neighborhood import modularity, modularity_terms, smooth
from rayclust.clustering.row_stats import even_sample
from rayclust.distributed import all_reduce, data_group, data_parallel, own_slice
from rayclust.methods.base import BaseTrainer, Rows
from rayclust.methods.graph import DerivedRows, sample_ids, sample_rows, sample_with_neighbors
from rayclust.methods.temi import Heads, Temi
from rayclust.methods.temi_settings import TemiConfig
from rayclust.settings import KMeansOptions

logger = logging.getLogger(__name__)

RIDGE = 0.01
"""Ridge penalty, relative to the mean variance of a hidden unit."""
ROUNDING = 1e-6
"""Variance of hidden units, relative to their squared mean, that counts as none."""
GUARD = Bounds(modularity_loss=0.02, agreement_loss=0.05)
"""What the neighbour graph may say against a training; it fills clusters that a vote had left empty, at some cost."""
_BLOCK = 2048
_MAX_LOGITS = 1 << 28
"""Logits that a choice computes at once, at most: 1 GiB of float32."""
_ANCHORS = 16_384
_ITERATIONS = 100
_AXES_ROWS = 16_384


@dataclass(frozen=True)
class Start:
    """The partition that the method `auto` chooses, of a sample of the rows."""

    neighbors: Tensor
    """Int64[n M], nearest others in the sample, −1 where a row has fewer."""
    partition: Candidate


class StartedTemi(Temi):
    """TEMI as its settings ask for it: `warm_start`, `components` and `selection` as well.

    Args:
        config: the settings; a preset is written out for `count` rows.
        dimension: D.
        count: N, the rows of all workers.
        seed: of the initial weights, of the samples and of the partitions.
    """

    start: Start | None = None
    """What heads start from with `warm_start: auto`, on the sample of that seed; None: what `auto` chooses."""

    @torch.no_grad()
    def fit(self, rows: Rows, trainer: BaseTrainer) -> None:
        """Start warm, where asked for, take the plan's steps, and choose a head; then every worker holds all heads.

        A start from `auto` comes back where the neighbour graph speaks against what training has made of it.
        """
        c, K = self.config, self.config.clusters
        # 1. Heads for the leading components alone, where asked for: the first layer's products are most of a step's.
        if 0 < c.components < self.dimension:
            checkpoint, like = trainer.restore(), self.student.direction
            if checkpoint is None:
                x = rows.tensor()
                x = x[even_sample(rows.count, max(_AXES_ROWS, K), self.seed).to(x.device)].float()
                self.basis = leading_components(x, c.components).to(like)
            else:  # a resumed training keeps its axes
                self.basis = checkpoint[0]["method.basis"].to(like)
            self._build_heads(self.mesh)
            rows = DerivedRows(rows, self.basis)
        # 2. The partition that heads start at, chosen as `auto` does but that a vote needs no evidence of its own:
        # training moves a start in any case, and from where k-means stopped it goes further astray than from a vote.
        start = self.start if c.warm_start == "auto" else None
        if c.warm_start == "auto" and start is None:
            like = self.to(trainer.device).student.direction
            with data_parallel(self.mesh.data):
                x, near = sample_with_neighbors(rows, K, c.start_neighbors, self.seed, like)
                start = Start(near, choose(make_candidates(x.float(), near, K, self.seed), other_gain=0.0))
                del x  # the memory is wanted in training
        # 3. The plan's steps, and the head that is kept.
        with torch.enable_grad():
            self.train_heads(rows, trainer, lambda: self._start_heads(rows, start))
        if c.selection == "modularity":
            best, values = best_by_modularity(self.teacher, rows, c.start_neighbors, self.seed)
            self.best_head.fill_(best)
            logger.info("best head: %d, modularity %.3f", best, float(values[best]))
        # 4. The start, where its clusters are better: training pulls towards even sizes and can leave classes that the
        # start had found. The first worker decides.
        if start is not None:
            x, best = sample_rows(rows, K, self.seed, self.teacher.direction), int(self.best_head)
            labels = torch.cat([self.teacher(part, head=best)[0].argmax(1) for part in torch.split(x, _BLOCK)])
            is_good = is_supported(evidence(x, labels, start.neighbors, K), start.partition.evidence, K, GUARD)
            if not data_group().broadcast(torch.tensor(is_good, device=x.device)):
                logger.warning("temi: training has left the neighbour graph's clusters; the start is kept")
                self._build_heads(self.mesh)
                self._start_heads(rows, start)
                self.best_head.zero_()
        # 5. Heads that take rows again: the axes V go into the first layers, ⟨w, Vᵀx⟩ = ⟨Vw, x⟩.
        if self.basis is not None:
            for heads in (self.student, self.teacher):
                weight = heads.weights[0]
                heads.weights[0] = nn.Parameter((weight @ self.basis.T).detach(), weight.requires_grad)
                heads.shape = replace(heads.shape, dimension=self.dimension)
            self.basis = None

    @torch.no_grad()
    def _start_heads(self, rows: Rows, start: Start | None) -> None:
        """Set each head's layers before the last logits so that its clusters are those of a partition."""
        if start is not None:
            x = sample_rows(rows, self.config.clusters, self.seed, self.student.direction)
            solve_last_hidden(self.student, x, start.partition.labels.expand(self.student.shape.heads, -1))
        elif self.config.warm_start == "kmeans":
            start_from_kmeans(self.student, rows, self.config, self.seed)
        self.teacher.load_state_dict(self.student.state_dict())


@torch.no_grad()
def start_from_kmeans(heads: Heads, rows: Rows, config: TemiConfig, seed: int) -> None:
    """Set each head's layers before the last logits so that its clusters are those of a good k-means partition.

    The best partitions, by modularity, go to the heads in turn. Workers share the work and end with equal heads.

    Args:
        heads: on any device, changed in place.
        rows: read once.
        config: says what partitions to make.
        seed: of k-means' first centres and of the sample.
    """
    # 1. A sample of the rows with their neighbours in it, the same on all workers.
    K = config.clusters
    x, neighbors = sample_with_neighbors(rows, K, config.start_neighbors, seed, heads.direction)
    # 2. k-means of rows averaged with their neighbours, from each seed; workers share the rows.
    smoothed = smooth(x, neighbors, config.start_rounds)
    settings = KMeansOptions(clusters=K, restarts=config.start_restarts, max_iterations=_ITERATIONS, tolerance=1e-3)
    labels, _ = kmeans.fit_all(smoothed, settings, seed)
    # 3. The partitions of highest modularity.
    known = neighbors.clamp(min=0)
    others = [one[known].masked_fill(neighbors < 0, -1) for one in labels]
    terms = [modularity_terms(a[None], b[None], K) for a, b in zip(labels, others, strict=True)]
    order = modularity(torch.cat(terms)).sort(descending=True, stable=True).indices
    places = heads.shape.first + torch.arange(heads.shape.heads, device=order.device)
    # 4. Heads that predict them.
    solve_last_hidden(heads, x, labels[order[places % len(order)]])


@torch.no_grad()
def best_by_modularity(heads: Heads, rows: Rows, columns: int, seed: int) -> tuple[int, Tensor]:
    """Return the head whose clusters keep most neighbours together.

    Args:
        heads: whose most probable clusters count; all of them, the same on all workers.
        rows: read once; at most `SAMPLE_ROWS` of them are looked at, with their neighbours.
        columns: nearest neighbours that count.
        seed: of the sample.

    Returns:
        The head's number, and Float64[H], the modularity of every head; see `clustering.neighborhood.modularity`.
    """
    K, like = heads.shape.clusters, heads.direction
    block = max(1, min(_BLOCK, _MAX_LOGITS // (heads.shape.heads * K)))
    ids = sample_ids(rows.count, K, seed)
    x, neighbors = rows.tensor(), rows.neighbors()
    total = like.new_zeros((heads.shape.heads, K + 2), dtype=torch.float64)
    for anchors in torch.split(ids[own_slice(len(ids))], _ANCHORS):
        # Each row that is an anchor or a neighbour of one is evaluated once.
        near = neighbors[anchors.to(neighbors.device), :columns].long()
        pairs = torch.cat([anchors.to(near.device)[:, None], near.clamp(min=0)], dim=1)
        needed, where = torch.unique(pairs, return_inverse=True)
        blocks = [heads(x[part.to(x.device)].to(like)).argmax(-1) for part in torch.split(needed, block)]
        labels = torch.cat(blocks, dim=1)[:, where.to(like.device)]
        others = labels[:, :, 1:].masked_fill((near < 0).to(labels.device), -1)
        total += modularity_terms(labels[:, :, 0], others, K)
    values = modularity(all_reduce(total))
    return int(values.argmax()), values


def solve_last_hidden(heads: Heads, x: Tensor, labels: Tensor) -> None:
    """Set each head's last hidden layer by ridge regression of its clusters on the units before it.

    The bottleneck then is Σ_c (score of c) · ŵ_c, so that the last layer, left as it is, reads the scores off again.

    Args:
        heads: whose last hidden layer is set, in place; its weights keep their length.
        x: Float[N D], the same on all workers.
        labels: Int64[H N], the same on all workers.
    """
    last, bias, K = heads.weights[-1], heads.biases[-1], heads.shape.clusters
    H, width, count = len(last), last.shape[2], len(x)
    # 1. Second moments of the hidden units, and of them with the clusters, around their means; workers share the rows.
    # Sums over blocks are float64: the means are taken off them, and may be far from zero.
    shapes = ((H, width, width), (H, width, K), (H, width))
    gram, cross, mean = (x.new_zeros(shape, dtype=torch.float64) for shape in shapes)
    for ids in torch.split(torch.arange(count, device=x.device)[own_slice(count)], _BLOCK):
        units = heads.hidden(x[ids]).expand(H, -1, -1)
        members = (labels[:, ids, None] == torch.arange(K, device=labels.device)).to(units)
        gram += units.mT @ units
        cross += units.mT @ members
        mean += units.sum(1)
    gram, cross, mean = (all_reduce(part) / count for part in (gram, cross, mean))
    shares = torch.stack([torch.bincount(one, minlength=K) for one in labels]).double() / count
    gram = gram - mean[:, :, None] * mean[:, None]
    cross = cross - mean[:, :, None] * shares[:, None]
    # 2. Scores of the clusters, linear in the units. By Cholesky: the matrix is positive definite, and batched LU fails
    # in some builds of MKL on two threads.
    variance = gram.diagonal(dim1=1, dim2=2).mean(1)
    penalty = (RIDGE * variance).clamp(min=torch.finfo(last.dtype).tiny)[:, None].expand(-1, width)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(penalty))
    factor = torch.where(failed.view(-1, 1, 1) > 0, torch.eye(width).to(factor), factor)
    scores = torch.cholesky_solve(cross, factor)
    # 3. The layer that writes them along the last layer's directions, at the length that the weights had; its bias
    # takes the mean off. Heads whose units do not vary keep theirs.
    weight = functional.normalize(heads.direction.double(), dim=2).mT @ scores.mT
    length = weight.flatten(1).norm(dim=1)
    varies = variance > ROUNDING * mean.square().mean(1)
    usable = (length > 0) & varies & (failed == 0)
    weight = weight * (last.double().flatten(1).norm(dim=1) / length.where(usable, 1.0))[:, None, None]
    for parameter, value in ((last, weight), (bias, -(weight @ mean[:, :, None])[:, :, 0])):
        solved = torch.where(usable.view(-1, *[1] * (value.dim() - 1)), value, parameter.to(value))
        parameter.copy_(data_group().broadcast(solved))  # rounding may differ between processors
