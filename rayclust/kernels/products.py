"""Matrix products that share one side."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class Shared:
    """A matrix that stands on the right of many products; oneDNN brings it into its own order once, where it can.

    Args:
        x: Narrow[O I], contiguous, on the CPU; only bf16 has an order of its own.
        rows: how many rows the left-hand sides will have.
    """

    def __init__(self, x: Tensor, rows: int) -> None:
        self._x = x
        self._packed: Tensor | None = None
        if x.dtype == torch.bfloat16 and _packs():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(x, rows)

    def product(self, left: Tensor) -> Tensor:
        """The product left · xᵀ, Narrow[L I] to Narrow[L O]."""
        if self._packed is None:
            return functional.linear(left, self._x)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, self._packed, None, "none", [], "")
        return result


def _packs() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
