"""Rows that several benchmarks measure on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def planted_rows(count: int, width: int, groups: int, spread: float = 0.6, seed: int = 0) -> Tensor:
    """Unit rows Float32[N D] around planted directions; groups overlap, so that k-means goes on for many passes."""
    draw = torch.Generator().manual_seed(seed)
    centers = spread * torch.randn(groups, width, generator=draw)
    x = torch.randn(count, width, generator=draw).add_(centers[torch.randint(groups, (count,), generator=draw)])
    return functional.normalize(x, dim=1)
