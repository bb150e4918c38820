"""Rate reduction: the coding rate of all rows, and the compression rate of soft groups, with its gradient.

    L = −R(Z) + γ R_c(Z, Π) + (λ/2) ‖Π‖_F²

    R_c = Σ_j t_j/(2n) · log|A_j|,   A_j = I + a_j M_j,   a_j = d/(t_j ε²),   M_j = Zᵀ diag(π_j) Z,   t_j = Σ_i Π_ij

    ∂R_c/∂z_i  = 2κ Σ_j Π_ij A_j⁻¹ z_i                      κ = d/(2nε²)
    ∂R_c/∂Π_ij = κ q_ij + (log|A_j| − a_j Σ_i Π_ij q_ij)/(2n),   q_ij = z_iᵀ A_j⁻¹ z_i

The last bracket is the derivative through t_j: tr(A_j⁻¹ a_j M_j) = a_j Σ_i Π_ij q_ij. R_c is exact, its gradient is
computed together with its value, and nothing of size n × d × n is ever held. There are three routes to log|A_j|, q and
Σ_j Π_ij A_j⁻¹ z_i:

- by width, with d × d matrices: all M_j are one product of Πᵀ with the rows' packed outer products; q and
  Σ_j Π_ij A_j⁻¹ are two more. Operations ∝ 3 n m d².
- by rows, for few rows of great width: H_j = I + a_j √π_j √π_jᵀ ∘ ZZᵀ has A_j's determinant (Sylvester). With
  C_j = √π_j √π_jᵀ ∘ H_j⁻¹, Σ_j Π_ij A_j⁻¹ z_i = Σ_j Σ_k C_j,ik z_k and q_ij Π_ij = Σ_k C_j,ik ⟨z_i, z_k⟩.
  Operations ∝ m n³.
- by top: by rows, for the largest entries of each column of Π only.

Source: arXiv 2306.05272 (the loss, each column of Π as a group), arXiv 2006.08558 (the rates).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.errors import ShapeError
from rayclust.kernels.screening import accum_dtype

GROUP_OFFSET = 1e-8
"""Added to every t_j, as published."""
JITTERS = (0.0, 1e-5, 1e-4)
"""Added to the diagonals that are factorised, whose eigenvalues are at least 1: nothing, and where Cholesky breaks down
in float32 all the same, the next."""
MIN_SHARE = 1e-30
"""Entries of Π count as at least this in H_j: q is a quotient by them."""
LEAF_WIDTH = 32
"""Width up to which matrices are factorised by Cholesky; wider ones are halved."""
CACHED_MATRICES, CACHED_WIDTH = 64, 256
"""Matrices inverted at once, so that they stay in a processor's cache, up to this width of theirs."""
CACHED_NUMBERS = 1 << 23
"""Numbers of wider matrices inverted at once, where memory would allow more."""
WORK_FACTOR = 4
"""Numbers held for each number of a matrix while it is inverted, about."""


@dataclass(frozen=True)
class CompressionOptions:
    """Memory and truncation of the compression rate."""

    memory: int = 1 << 30
    """Bytes that working arrays may take, about."""
    top: int | None = None
    """Largest entries kept of each column of Π; None keeps all, which is exact."""
    max_truncated: float = 1e-3
    """Share of Π's mass that `top` may leave out; where it would leave out more, all entries are kept."""


def coding_rate(z: Tensor, distortion: float) -> Tensor:
    """Return R(Z) = ½ log|I + d/(nε²) ZᵀZ|, half the log-volume that the rows fill at a given distortion.

    Args:
        z: Float[n d], unit rows, already gathered across workers; taken in float32 or wider.
        distortion: squared error allowed per row, ε², in squared row lengths; above 0.

    Returns:
        Float[], nats; 0 when every row is zero, at most (d/2) ln(1 + 1/ε²) for unit rows.

    Raises:
        ShapeError: `z` does not have two axes.

    Source: arXiv 2006.08558, R(Z, ε), with `distortion` = ε².
    """
    require_matrix(z, "z")
    z = z.to(accum_dtype(z.dtype))
    count, width = z.shape
    if count < width:  # ZZᵀ has the same determinant
        z = z.T
    moments = z.T @ z
    moments = torch.eye(len(moments), dtype=z.dtype, device=z.device) + width / (count * distortion) * moments
    factor: Tensor = torch.linalg.cholesky(moments)
    return factor.diagonal().log().sum()


def membership_energy(membership: Tensor) -> Tensor:
    """Return ½ ‖Π‖_F²: n/2 where every row belongs to one column, ½ where all belong to all alike.

    Args:
        membership: Float[n m], columns of Π; the sum over workers' columns is that of the whole.

    Returns:
        Float[]; for doubly stochastic Π in [½, n/2].
    """
    return 0.5 * membership.square().sum()


