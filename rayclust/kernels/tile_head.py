"""One clustering head forward and back on the processor's matrix tiles: what head.c does, called from Python.

Tiles take a product's left and right side in orders of their own, LEFT and RIGHT (tiles.h). Sizes that are multiples of
SIDE need no padding; the batch and the clusters are padded here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rayclust.kernels.native import call

SIDE = 32
"""Rows and columns of a block of tiles."""
_ALIGNED = 64


def padded(count: int) -> int:
    """The next multiple of SIDE."""
    return -(-count // SIDE) * SIDE


class _Held(ctypes.Structure):
    """A structure whose pointers come from tensors, which it keeps alive."""

    @classmethod
    def of(cls, *values: Tensor | float) -> Self:
        made = cls(*(value.data_ptr() if isinstance(value, Tensor) else value for value in values))
        made.held = values
        return made


def _pointers(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


class Shape(ctypes.Structure):
    """Sizes of a head and its batch: D, hidden, bottleneck, K, K padded, columns, B."""

    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("dimension", "hidden", "bottleneck", "clusters", "height", "columns", "rows")
    )


class Net(_Held):
    """Parameters: both matrices LEFT; biases, direction and scale Float32."""

    _fields_ = _pointers("first", "second", "first_bias", "second_bias", "direction", "scale")


class Inputs(_Held):
    """A batch, RIGHT (D R) and RIGHT (R D)."""

    _fields_ = _pointers("columns", "rows")


class Lesson(_Held):
    """What a student learns from: the teacher's logits and their log-sum-exp, ln p̂, weights; β, scale, bounds."""

    _fields_ = (
        *_pointers("teacher", "normalizer", "log_marginal", "weights"),
        *((name, ctypes.c_float) for name in ("beta", "scale", "bound", "teacher_bound")),
    )


class Gradients(_Held):
    """Where gradients go: BFloat16 of both matrices, Float32 of the rest, in the order of `Net`."""

    _fields_ = _pointers("first", "second", "first_bias", "second_bias", "direction", "scale")


@dataclass(frozen=True)
class Taught:
    """What a teacher tells."""

    logits: Tensor
    """BFloat16[K·R], both padded, RIGHT."""
    normalizer: Tensor
    """Float32[R], log-sum-exp of each column."""
    sums: Tensor
    """Float32[K], probabilities summed over rows and views."""
    agreement: Tensor
    """Float32[R/2], the probability that a row's views fall into one cluster."""


def room(shape: Shape) -> Tensor:
    """Memory that one thread works in."""
    size = call("room_size", shape)
    memory = torch.empty(size + _ALIGNED, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _ALIGNED :]


def teach(shape: Shape, net: Net, inputs: Inputs, memory: Tensor, out: Taught, factor: float, bound: float) -> None:
    """A teacher forward; its logits times `factor`, none above `bound`, and what the loss needs to know of them."""
    results = (out.logits, out.normalizer, out.sums, out.agreement)
    call("teach", shape, net, inputs, memory, *results, float(factor), float(bound))


def learn(
    shape: Shape,
    net: Net,
    inputs: Inputs,
    memory: Tensor,
    lesson: Lesson,
    out: tuple[Tensor, Gradients],
    factor: float,
    last_learns: bool,
) -> None:
    """A student forward and back; its loss times the lesson's scale, Float32[1], and its gradients.

    Source: arXiv 2303.17896, eq. 8; d(−PMI)/dz = β·(softmax(z) − softmax(β(z + z_t) − ln p̂)).
    """
    call("learn", shape, net, inputs, memory, lesson, *out, float(factor), int(last_learns))


def to_left(x: Tensor) -> Tensor:
    """A matrix Float32[M K], contiguous, as a product's left side: BFloat16[M·K]."""
    out = torch.empty(x.numel(), dtype=torch.bfloat16)
    call("to_left", x, out, *x.shape)
    return out


def to_right(x: Tensor, out: Tensor, transposed: bool) -> None:
    """A matrix BFloat16[K N], contiguous, or its transpose, as a product's right side in `out`."""
    call("to_columns" if transposed else "to_right_rows", x, out, *x.shape)
