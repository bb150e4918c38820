"""Weight-normalised last layers for matrix products: rows of a given length, and the way back to directions and g.

On a GPU triton_weight_norm.py takes the place of the passes here: one sweep over memory each way.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

SHORTEST = 1e-12
"""Lengths are not divided by less."""


def scaled_rows(direction: Tensor, scale: Tensor, factor: float, out: Tensor) -> Tensor:
    """Each direction at the length scale·factor.

    Args:
        direction: Wide[H K I], of any length.
        scale: Wide[H K].
        factor: on all lengths.
        out: Narrow[H P I], P at least K; written, with zeros behind the last row.

    Returns:
        `out`.
    """
    fused = _fused(direction)
    if fused is not None:
        fused.scaled_rows(direction, scale, factor, out)
        return out
    clusters = direction.shape[1]
    out[:, :clusters] = direction * (scale * factor / _lengths(direction))[..., None]
    out[:, clusters:] = 0
    return out


def scaled_rows_backward(slopes: Tensor, direction: Tensor, scale: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The gradient in direction and scale, from that in the rows that `scaled_rows` made.

    Args:
        slopes: Narrow or Wide[H P I]; rows behind the last cluster play no part.
        direction: Wide[H K I].
        scale: Wide[H K].
        factor: as given to `scaled_rows`.

    Returns:
        Wide[H K I] and Wide[H K].
    """
    fused = _fused(direction)
    if fused is not None:
        found: tuple[Tensor, Tensor] = fused.scaled_rows_backward(slopes, direction, scale, factor)
        return found
    lengths = _lengths(direction)
    unit, slopes = direction / lengths[..., None], slopes[:, : direction.shape[1]].to(direction.dtype)
    cosine = (unit * slopes).sum(-1)
    return (slopes - unit * cosine[..., None]) * (scale * factor / lengths)[..., None], cosine * factor


def _lengths(direction: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(direction, dim=-1).clamp_(min=SHORTEST)
    return lengths


def _fused(x: Tensor) -> ModuleType | None:
    """The kernels, for float32 on a GPU."""
    return _kernels() if x.is_cuda and x.dtype == torch.float32 else None


@lru_cache
def _kernels() -> ModuleType | None:
    try:
        from rayclust.kernels import triton_weight_norm
    except ImportError:  # torch without Triton
        return None
    return triton_weight_norm
