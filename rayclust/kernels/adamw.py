"""AdamW, the moving average of its result and copies of both for the next products, in one pass over memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayclust.kernels.native import call


class _Numbers(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in ("rate", "correction", "shrink", "fresh", "square_fresh", "epsilon", "follow")
    )


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

    @cached_property
    def compiled(self) -> _Numbers:
        """As the compiled pass wants them."""
        rate = self.learning_rate / (1.0 - self.momentum**self.step)
        correction = (1.0 - self.square_momentum**self.step) ** -0.5
        shrink = 1.0 - self.learning_rate * self.weight_decay
        fresh = 1.0 - self.momentum, 1.0 - self.square_momentum
        return _Numbers(rate, correction, shrink, *fresh, self.epsilon, self.follow)


@dataclass(frozen=True)
class Slot:
    """A parameter and what follows it, all of one shape and contiguous, where they will stay."""

    value: Tensor
    """Float32 or Float64, as the next three."""
    mean: Tensor
    """Moving average of the gradient."""
    square: Tensor
    """Moving average of its square."""
    follower: Tensor
    """Moving average of the value."""
    copies: tuple[Tensor, Tensor] | None = None
    """BFloat16 of value and follower, written; a multiple of 16 numbers, 32 bytes aligned."""

    @cached_property
    def addresses(self) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]]:
        """Of the first four, and of the copies."""
        own = _pointers(self.value, self.mean, self.square, self.follower)
        return own, _pointers(*(self.copies or (None, None)))


def adamw(slot: Slot, gradient: Tensor, options: AdamW) -> None:
    """Takes one step in place.

    Args:
        slot: the parameter.
        gradient: of the parameter's size and dtype or, for a slot of a multiple of 16 numbers, BFloat16.
        options: the step's numbers.
    """
    if slot.value.dtype == torch.float32 and _compiled(slot, gradient, options):
        return
    o, wide = options, gradient.to(slot.value.dtype).view_as(slot.value)
    torch._fused_adamw_(
        [slot.value], [wide], [slot.mean], [slot.square], [], [torch.tensor(float(o.step))],
        lr=o.learning_rate, beta1=o.momentum, beta2=o.square_momentum, weight_decay=o.weight_decay, eps=o.epsilon,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    slot.follower.lerp_(slot.value, o.follow)
    for copy, source in zip(slot.copies or (), (slot.value, slot.follower), strict=False):
        copy.copy_(source)


def _compiled(slot: Slot, gradient: Tensor, options: AdamW) -> bool:
    gradients = (None, gradient) if gradient.dtype == torch.bfloat16 else (gradient, None)
    own, copies = slot.addresses
    return call("adamw", own, *gradients, copies, options.compiled, slot.value.numel())


def _pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
