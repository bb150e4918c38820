"""Clustering heads: H small networks side by side, in one set of matrix products.

Head h is Linear → GELU → … → Linear(bottleneck) → unit rows → a weight-normalised linear layer without bias, so that
logit_c = g_c · ⟨ŵ_c, x̂⟩ and |logit_c| ≤ |g_c|. The parameters of all heads are stacked along axis H.

Source: arXiv 2303.17896, section 3.3; the layout of the projection head is arXiv 2104.14294's (DINO).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.collectives import Team, all_sum, differentiable_sum
from rayclust.kernels.divided_softmax import ALONE
from rayclust.losses.chunked import LastLayer

Precision = Literal["auto", "fp32", "bf16"]
_DRAWN = 1 << 16
"""Clusters of other workers that are drawn at once."""


@dataclass(frozen=True)
class HeadShape:
    """Sizes and parts of H equal heads."""

    heads: int
    """H."""
    dimension: int
    """D, the width of the rows that come in."""
    clusters: int
    """K, the logits that come out."""
    hidden: int = 512
    """Width of the hidden layers."""
    bottleneck: int = 256
    """Width of the unit rows before the last layer."""
    layers: int = 2
    """Linear layers before the last one, at least 1; 1 is a single map to the bottleneck."""
    batch_norm: bool = False
    """Whether hidden layers are batch-normalised."""
    dropout: float = 0.0
    """Share of hidden units dropped in training."""
    final_gelu: bool = False
    """Whether a GELU follows the bottleneck."""
    learn_scale: bool = True
    """Whether g is learnt; otherwise it stays 1."""
    first: int = 0
    """Number of the first head, where other workers hold those before it."""
    first_cluster: int = 0
    """Number of the first cluster, where other workers hold those before it."""
    all_clusters: int | None = None
    """Clusters of all workers that divide them; None: K are all."""

    @property
    def widths(self) -> list[int]:
        """Input and output widths of the layers before the last."""
        return [self.dimension, *[self.hidden] * (self.layers - 1), self.bottleneck]


@lru_cache
def _has_fast_bf16(device_type: str) -> bool:
    """Whether matrix products of bf16 are much faster there than those of float32."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Without tiles, AVX-512's own bf16 products still take about half the time of float32's.
    return device_type == "cpu" and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def matmul_dtype(precision: Precision, x: Tensor) -> torch.dtype:
    """The dtype that matrix products on `x` take in.

    `auto` is bf16 for float32 rows where the processor multiplies bf16 fast. Sums, softmax and losses stay in float32.
    """
    if precision == "bf16" or (precision == "auto" and x.dtype == torch.float32 and _has_fast_bf16(x.device.type)):
        return torch.bfloat16
    return torch.float32 if precision == "fp32" and x.dtype != torch.float64 else x.dtype


