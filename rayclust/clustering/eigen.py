"""Leading eigenvectors of a symmetric operator that is only known by its products with blocks of vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rayclust.errors import ConfigError

_log = logging.getLogger(__name__)

_BLOCKS_KEPT = 4
_LOST = 1e-5


@dataclass(frozen=True)
class Eigenpairs:
    """Leading eigenpairs, largest eigenvalue first."""

    values: Tensor
    """Float64[K]."""
    vectors: Tensor
    """Float[N K], orthonormal; each one's largest entry by size is positive."""
    residual: float
    """Largest length of A v − λ v among them."""
    products: int
    """Blocks of vectors that the operator was multiplied with."""


def leading(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    *,
    tolerance: float = 1e-5,
    most_products: int = 100,
) -> Eigenpairs:
    """The eigenvectors of the largest (not: largest by size) eigenvalues, by a block Krylov space with thick restarts.

    Of the space spanned by the blocks so far the Ritz vectors are taken; the next block is what the operator adds to
    it. When the space holds four blocks it shrinks to its leading Ritz vectors and the newest block.

    Args:
        product: Float[N B] to Float[N B], symmetric.
        start: Float[N B], B at least `count`; a few columns more hasten convergence.
        count: K, eigenvectors wanted.
        tolerance: longest residual A v − λ v, relative to the largest eigenvalue by size.
        most_products: blocks multiplied at most; a longer residual is then logged and returned.

    Raises:
        ConfigError: fewer columns in `start` than `count`.

    Source: Stewart 2002 (Krylov–Schur restarts), in block form with full orthogonalisation.
    """
    if not 1 <= count <= start.shape[1]:
        raise ConfigError(f"count = {count}: from 1 to the {start.shape[1]} columns of the first block is needed")
    newest = _orthonormal(start, start.new_zeros((len(start), 0)))
    width, products = newest.shape[1], 0
    basis, images = newest[:, :0], newest[:, :0]
    while True:
        image = product(newest)
        products += 1
        basis, images = torch.cat([basis, newest], 1), torch.cat([images, image], 1)
        values, turn = _ritz(basis, images)
        kept = turn[:, : max(width, count)]
        vectors, moved = basis @ kept.to(basis), images @ kept.to(basis)
        errors = moved[:, :count] - vectors[:, :count] * values[:count].to(basis)
        residual = float(errors.norm(dim=0).max())
        if residual <= tolerance * float(values.abs().max()) or products >= most_products:
            break
        if basis.shape[1] + width > _BLOCKS_KEPT * width:
            basis, images = vectors, moved
        residuals = moved[:, :width] - vectors[:, :width] * values[:width].to(basis)
        newest = _orthonormal(residuals, basis)
        if newest.shape[1] == 0:  # the space is invariant: nothing is left to find
            break
    if residual > tolerance * float(values.abs().max()):
        _log.info("eigenvectors: residual %.1e after %d products, aimed for %.1e", residual, products, tolerance)
    return Eigenpairs(values[:count], _signed(vectors[:, :count]), residual, products)


def _ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues Float64[S], falling, and eigenvectors Float64[S S] of the operator within an orthonormal basis."""
    inner = (basis.T @ images).double()
    values, turn = torch.linalg.eigh(0.5 * (inner + inner.T))
    return values.flip(0), turn.flip(1)


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns that span what the block adds to the basis; columns that add nothing are left out."""
    lengths = block.norm(dim=0)
    block = block[:, lengths > 0] / lengths[lengths > 0]
    for _ in range(2):  # once loses digits
        block = block - basis @ (basis.T @ block)
        q, r = torch.linalg.qr(block)
        block = q[:, r.diagonal().abs() > _LOST]
    return block


def _signed(vectors: Tensor) -> Tensor:
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)
