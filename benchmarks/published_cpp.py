"""The published CPP step, written plainly: the baseline of cpp_step.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def compression(z: Tensor, membership: Tensor, distortion: float) -> Tensor:
    """Return R_c with all groups' weighted rows as a tensor n × d × n, determinants by LU, gradients by autograd."""
    count, width = z.shape
    sums = membership.sum(0) + 1e-8
    weighted = z.T[None] * membership.T[:, None, :]
    moments = weighted @ z
    matrices = torch.eye(width, device=z.device) + (width / (sums * distortion))[:, None, None] * moments
    return (sums / (2 * count) * torch.logdet(matrices)).sum()


def membership(codes: Tensor, temperature: float, half_steps: int) -> Tensor:
    """Return n·P of entropic transport with cost −|C Cᵀ|, by updates of both potentials."""
    count = len(codes)
    similarity = (codes @ codes.T).abs()
    u, v = similarity.new_zeros(count), similarity.new_zeros(count)
    target = -torch.tensor(float(count)).log()
    for step in range(half_steps):
        total = (similarity + u[:, None] + v[None]) / temperature
        if step % 2 == 0:
            u = temperature * (target - total.logsumexp(1)) + u
        else:
            v = (temperature * (target - total.logsumexp(0)) + v).detach()
    return count * ((similarity + u[:, None] + v[None]) / temperature).exp()


class PublishedCpp:
    """Network, loss and two optimisers, float32.

    Args:
        dimension: D.
        hidden: h.
        width: d.
        device: where.
    """

    def __init__(self, dimension: int, hidden: int, width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Linear(dimension, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        ).to(device)
        self.features = nn.Linear(hidden, width).to(device)
        parameters = [*self.trunk.parameters(), *self.features.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step(self, x: Tensor) -> Tensor:
        """Take one joint step of the single-head program."""
        z = functional.normalize(self.features(self.trunk(x)), dim=1)
        count, width = z.shape
        pi = membership(z, 0.175, 5)
        rate = 0.5 * torch.logdet(torch.eye(width, device=z.device) + width / (count * 0.1) * z.T @ z)
        loss = -rate + compression(z, pi, 0.1) + 0.025 * pi.square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
