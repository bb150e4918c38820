"""AdamW, the moving average of its result and copies of both for the next products, in one pass over memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from rayclust.kernels.native import call


@dataclass(frozen=True)
class AdamW:
    """One step's numbers. Source: arXiv 1711.05101, algorithm 2."""

    learning_rate: float
    weight_decay: float
    step: int
    """From 1."""
    follow: float
    """1 − m, with the momentum m of the moving average."""
    momentum: float = 0.9
    square_momentum: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Slot:
    """A parameter and what follows it, all of one shape and contiguous."""

    value: Tensor
    """Float32."""
    mean: Tensor
    """Float32, moving average of the gradient."""
    square: Tensor
    """Float32, moving average of its square."""
    follower: Tensor
    """Float32, moving average of the value."""
    copies: tuple[Tensor, Tensor] | None = None
    """BFloat16 of value and follower, written; a multiple of 16 numbers, 32 bytes aligned."""


class _Numbers(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in ("rate", "correction", "shrink", "fresh", "square_fresh", "epsilon", "follow")
    )


def adamw(slot: Slot, gradient: Tensor, options: AdamW) -> None:
    """Takes one step in place.

    Args:
        slot: the parameter.
        gradient: Float32 or, for a slot of a multiple of 16 numbers, BFloat16; of the parameter's size.
        options: the step's numbers.
    """
    o = options
    rate = o.learning_rate / (1.0 - o.momentum**o.step)
    correction = (1.0 - o.square_momentum**o.step) ** -0.5
    shrink = 1.0 - o.learning_rate * o.weight_decay
    numbers = _Numbers(rate, correction, shrink, 1.0 - o.momentum, 1.0 - o.square_momentum, o.epsilon, o.follow)
    state = _pointers(slot.value, slot.mean, slot.square, slot.follower)
    narrow = gradient.dtype == torch.bfloat16
    gradients = (None, gradient) if narrow else (gradient, None)
    if call("adamw", state, *gradients, _pointers(*(slot.copies or (None, None))), numbers, slot.value.numel()):
        return
    wide = gradient.view_as(slot.value).float()
    slot.mean.lerp_(wide, 1.0 - o.momentum)
    slot.square.mul_(o.square_momentum).addcmul_(wide, wide, value=1.0 - o.square_momentum)
    length = slot.square.sqrt().mul_(correction).add_(o.epsilon)
    slot.value.mul_(shrink).addcdiv_(slot.mean, length, value=-rate)
    slot.follower.lerp_(slot.value, o.follow)
    for copy, source in zip(slot.copies or (), (slot.value, slot.follower), strict=False):
        copy.copy_(source)


def _pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
