"""Layers that methods share: products of stacked layers and their dtype, batch norm over workers, moving averages.

Layers of H heads are stacked along axis H, so that one matrix product serves all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.distributed import all_reduce, differentiable_all_reduce
from rayclust.kernels.screening import has_fast_bf16
from rayclust.methods.settings import Precision

NORM_MOMENTUM, NORM_EPSILON = 0.1, 1e-5
"""Of batch norm: weight of a batch in the running statistics, and what is added to variances; torch's own."""


def matmul_dtype(precision: Precision, x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products on `x` take in.

    `auto` is bf16 for float32 rows where the processor multiplies bf16 fast. Sums, softmax and losses stay in float32.
    """
    if precision == "bf16" or (precision == "auto" and x.dtype == torch.float32 and has_fast_bf16(x.device.type)):
        return torch.bfloat16
    return torch.float32 if precision == "fp32" and x.dtype != torch.float64 else x.dtype


def stacked_affine(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x·wᵀ + b for each head.

    Args:
        x: Float[R I], rows that all heads share, or Float[H R I], rows of each head.
        weight: Float[H O I].
        bias: Float[H O] or None.
        dtype: of the product's operands and of the result.

    Returns:
        Float[H R O] in `dtype`.
    """
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.dim() == 2:  # one wide product instead of H narrow ones
        wide = functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return wide.view(len(x), *weight.shape[:2]).transpose(0, 1)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias[:, None], x, weight.mT)


class StackedNorm(nn.Module):
    """Batch norm of each head's units, with the statistics of the rows of all workers.

    Args:
        heads: H.
        width: F.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(heads, width))
        self.biases = nn.Parameter(torch.zeros(heads, width))
        self.register_buffer("running_mean", torch.zeros(heads, width))
        self.register_buffer("running_var", torch.ones(heads, width))

    def forward(self, x: Tensor, training: bool, heads: slice = slice(None)) -> Tensor:
        """Normalise Float[H R F] of the heads picked by `heads`; training is for all of them."""
        mean, var = self.running_mean[heads], self.running_var[heads]
        if training:
            rows = all_reduce(torch.tensor(float(x.shape[1]), dtype=x.dtype, device=x.device))
            mean = differentiable_all_reduce(x.sum(1)) / rows
            var = differentiable_all_reduce((x - mean[:, None]).square().sum(1)) / rows
            with torch.no_grad():  # the running variance is the unbiased one
                self.running_mean.lerp_(mean, NORM_MOMENTUM)
                self.running_var.lerp_(var * rows / (rows - 1).clamp(min=1), NORM_MOMENTUM)
        scale = self.gains[heads] * torch.rsqrt(var + NORM_EPSILON)
        return x * scale[:, None] + (self.biases[heads] - mean * scale)[:, None]


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ_t ← m·θ_t + (1−m)·θ_s over all parameters; buffers stay the teacher's own.

    Args:
        teacher: changed in place.
        student: of the same class and sizes.
        momentum: m in [0, 1]; 1 leaves the teacher as it is.

    Source: arXiv 1703.01780, eq. 2.
    """
    if momentum < 1.0:
        students = [p.detach() for p in student.parameters()]
        torch._foreach_lerp_(list(teacher.parameters()), students, 1.0 - momentum)
