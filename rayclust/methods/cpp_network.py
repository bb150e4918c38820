"""CPP's network: a trunk of two layers and one or two heads that give unit rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust import collectives
from rayclust.methods.cpp_config import CppConfig
from rayclust.methods.heads import StackedNorm, matmul_dtype


class CppNetwork(nn.Module):
    """Linear → BatchNorm → ReLU → Linear → ReLU, then Linear → unit rows for features and, with two heads, for codes.

    Batch norm takes the statistics of all workers' rows in training and running ones otherwise.

    Args:
        config: sizes, variant and precision.
        dimension: D, the width of the rows that come in.
        seed: of the initial weights, which are torch's default.
    """

    def __init__(self, config: CppConfig, dimension: int, seed: int) -> None:
        super().__init__()
        self.precision = config.precision
        self.first = nn.Linear(dimension, config.hidden)
        self.norm = StackedNorm(1, config.hidden)
        self.second = nn.Linear(config.hidden, config.hidden)
        self.features = nn.Linear(config.hidden, config.width)
        self.codes = nn.Linear(config.hidden, config.width) if config.variant == "two_head" else None
        self._reset(seed)

    @torch.no_grad()
    def _reset(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.first, self.second, self.features, self.codes):
            if layer is not None:
                bound = 1.0 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, x: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Features z and codes c, Float[B D] to unit rows Float[B d] each, in float32 or wider; equal for one head."""
        x = self._affine(self.first, x, training)
        x = functional.relu(self.norm(_wide(x)[None], training)[0])
        x = functional.relu(self._affine(self.second, x, training))
        z = functional.normalize(_wide(self._affine(self.features, x, training)), dim=1)
        if self.codes is None:
            return z, z
        return z, functional.normalize(_wide(self._affine(self.codes, x, training)), dim=1)

    def _affine(self, layer: nn.Linear, x: Tensor, training: bool) -> Tensor:
        if not training:
            return functional.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
        dtype = torch.float16 if self.precision == "fp16" else matmul_dtype(self.precision, layer.weight)
        return functional.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))

    @torch.no_grad()
    def copy_features_to_codes(self) -> None:
        """The cluster head starts as the feature head."""
        if self.codes is not None:
            self.codes.load_state_dict(self.features.state_dict())

    @torch.no_grad()
    def start_from_principal(self, blocks: Callable[[], Iterator[Tensor]]) -> None:
        """Starts where z is the direction of the rows' first d principal components.

        Some units of the trunk hold a component's positive and negative part, which the second layer passes on and the
        feature head subtracts; the others stay random and are not listened to yet.

        Args:
            blocks: this worker's rows, Float[B D]s.
        """
        directions, deviations, mean = _principal(blocks, self.first.weight)
        count = min(len(self.features.weight), directions.shape[1], len(self.first.weight) // 2)
        directions, share = directions[:, :count].T, deviations[:count] / deviations[0]
        pair = torch.cat([directions, -directions])
        self.first.weight[: 2 * count] = pair / deviations[0]
        self.first.bias[: 2 * count] = -(pair @ mean) / deviations[0]
        self.norm.gains[0, : 2 * count] = torch.cat([share, share])
        self.second.weight[: 2 * count] = torch.eye(2 * count, self.second.in_features)
        self.second.bias[: 2 * count] = 0.0
        eye = torch.eye(count).to(share) / share.norm()
        self.features.weight[:count] = 0.0
        self.features.weight[:count, : 2 * count] = torch.cat([eye, -eye], dim=1)
        self.features.weight[count:] *= _UNUSED
        self.features.bias.zero_()
        self.copy_features_to_codes()

    @torch.no_grad()
    def settle(self, blocks: Callable[[], Iterator[Tensor]]) -> None:
        """Replaces the running statistics by those of all workers' rows: after few steps they lag behind.

        Args:
            blocks: this worker's rows, Float[B D]s.
        """
        weight = self.first.weight
        total = torch.zeros(3, self.norm.running_mean.shape[1], dtype=torch.float64, device=weight.device)
        for block in blocks():
            for part in torch.split(block.to(weight), 4096):
                x = self._affine(self.first, part, False).double() - self.norm.running_mean[0]
                total += torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])
        sums, squares, rows = collectives.all_sum(total)
        shift = sums / rows
        variance = (squares / rows - shift.square()) * rows / (rows - 1).clamp(min=1)
        self.norm.running_mean += shift.to(weight)
        self.norm.running_var.copy_(variance[None])


_UNUSED = 1e-2
"""Scale of the random weights of those outputs for which the rows have no principal component."""


def _principal(blocks: Callable[[], Iterator[Tensor]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions Float[D D] as columns, standard deviations Float[D], falling, and the mean Float[D] of all rows."""
    width = like.shape[1]
    total = torch.zeros(width + 2, width, dtype=torch.float64, device=like.device)
    for block in blocks():
        x = block.to(like)
        total[:width] += x.T @ x
        total[width] += x.sum(0)
        total[width + 1] += len(x)
    total = collectives.all_sum(total)
    mean = total[width] / total[width + 1, 0]
    values, vectors = torch.linalg.eigh(total[:width] / total[width + 1, 0] - mean.outer(mean))
    deviations = values.flip(0).clamp(min=0).sqrt()
    deviations = deviations.clamp(min=1e-6 * float(deviations[0]) + 1e-12)
    return vectors.flip(1).to(like), deviations.to(like), mean.to(like)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
