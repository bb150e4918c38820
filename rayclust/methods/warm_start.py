"""Heads that start from a partition of the rows instead of from chance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.collectives import all_sum
from rayclust.methods.base import Rows
from rayclust.methods.heads import Heads


@torch.no_grad()
def start_from_centers(heads: Heads, rows: Rows, centers: Tensor) -> None:
    """Turns each head's last layer to the mean bottleneck rows of a partition's clusters.

    Each head then repeats the partition as far as its random bottleneck keeps it, so that heads start near to one
    answer and apart from each other. Workers pool their rows.

    Args:
        heads: whose `direction` is set, in place.
        rows: on the device of the heads, or on the CPU.
        centers: Float[K D], a row belongs to the centre with the largest product with it.
    """
    shape, device = heads.shape, heads.direction.device
    sums = heads.direction.new_zeros(shape.heads, shape.clusters, shape.bottleneck)
    counts = heads.direction.new_zeros(shape.clusters)
    for block in rows.blocks():
        for x in torch.split(block, 8192):
            x = x.to(device, heads.direction.dtype)
            members = functional.one_hot((x @ centers.T.to(x)).argmax(1), shape.clusters).to(x)
            sums += members.T @ heads.bottleneck(x)
            counts += members.sum(0)
    sums, counts = all_sum(sums), all_sum(counts)
    means = sums / counts.clamp(min=1)[:, None]
    overall = sums.sum(1, keepdim=True) / counts.sum()
    alive = (counts > 0)[:, None]
    heads.direction.copy_(torch.where(alive, functional.normalize(means - overall, dim=-1), heads.direction))
