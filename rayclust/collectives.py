"""Moved."""

from rayclust.distributed import all_mean as all_mean
from rayclust.distributed import all_reduce as all_sum
from rayclust.distributed import barrier as barrier
from rayclust.distributed import differentiable_all_gather as differentiable_gather
from rayclust.distributed import differentiable_all_reduce as differentiable_sum
from rayclust.distributed import even_slices as stretches
from rayclust.distributed import is_main as is_first
from rayclust.distributed import rank as rank
from rayclust.distributed import world as everyone
from rayclust.distributed import world_size as world_size

__all__ = [
    "all_mean", "all_sum", "barrier", "differentiable_gather", "differentiable_sum", "everyone", "is_first", "rank",
    "stretches", "world_size",
]  # fmt: skip
