"""TEMI's training step in the form in which it was published: the baseline of temi_step.py, and nothing to copy from.

A Python loop over heads, each a module of its own; batches put together row by row; probabilities outside of log space;
float32; AdamW and the moving average parameter by parameter. Source: arXiv 2303.17896.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

MOMENTUM, MARGINAL_MOMENTUM, TEMPERATURE = 0.996, 0.9, 0.1


class Head(nn.Module):
    """D → 512 → GELU → 256 → unit row → weight-normalised K."""

    def __init__(self, dimension: int, clusters: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dimension, 512), nn.GELU(), nn.Linear(512, 256))
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(256, clusters, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Float[R D] to Float[R K]."""
        return self.last(functional.normalize(self.mlp(x), dim=-1))


class PublishedTemi:
    """Student and teacher, and one training step.

    Args:
        x: Float32[N D], on the CPU, from which rows are taken one by one.
        neighbors: Int[N M].
        heads: H.
        clusters: K.
        device: where the heads live.
    """

    def __init__(self, x: np.ndarray, neighbors: np.ndarray, heads: int, clusters: int, device: torch.device) -> None:
        self.x, self.neighbors, self.device = torch.from_numpy(x), neighbors, device
        self.student = nn.ModuleList(Head(x.shape[1], clusters) for _ in range(heads)).to(device)
        self.teacher = nn.ModuleList(Head(x.shape[1], clusters) for _ in range(heads)).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.marginals = [torch.full((1, clusters), 1.0 / clusters, device=device) for _ in range(heads)]
        matrices = [p for p in self.student.parameters() if p.dim() > 1]
        vectors = [p for p in self.student.parameters() if p.dim() <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
        self.rng = np.random.default_rng(0)

    def batch(self, size: int) -> list[Tensor]:
        """Two views Float32[B D], each row looked up on its own."""
        pairs = []
        for row in self.rng.permutation(len(self.x))[:size]:
            partner = self.rng.choice(self.neighbors[row])
            pairs.append((self.x[row], self.x[partner]))
        return [view.to(self.device) for view in default_collate(pairs)]

    def losses(self, views: list[Tensor], beta: float) -> Tensor:
        """The mean over heads of ½·Σ over both directions of mean w·ℓ."""
        stacked = torch.cat(views)
        with torch.no_grad():
            taught = [functional.softmax(head(stacked) / TEMPERATURE, dim=-1).chunk(2) for head in self.teacher]
            weight = sum((a * b).sum(-1) for a, b in taught) / len(taught)
        learnt = [functional.softmax(head(stacked) / TEMPERATURE, dim=-1).chunk(2) for head in self.student]
        total = torch.zeros((), device=self.device)
        for h, (student, teacher) in enumerate(zip(learnt, taught, strict=True)):
            mean = torch.cat(teacher).mean(0, keepdim=True)
            self.marginals[h] = MARGINAL_MOMENTUM * self.marginals[h] + (1 - MARGINAL_MOMENTUM) * mean
            for mine, theirs in ((student[0], teacher[1]), (student[1], teacher[0])):
                loss = -torch.log(((mine * theirs) ** beta / self.marginals[h]).sum(-1))
                total = total + 0.5 * (weight * loss).mean()
        return total / len(taught)

    def step(self, size: int = 512, beta: float = 0.6) -> float:
        """One step on a new batch; its loss."""
        loss = self.losses(self.batch(size), beta)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for follower, leader in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                follower.mul_(MOMENTUM).add_((1 - MOMENTUM) * leader)
        return float(loss.detach())