def compression_rate(
    z: Tensor, membership: Tensor, distortion: float, options: CompressionOptions | None = None
) -> Tensor:
    """Return R_c(Z, Π), the rate of the rows when every column of Π is a group.

    Args:
        z: Float[n d], unit rows, already gathered across workers.
        membership: Float[n m] ≥ 0, columns of Π; a worker's share of them gives its share of the sum.
        distortion: squared error allowed per row, ε², in squared row lengths; above 0.
        options: memory and truncation; None is exact in a gibibyte.

    Returns:
        Float[], nats, not below 0; differentiable once in `z` and `membership`.

    Raises:
        ShapeError: the two are not matrices with the same number of rows.
    """
    require_matrix(z, "z")
    require_matrix(membership, "membership")
    if len(z) != len(membership):
        raise ShapeError(f"membership has {len(membership)} rows: {len(z)} are needed, one for each row of z")
    result: Tensor = _CompressionRate.apply(z, membership, distortion, options or CompressionOptions())
    return result


class _CompressionRate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, membership: Tensor, distortion: float, options: CompressionOptions) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        z, membership = z.detach(), membership.detach()
        count, width = z.shape
        sums = membership.sum(0) + GROUP_OFFSET  # t
        groups = Groups(z, membership, width / (distortion * sums), with_gradient)
        # 1. The route: that of fewest operations, or by the largest entries alone where they hold enough of Π's mass.
        route = by_rows if 2 * count**3 < 3 * count * width**2 + 2 * width**3 else by_width
        if options.top is not None:
            top = min(options.top, count)
            truncated = 1.0 - membership.topk(top, dim=0).values.sum() / membership.sum()
            if float(truncated) <= options.max_truncated:
                route = partial(by_top, top)
        # 2. The terms, with more on the diagonals where Cholesky breaks down.
        workspace = options.memory // z.element_size()
        for jitter in JITTERS:
            terms = route(groups, workspace, jitter)
            if bool(terms.logs.isfinite().all()):
                break
        # 3. The gradient, kept until backward.
        if with_gradient:
            kappa = width / (2.0 * count * distortion)
            through_sums = terms.logs - groups.scales * (membership * terms.forms).sum(0)
            by_membership = terms.forms.mul_(kappa).add_(through_sums / (2.0 * count))
            ctx.save_for_backward(terms.pulls.mul_(2.0 * kappa), by_membership)
        return sums @ terms.logs / (2.0 * count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_z, by_membership = ctx.saved_tensors
        return grad * by_z, grad * by_membership, None, None


@dataclass(frozen=True)
class Groups:
    """Inputs of the routes."""

    z: Tensor
    """Float[n d]."""
    membership: Tensor
    """Float[n m], columns of Π."""
    scales: Tensor
    """Float[m], a_j."""
    with_gradient: bool
    """Whether the terms of the gradient are wanted."""


class Terms:
    """Terms of the value and the gradient, zeros at first."""

    def __init__(self, groups: Groups) -> None:
        self.logs = torch.zeros_like(groups.scales)
        """Float[m], log|A_j|."""
        self.forms = torch.zeros_like(groups.membership if groups.with_gradient else groups.membership[:0])
        """Float[n m], q_ij; empty without gradient."""
        self.pulls = torch.zeros_like(groups.z)
        """Float[n d], Σ_j Π_ij A_j⁻¹ z_i; zeros without gradient."""


def by_width(groups: Groups, workspace: int, jitter: float) -> Terms:
    """Compute the terms exactly, with d × d matrices.

    Args:
        groups: rows, memberships and factors.
        workspace: numbers that working arrays may hold, about.
        jitter: added to diagonals.
    """
    terms = Terms(groups)
    columns = functional.pad(groups.z, (0, groups.z.shape[1] % 2)).T.contiguous()  # zeros change no determinant
    width, count = columns.shape
    half, row = width // 2, width + 1  # of a rectangle
    pulls = torch.zeros_like(columns)
    # Outer products of all rows, twice over, take half of the workspace: they come in slabs of the rectangles' rows.
    slabs = list(_slices(half, workspace // 2 // (2 * count * row)))
    kept = outer_products(columns, slabs[0]) if len(slabs) == 1 else None
    for some in _slices(groups.membership.shape[1], workspace // 2 // (WORK_FACTOR * half * row)):
        share = groups.membership[:, some]
        rectangles = share.new_empty(share.shape[1], half, row)
        parts = [rectangles.flatten(1)[:, slab.start * row : slab.stop * row] for slab in slabs]
        for slab, part in zip(slabs, parts, strict=True):
            products = outer_products(columns, slab) if kept is None else kept
            torch.mm(share.T, products.T, out=part)  # M_j
        terms.logs[some] = invert_rectangles(rectangles, groups.scales[some], jitter)
        for slab, part in zip(slabs, parts, strict=True) if groups.with_gradient else ():
            products = outer_products(columns, slab) if kept is None else kept
            terms.forms[:, some].addmm_(products.T, part.T)
            outer_products_backward(part.T @ share.T, columns, slab, pulls)
    terms.pulls.add_(pulls.T[:, : groups.z.shape[1]], alpha=0.5)  # each pair was counted from both its ends
    return terms


def by_rows(groups: Groups, workspace: int, jitter: float) -> Terms:
    """Compute the terms exactly, with n × n matrices; arguments as in `by_width`."""
    terms = Terms(groups)
    gram = groups.z @ groups.z.T
    pairs = torch.zeros_like(gram)
    for some in _slices(groups.membership.shape[1], workspace // (WORK_FACTOR * gram.numel()), len(gram)):
        share = groups.membership[:, some].T.clamp(min=MIN_SHARE)
        terms.logs[some], coupling = _couplings(gram, share, groups.scales[some], jitter)
        if groups.with_gradient:
            pairs += coupling.sum(0)
            terms.forms[:, some] = (torch.einsum("jik,ik->ji", coupling, gram) / share).T
    if groups.with_gradient:
        torch.mm(pairs, groups.z, out=terms.pulls)
    return terms


def by_top(top: int, groups: Groups, workspace: int, jitter: float) -> Terms:
    """Compute the terms of the `top` largest entries of each column, the others as zeros in M_j but not in t_j."""
    terms = Terms(groups)
    shares, rows = groups.membership.topk(top, dim=0)
    each = WORK_FACTOR * top * top + 2 * top * groups.z.shape[1]
    for some in _slices(shares.shape[1], workspace // each, top):
        share, chosen = shares[:, some].T.clamp(min=MIN_SHARE), rows[:, some].T
        z = groups.z[chosen]
        gram = torch.bmm(z, z.mT)
        terms.logs[some], coupling = _couplings(gram, share, groups.scales[some], jitter)
        if groups.with_gradient:
            terms.forms[:, some].scatter_(0, chosen.T, ((coupling * gram).sum(2) / share).T)
            terms.pulls.index_add_(0, chosen.flatten(), torch.bmm(coupling, z).flatten(0, 1))
    return terms


def _couplings(gram: Tensor, share: Tensor, scales: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Return log|H_j| and C_j: Float[C] and Float[C m m], from Float[m m] or Float[C m m], Float[C m] and Float[C]."""
    roots = share.sqrt()
    outer = roots[:, :, None] * roots[:, None, :]
    matrices = outer * gram
    matrices.mul_(scales[:, None, None]).diagonal(dim1=1, dim2=2).add_(1.0 + jitter)
    inverse, logs = inverse_and_log_determinant(matrices)
    return logs, inverse.mul_(outer)


def _slices(count: int, size: int, width: int | None = None) -> Iterator[slice]:
    """Yield consecutive slices of at most `size`, at least 1.

    With the width of the matrices that they count, also of no more of these than are inverted well at once.
    """
    if width is not None:
        size = min(size, CACHED_MATRICES if width <= CACHED_WIDTH else CACHED_NUMBERS // width**2)
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


# Outer products z zᵀ of many rows, each kept as half a matrix in a full rectangle, and sums of them as matrix products.
#
# The rectangle of a symmetric d × d matrix A (d even, k = d/2) is R[b, a], b in 0 … k − 1, a in 0 … d:
#
#     a > b:  R[b, a] = A[b, a − 1]              the first k rows of A, from the diagonal on
#     a ≤ b:  R[b, a] = A[k + b, k + a]          the lower triangle of A's last block
#
# so that k·(d + 1) numbers hold exactly d(d + 1)/2 entries, and each k × k block of A is a plain slice.
# Source: Gustavson et al., "Rectangular full packed format for Cholesky's algorithm", 2010.


def outer_products(columns: Tensor, slab: slice) -> Tensor:
    """Compute some rows of the rectangles of all z_i z_iᵀ.

    Args:
        columns: Float[d n], contiguous: z_i are its columns; d even.
        slab: rows b of the rectangles.

    Returns:
        Float[r·(d + 1) n], r the length of the slab.
    """
    width, count = columns.shape
    half = width // 2
    out = columns.new_empty(slab.stop - slab.start, width + 1, count)
    for b in range(slab.start, slab.stop):
        torch.mul(columns[b:], columns[b], out=out[b - slab.start, b + 1 :])
        torch.mul(columns[half : half + b + 1], columns[half + b], out=out[b - slab.start, : b + 1])
    return out.view(-1, count)


def outer_products_backward(slopes: Tensor, columns: Tensor, slab: slice, gradient: Tensor) -> None:
    """Add the gradient of Σ slopes ∘ outer_products(columns, slab) with respect to `columns`.

    Args:
        slopes: Float[r·(d + 1) n]; overwritten.
        columns: Float[d n].
        slab: rows b of the rectangles.
        gradient: Float[d n], added to.
    """
    width, count = columns.shape
    half = width // 2
    slopes = slopes.view(-1, width + 1, count)
    for row, b in enumerate(range(slab.start, slab.stop)):
        for slope, start, other in ((slopes[row, b + 1 :], b, b), (slopes[row, : b + 1], half, half + b)):
            stretch = slice(start, start + len(slope))
            gradient[stretch].addcmul_(slope, columns[other])
            gradient[other] += slope.mul_(columns[stretch]).sum(0)


# Inverses and log-determinants by halves: with the Schur complement S = C − Bᵀ A⁻¹ B of [[A, B], [Bᵀ, C]] the
# log-determinant is log|A| + log|S|, and the inverse follows by products. So nearly all work is in batched matrix
# products, which LAPACK's factorisations of small matrices, one by one, are not.


@torch.no_grad()
def invert_rectangles(rectangles: Tensor, scales: Tensor, jitter: float = 0.0) -> Tensor:
    """Replace the rectangles of M_j by the form weights of (I + s_j M_j)⁻¹, and return log|I + s_j M_j|.

    Args:
        rectangles: Float[C k d + 1], contiguous; overwritten.
        scales: Float[C], s_j.
        jitter: added to the diagonal.

    Returns:
        Float[C].
    """
    logs, half = torch.empty_like(scales), rectangles.shape[1]
    ones = torch.ones_like(rectangles[0, :, :half])
    doubled = ones.triu() + ones.triu(1)  # 1 on the diagonal, 2 above, 0 below
    eye = torch.eye(half, dtype=ones.dtype, device=ones.device) * (1.0 + jitter)
    is_small = rectangles.device.type == "cpu" and 2 * half <= CACHED_WIDTH
    for some in _slices(len(rectangles), CACHED_MATRICES if is_small else len(rectangles)):
        part = rectangles[some].mul_(scales[some, None, None])
        # A₁₁ and A₂₂ are valid on and above the diagonal only, A₁₂ everywhere.
        first, across, last = part[:, :, 1 : half + 1], part[:, :, half + 1 :], part[:, :, :half].mT
        first, across, last, logs[some] = _invert_blocks(first + eye, across.contiguous(), last + eye)
        # The weights with which Σ R ∘ z zᵀ is zᵀ A⁻¹ z: entries off the diagonal count twice.
        torch.mul(last, doubled.mT, out=part[:, :, :half])
        part[:, :, half].zero_()
        part[:, :, 1 : half + 1].addcmul_(first, doubled)
        torch.mul(across, 2.0, out=part[:, :, half + 1 :])
    return logs


def inverse_and_log_determinant(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute A⁻¹ and log|A| of each matrix.

    Args:
        matrices: Float[C m m], symmetric positive definite; only the upper triangle is read.

    Returns:
        Float[C m m] and Float[C], in the dtype of `matrices`; NaN where a matrix is not positive definite.
    """
    width = matrices.shape[-1]
    if width <= LEAF_WIDTH:
        factor, failed = torch.linalg.cholesky_ex(matrices, upper=True)
        logs = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.cholesky_inverse(factor, upper=True), torch.where(failed == 0, logs, torch.nan)
    half = width // 2
    inverse = torch.empty_like(matrices)
    first, across, last, logs = _invert_blocks(
        matrices[:, :half, :half], matrices[:, :half, half:], matrices[:, half:, half:]
    )
    inverse[:, :half, :half], inverse[:, :half, half:], inverse[:, half:, half:] = first, across, last
    inverse[:, half:, :half] = across.mT
    return inverse, logs


def _invert_blocks(first: Tensor, across: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map the blocks A₁₁, A₁₂, A₂₂ to those of the inverse, and the log-determinant."""
    inverse, logs = inverse_and_log_determinant(first)
    ratio = torch.bmm(inverse, across)  # A₁₁⁻¹ A₁₂
    schur = torch.baddbmm(last, across.mT, ratio, alpha=-1.0)
    corner, corner_logs = inverse_and_log_determinant(schur)
    product = torch.bmm(ratio, corner)
    inverse = torch.baddbmm(inverse, product, ratio.mT)
    return inverse, product.neg_(), corner, logs + corner_logs