def stacked_affine(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x·wᵀ + b for each head.

    Args:
        x: Float[R I], rows that all heads share, or Float[H R I], rows of each head.
        weight: Float[H O I].
        bias: Float[H O] or None.
        dtype: what the product takes in and gives out.

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
    """Batch norm of each head's units, with the statistics of the rows of all workers."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, heads: int, width: int, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.gains = nn.Parameter(torch.ones(heads, width))
        self.biases = nn.Parameter(torch.zeros(heads, width))
        self.register_buffer("running_mean", torch.zeros(heads, width))
        self.register_buffer("running_var", torch.ones(heads, width))

    def forward(self, x: Tensor, training: bool, some: slice = slice(None)) -> Tensor:
        """Float[H R F] to Float[H R F], of the heads that `some` picks; training is for all of them."""
        mean, var = self._batch_moments(x) if training else (self.running_mean[some], self.running_var[some])
        scale = self.gains[some] * torch.rsqrt(var + self.epsilon)
        return x * scale[:, None] + (self.biases[some] - mean * scale)[:, None]

    def _batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = all_sum(torch.tensor(float(x.shape[1]), dtype=x.dtype, device=x.device))
        mean = differentiable_sum(x.sum(1)) / rows
        var = differentiable_sum((x - mean[:, None]).square().sum(1)) / rows
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * rows / (rows - 1).clamp(min=1), self.momentum)
        return mean, var


class Heads(nn.Module):
    """H heads with stacked parameters.

    Args:
        shape: sizes and parts.
        seed: of the initial weights; head h gets the same ones whatever H is, and cluster k those of a whole head.
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
        self._reset(seed)

    @torch.no_grad()
    def _reset(self, seed: int) -> None:
        bound = 1.0 / math.sqrt(self.shape.bottleneck)
        for head in range(self.shape.heads):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.shape.first + head) % 2**63)
            for weight in self.weights:
                nn.init.trunc_normal_(weight[head], std=0.02, a=-2.0, b=2.0, generator=generator)
            # The clusters before this worker's are drawn only to be passed over, and need not be there at one time.
            for start in range(0, self.shape.first_cluster, _DRAWN):
                passed = min(_DRAWN, self.shape.first_cluster - start)
                torch.empty(passed, self.shape.bottleneck).uniform_(generator=generator)
            nn.init.uniform_(self.direction[head], -bound, bound, generator=generator)

    def forward(self, x: Tensor, training: bool = False, head: int | None = None, stack: Team = ALONE) -> Tensor:
        """Logits, before any temperature.

        Args:
            x: Float[R D].
            training: whether dropout drops and batch norm looks at the batch.
            head: the only head to ask; None asks all.
            stack: those who divide the clusters, whose gradients in what comes before the last layer are summed.

        Returns:
            Float[H R K], or Float[1 R K] for one head. Their dtype is that of the products.

        Raises:
            ShapeError: `x` is not a matrix of width D.
        """
        require_matrix(x, "x", self.shape.dimension)
        some = slice(None) if head is None else slice(head, head + 1)
        dtype = matmul_dtype(self.precision, x) if training else x.dtype
        bottleneck = stack.spread(self._bottleneck(x, training, some, dtype))
        return stacked_affine(bottleneck, self._last_weights(some), None, dtype)

    def last_layer(self, x: Tensor, temperature: float, stack: Team = ALONE) -> LastLayer:
        """What makes the logits of pairs in training, Float[2 B D], over a temperature, before they are made.

        `stack` is as in `forward`.
        """
        stacked = x.flatten(0, 1)
        require_matrix(stacked, "x", self.shape.dimension)
        dtype = matmul_dtype(self.precision, stacked)
        units = stack.spread(self._bottleneck(stacked, True, slice(None), dtype))
        pairs = units.view(len(units), 2, -1, units.shape[2])
        most = -(-(self.shape.all_clusters or self.shape.clusters) // stack.size)
        return LastLayer(pairs, self.direction, self.scale, temperature, dtype, stack, most)

    def bottleneck(self, x: Tensor) -> Tensor:
        """The unit rows before the last layer: Float[R D] to Float[H R 256]."""
        return self._bottleneck(x, False, slice(None), x.dtype)

    def hidden(self, x: Tensor) -> Tensor:
        """What goes into the bottleneck's linear layer: Float[R D] to Float[H R 512]; for one layer the rows."""
        if len(self.weights) == 1:
            return x.expand(self.shape.heads, *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights[:-1], self.biases[:-1], strict=True)):
            x = self._activate(stacked_affine(x, weight, bias, x.dtype), i, False, slice(None))
        return x

    def _bottleneck(self, x: Tensor, training: bool, some: slice, dtype: torch.dtype) -> Tensor:
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = stacked_affine(x, weight[some], bias[some], dtype)
            if i < last:
                x = self._activate(x, i, training, some)
        if self.shape.final_gelu:
            x = functional.gelu(x)
        return functional.normalize(x if dtype == torch.float64 else x.float(), dim=-1)

    def _activate(self, x: Tensor, layer: int, training: bool, some: slice) -> Tensor:
        if self.shape.batch_norm:
            wide = x if x.dtype == torch.float64 else x.float()
            x = self.norms[layer](wide, training, some).to(x.dtype)
        x = functional.gelu(x)
        return functional.dropout(x, self.shape.dropout, training) if self.shape.dropout else x

    def _last_weights(self, some: slice) -> Tensor:
        """Float[H K 256]: rows of length |g_c|."""
        direction = functional.normalize(self.direction[some], dim=-1)
        return direction * self.scale[some, :, None]

    def is_decayed(self, name: str) -> bool:
        """Whether weight decay acts on a parameter: on matrices and on g (as published), not on biases and norms."""
        return not name.startswith(("biases.", "norms."))
