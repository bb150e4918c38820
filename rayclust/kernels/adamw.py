"""AdamW, the moving average of its result and copies of both for the next products, in one pass over memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayclust.kernels.native import call, library


class _Numbers(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in ("rate", "correction", "shrink", "fresh", "square_fresh", "epsilon", "follow")
    )


class _Addresses(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("value", "mean", "square", "follower", "left_value", "left_follower")),
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
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
    tiles: tuple[Tensor, Tensor] | None = None
    """Of a Float32 matrix: value and follower as `tile_head.to_left` orders them, kept up by the compiled pass."""

    @cached_property
    def compiled(self) -> _Addresses:
        """As the compiled pass wants it."""
        tensors = (self.value, self.mean, self.square, self.follower, *(self.tiles or (None, None)))
        rows, columns = self.value.shape if self.tiles is not None else (1, self.value.numel())
        return _Addresses(*(None if t is None else t.data_ptr() for t in tensors), rows, columns)


def adamw(slot: Slot, gradient: Tensor, options: AdamW) -> None:
    """Takes one step in place.

    Args:
        slot: the parameter.
        gradient: of the parameter's size and dtype or, for a slot with tiles, BFloat16.
        options: the step's numbers.
    """
    if slot.value.dtype == torch.float32 and library() is not None:
        narrow = gradient.dtype == torch.bfloat16
        call("adamw", options.compiled, slot.compiled, None if narrow else gradient, gradient if narrow else None)
        return
    torch._fused_adamw_(
        [slot.value], [gradient], [slot.mean], [slot.square], [], [torch.tensor(float(options.step))],
        lr=options.learning_rate, beta1=options.momentum, beta2=options.square_momentum,
        weight_decay=options.weight_decay, eps=options.epsilon, amsgrad=False, maximize=False,
    )  # fmt: skip
    slot.follower.lerp_(slot.value, options.follow)
