"""Three routes to the parts of the compression term and its gradient; see compression_rate.py for the formulas.

- `by_width`: all M_j as one product of Πᵀ with the rows' packed outer products; q and Σ_j Π_ij A_j⁻¹ as two more.
  Operations ∝ 3 n m d².
- `by_rows`, for few rows of great width: H_j = I + a_j √π_j √π_jᵀ ∘ ZZᵀ has A_j's determinant (Sylvester). With
  C_j = √π_j √π_jᵀ ∘ H_j⁻¹, Σ_j Π_ij A_j⁻¹ z_i = Σ_j Σ_k C_j,ik z_k and q_ij Π_ij = Σ_k C_j,ik ⟨z_i, z_k⟩.
  Operations ∝ m n³.
- `by_top`: the same for the largest entries of each column only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.losses.log_determinants import SMALL, TOGETHER, inverse_and_log_determinant, invert_rectangles
from rayclust.losses.outer_products import cells, fold, outer_products

LEAST_SHARE = 1e-30
"""Entries of Π count as at least this in H_j: q is a quotient by them."""


@dataclass(frozen=True)
class Groups:
    """What R_c is taken of."""

    z: Tensor
    """Float[n d]."""
    membership: Tensor
    """Float[n m], columns of Π."""
    scales: Tensor
    """Float[m], a_j."""
    wants: bool
    """Whether gradients are wanted."""


@dataclass(frozen=True)
class Found:
    """What value and gradient are made of."""

    logs: Tensor
    """Float[m], log|A_j|."""
    forms: Tensor
    """Float[n m], q_ij; zeros where gradients are not wanted."""
    pulls: Tensor
    """Float[n d], Σ_j Π_ij A_j⁻¹ z_i; zeros where gradients are not wanted."""

    @classmethod
    def empty(cls, groups: Groups) -> Found:
        """Zeros."""
        wanted = groups.membership if groups.wants else groups.membership[:0]
        return cls(torch.zeros_like(groups.scales), torch.zeros_like(wanted), torch.zeros_like(groups.z))


def prefers_rows(count: int, width: int) -> bool:
    """Whether n × n factorisations take fewer operations than d × d ones and the products around them."""
    return 2 * count**3 < 3 * count * width**2 + 2 * width**3


def by_width(groups: Groups, room: int, jitter: float) -> Found:
    """Exact, with d × d matrices.

    Args:
        groups: see there.
        room: numbers that working arrays may hold, about.
        jitter: added to diagonals.
    """
    found = Found.empty(groups)
    odd = groups.z.shape[1] % 2
    columns = functional.pad(groups.z, (0, odd)).T.contiguous()  # a row of zeros changes no determinant
    pulls = torch.zeros_like(columns)
    slabs = list(_slabs(columns, room // 2))
    kept = outer_products(columns, *slabs[0]) if len(slabs) == 1 else None
    for some in _slices(groups.membership.shape[1], room // 2 // (_WORK_CELLS * cells(len(columns)))):
        share = groups.membership[:, some]
        rectangles = share.new_empty(share.shape[1], len(columns) // 2, len(columns) + 1)
        for slab in slabs:
            products = outer_products(columns, *slab) if kept is None else kept
            torch.mm(share.T, products.T, out=_part(rectangles, slab))
        found.logs[some] = invert_rectangles(rectangles, groups.scales[some], jitter)
        for slab in slabs if groups.wants else ():
            products = outer_products(columns, *slab) if kept is None else kept
            part = _part(rectangles, slab).T
            found.forms[:, some].addmm_(products.T, part)
            fold(part @ share.T, columns, slab[0], pulls)
    found.pulls.add_(pulls.T[:, : groups.z.shape[1]], alpha=0.5)  # each pair was counted from both its ends
    return found


_CACHED = 1 << 23
"""Numbers of large matrices worked on at once, where memory would allow more."""
_WORK_CELLS = 4
"""Numbers held for each number of a rectangle while it is inverted, about."""


def _slabs(columns: Tensor, room: int) -> Iterator[tuple[int, int]]:
    """Stretches of the rectangles' rows whose outer products, twice over, fit into the room."""
    width, count = columns.shape
    for some in _slices(width // 2, room // (2 * count * (width + 1))):
        yield some.start, some.stop


def _part(rectangles: Tensor, slab: tuple[int, int]) -> Tensor:
    """Float[C cells], of the slab's rows."""
    return rectangles.flatten(1)[:, slab[0] * rectangles.shape[2] : slab[1] * rectangles.shape[2]]


def _slices(count: int, size: int) -> Iterator[slice]:
    """Stretches of at most `size`, at least 1."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def by_rows(groups: Groups, room: int, jitter: float) -> Found:
    """Exact, with n × n matrices; arguments as in `by_width`."""
    found = Found.empty(groups)
    gram = groups.z @ groups.z.T
    pairs = torch.zeros_like(gram)
    for some in _slices(groups.membership.shape[1], min(room // (_WORK_CELLS * gram.numel()), _most(len(gram)))):
        share = groups.membership[:, some].T.clamp(min=LEAST_SHARE)
        found.logs[some], coupling = _couplings(gram, share, groups.scales[some], jitter)
        if groups.wants:
            pairs += coupling.sum(0)
            found.forms[:, some] = (torch.einsum("jik,ik->ji", coupling, gram) / share).T
    if groups.wants:
        torch.mm(pairs, groups.z, out=found.pulls)
    return found


def by_top(groups: Groups, top: int, room: int, jitter: float) -> Found:
    """With the `top` largest entries of each column, the others taken as zeros in M_j and kept in t_j."""
    found = Found.empty(groups)
    shares, rows = groups.membership.topk(top, dim=0)
    each = _WORK_CELLS * top * top + 2 * top * groups.z.shape[1]
    for some in _slices(shares.shape[1], min(room // each, _most(top))):
        share, chosen = shares[:, some].T.clamp(min=LEAST_SHARE), rows[:, some].T
        z = groups.z[chosen]
        gram = torch.bmm(z, z.mT)
        found.logs[some], coupling = _couplings(gram, share, groups.scales[some], jitter)
        if groups.wants:
            found.forms[:, some].scatter_(0, chosen.T, ((coupling * gram).sum(2) / share).T)
            found.pulls.index_add_(0, chosen.flatten(), torch.bmm(coupling, z).flatten(0, 1))
    return found


def _most(width: int) -> int:
    """Matrices at once: few enough to stay in a cache, where that leaves some."""
    return TOGETHER if width <= SMALL else max(1, _CACHED // width**2)


def _couplings(gram: Tensor, share: Tensor, scales: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """log|H_j| and C_j: Float[C] and Float[C m m], from Float[m m] or Float[C m m], Float[C m] and Float[C]."""
    roots = share.sqrt()
    outer = roots[:, :, None] * roots[:, None, :]
    matrices = outer * gram
    matrices.mul_(scales[:, None, None]).diagonal(dim1=1, dim2=2).add_(1.0 + jitter)
    inverse, logs = inverse_and_log_determinant(matrices)
    return logs, inverse.mul_(outer)
