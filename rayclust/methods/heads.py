"""Clustering heads: H small networks side by side, in one set of matrix products, and their moving-average teacher.

Head h is Linear → GELU → … → Linear(bottleneck) → unit rows → a weight-normalised linear layer without bias, so that
logit_c = g_c · ⟨ŵ_c, x̂⟩ and |logit_c| ≤ |g_c|. The parameters of all heads are stacked along axis H.

Source: arXiv 2303.17896, section 3.3; the layout of the projection head is arXiv 2104.14294's (DINO).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.distributed import all_reduce, differentiable_all_reduce
from rayclust.kernels.pair_softmax import accum_dtype
from rayclust.kernels.screening import has_fast_bf16
from rayclust.losses.information import LastLayer
from rayclust.methods.temi_settings import HeadShape, Precision

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


class Heads(nn.Module):
    """H heads with stacked parameters.

    Args:
        shape: sizes and parts.
        seed: of the initial weights; head h gets the same ones whatever H is.
        precision: of the matrix products in training; see `matmul_dtype`.
    """

    def __init__(self, shape: HeadShape, seed: int, precision: Precision = "auto") -> None:
        super().__init__()
        self.shape, self.precision = shape, precision
        pairs = list(zip(shape.widths, shape.widths[1:], strict=False))
        self.weights = nn.ParameterList(torch.empty(shape.heads, o, i) for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(shape.heads, o) for _, o in pairs)
        norms = [StackedNorm(shape.heads, shape.hidden) for _ in pairs[1:]] if shape.batch_norm else []
        self.norms = nn.ModuleList(norms)
        self.direction = nn.Parameter(torch.empty(shape.heads, shape.clusters, shape.bottleneck))
        self.scale = nn.Parameter(torch.ones(shape.heads, shape.clusters), requires_grad=shape.learn_scale)
        bound = 1.0 / math.sqrt(shape.bottleneck)
        with torch.no_grad():
            for head in range(shape.heads):
                generator = torch.Generator().manual_seed((seed * 1_000_003 + shape.first + head) % 2**63)
                for weight in self.weights:
                    nn.init.trunc_normal_(weight[head], std=0.02, a=-2.0, b=2.0, generator=generator)
                nn.init.uniform_(self.direction[head], -bound, bound, generator=generator)

    def forward(self, x: Tensor, training: bool = False, head: int | None = None) -> Tensor:
        """Return logits, before any temperature.

        Args:
            x: Float[R D].
            training: whether dropout drops and batch norm looks at the batch.
            head: the only head to evaluate; None evaluates all.

        Returns:
            Float[H R K], or Float[1 R K] for one head. Their dtype is that of the products.

        Raises:
            ShapeError: `x` is not a matrix of width D.
        """
        heads = slice(None) if head is None else slice(head, head + 1)
        bottleneck, dtype = self._bottleneck(x, training, heads)
        last = functional.normalize(self.direction[heads], dim=-1) * self.scale[heads, :, None]
        return stacked_affine(bottleneck, last, None, dtype)

    def last_layer(self, x: Tensor, temperature: float) -> LastLayer:
        """Return the inputs and weights of the training logits, which are not computed yet.

        Args:
            x: Float[V B D], all views.
            temperature: divides the logits.
        """
        bottleneck, dtype = self._bottleneck(x.flatten(0, 1), True, slice(None))
        units = bottleneck.view(len(bottleneck), len(x), -1, bottleneck.shape[2])
        return LastLayer(units, self.direction, self.scale, temperature, dtype)

    def _bottleneck(self, x: Tensor, training: bool, heads: slice) -> tuple[Tensor, torch.dtype]:
        """Return unit rows, Float[H R 256] in float32 or wider, and the dtype of the products."""
        require_matrix(x, "x", self.shape.dimension)
        dtype = matmul_dtype(self.precision, x) if training else x.dtype
        x = self.hidden(x, training, heads, dtype)
        x = stacked_affine(x, self.weights[-1][heads], self.biases[-1][heads], dtype)
        if self.shape.final_gelu:
            x = functional.gelu(x)
        return functional.normalize(x.to(accum_dtype(dtype)), dim=-1), dtype

    def hidden(
        self, x: Tensor, training: bool = False, heads: slice = slice(None), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Apply all layers before the bottleneck's: linear, batch norm if any, GELU, dropout if any.

        Returns:
            Float[H R 512] for Float[R D], in `dtype` or as the rows; where there are no such layers, the rows.
        """
        dtype = dtype or x.dtype
        for layer in range(len(self.weights) - 1):
            x = stacked_affine(x, self.weights[layer][heads], self.biases[layer][heads], dtype)
            if self.shape.batch_norm:
                x = self.norms[layer](x.to(accum_dtype(x.dtype)), training, heads).to(x.dtype)
            x = functional.gelu(x)
            if self.shape.dropout:
                x = functional.dropout(x, self.shape.dropout, training)
        return x


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
