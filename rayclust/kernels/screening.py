"""Largest inner products of float32 rows: bf16 products screen the pairs, and the few that may be largest are exact.

Beside them stand the dtypes of fast products and of sums.

Processors with bf16 units multiply bf16 some ten times as fast as float32. Rounding a row x to x̂ moves its product with
y by at most |x − x̂||y| + |x̂||y − ŷ|, so that a pair whose rounded product lies further than that below a bound that the
exact ones must reach is not among them. All others are multiplied again in float32: the result is that of float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

GROUP = 16
"""Columns whose largest product is compared first: one comparison discards nearly all groups."""
MIN_COLUMNS = 512
"""Least number of rows to screen, with fewer a float32 product takes no longer; rows are padded to a multiple."""
_ROUNDING = 2.0**-8
"""Largest relative error of rounding to bf16."""
_SCORES_AT_ONCE = 2**22
"""Products that are made before their maxima are taken: they stay in the processor's cache."""
_MAX_SHARE = 0.5
"""Part of the groups that may reach their bound."""


@lru_cache
def has_fast_bf16(device_type: str) -> bool:
    """Return whether matrix products of bf16 are much faster on that kind of device than those of float32."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Without tiles, AVX-512's own bf16 products still take about half the time of float32's.
    return device_type == "cpu" and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over values of a dtype are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class RoundedRows:
    """Rows rounded to bf16, and how far that moved them."""

    values: Tensor
    """BFloat16[N' D]; N' is N, or the next multiple of `MIN_COLUMNS`: odd numbers of maxima take four times as long."""
    count: int
    """N."""
    error: Tensor
    """Float32[N], |x − x̂|."""
    length: Tensor
    """Float32[N], |x|."""
    largest_exact: float = 0.0
    """Largest sum of a row's exact columns, in absolute value."""

    @classmethod
    def of(cls, x: Tensor, exact: Tensor | None = None, *, padded: bool = True) -> RoundedRows:
        """Round rows.

        Args:
            x: Float32[N D].
            exact: BFloat16[N E], columns behind them that need no rounding.
            padded: whether `values` is padded, as `screen` needs of the rows, not of the queries; N is then at least
                `MIN_COLUMNS`.
        """
        values = x.bfloat16()
        error = torch.linalg.vector_norm(x - values, dim=1)
        values = values if exact is None else torch.cat([values, exact], dim=1)
        padding = -len(x) % MIN_COLUMNS if padded else 0
        if padding:
            # A copy in the group of its original changes no group's maximum.
            copied = torch.arange(len(x), len(x) + padding) % ((len(x) + padding) // GROUP)
            values = torch.cat([values, values[copied]])
        largest = 0.0 if exact is None else float(exact.float().sum(1).abs().max())
        return cls(values, len(x), error, torch.linalg.vector_norm(x, dim=1), largest)


def screen(
    queries: RoundedRows, rows: RoundedRows, k: int, floor: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return pairs of a query and a row, among which are those with each query's k largest products.

    Args:
        queries: on the CPU, not padded.
        rows: on the CPU, padded; at least `GROUP`·k.
        k: how many are wanted of each query.
        floor: Float32[B], products that they must reach; None: the k largest of these rows are wanted.

    Returns:
        Int64[P] queries in order and Int64[P] rows; None where so many pairs stay that float32 products of all are
        faster.
    """
    (B, width), columns = queries.values.shape, len(rows.values)
    groups = columns // GROUP
    scores, maxima = (queries.values.new_empty((B, wide)) for wide in (columns, groups))
    parts = -(-B * columns // _SCORES_AT_ONCE)
    for x, some, largest in zip(*(each.tensor_split(parts) for each in (queries.values, scores, maxima)), strict=True):
        torch.mm(x, rows.values.T, out=some)
        torch.amax(some.view(len(some), GROUP, groups), 1, out=largest)
    # 1. What rounding moves a query's products by, at most; the last term is that of float32 sums.
    longest = float(rows.length.max())
    length = queries.length + queries.error
    summed = 2 * width * 2.0**-24 * (length * longest + queries.largest_exact * rows.largest_exact)
    moved = queries.error * longest + length * float(rows.error.max()) + summed
    if floor is None:
        reached = (maxima.amax(1) if k == 1 else maxima.topk(k, dim=1)[0][:, -1]).float()
        floor = reached - _ROUNDING * reached.abs() - moved
    # Rounding keeps the order: a product that reaches the bound does so after both are rounded.
    bound = (floor - moved).bfloat16()
    # 2. Groups with a product that reaches the bound, and these products.
    found = torch.from_numpy(np.flatnonzero((maxima >= bound[:, None]).numpy()))
    if len(found) > _MAX_SHARE * maxima.numel():
        return None
    query = found // groups
    column = (found - query * groups)[:, None] + groups * torch.arange(GROUP)
    members = scores.view(-1)[query[:, None] * columns + column]
    reach = (members >= bound[query][:, None]) & (column < rows.count)
    return query[:, None].expand(-1, GROUP)[reach], column[reach]


def pair_products(queries: Tensor, rows: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """Return Float32[P] products of pairs of a query and a row; equal rows have equal products.

    Args:
        queries: Float32[B D], on the CPU.
        rows: Float32[N D], on the CPU.
        query: Int64[P], in order.
        row: Int64[P].
    """
    bounds = torch.searchsorted(query, torch.arange(len(queries) + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # beta state, checks that are off
        pairs = torch.sparse_csr_tensor(bounds, row, torch.zeros(len(row)), (len(queries), len(rows)))
    products: Tensor = torch.sparse.sampled_addmm(pairs, queries, rows.T, beta=0.0).values()
    return products
