"""Axis letters and array aliases, used by every docstring.

N images or rows   B batch   D embedding width   K clusters   M neighbours   H heads   V nouns   C true classes

`Float[B D]` reads: floating dtype, axes B and D. `Float[]` is a scalar. Embeddings are stored float16
and computed float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayclust.errors import ShapeError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]

_SHORTEST, _LONGEST = 1e-15, 1e15


def require_matrix(x: Any, name: str, width: int | None = None) -> None:
    """Raise unless `x` is a matrix of the wanted width.

    Args:
        x: an array or tensor with `shape`.
        name: its name in the message.
        width: wanted size of the second axis; None allows any.

    Raises:
        ShapeError: `x` does not have two axes, or its second axis is not `width`.
    """
    shape = tuple(x.shape)
    if len(shape) != 2:
        raise ShapeError(f"{name} has shape {shape}: two axes are needed")
    if width is not None and shape[1] != width:
        raise ShapeError(f"{name} has width {shape[1]}: {width} is needed")


def unit_rows(rows: FloatArray) -> FloatArray:
    """Divide rows by their lengths; a zero row stays zero.

    Args:
        rows: Float[B D].

    Returns:
        Float[B D] of the same dtype.
    """
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    far = (lengths[:, 0] > _LONGEST) | (lengths[:, 0] < _SHORTEST)
    if far.any():  # their squares overflow or vanish: scale by the largest value first
        largest = np.abs(rows[far]).max(axis=1, keepdims=True, initial=0.0)
        rows = rows.copy()
        rows[far] /= np.where(largest > 0, largest, 1.0)
        lengths[far] = np.linalg.norm(rows[far], axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))
