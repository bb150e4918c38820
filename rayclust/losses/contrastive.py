"""Losses between two soft partitions of the same rows: contrast of their clusters, agreement of rows, balance.

All take probabilities of one worker's part of a batch. What belongs to the whole batch goes through differentiable
sums over workers, so that value and averaged gradient are those of one worker with all rows.

Source: arXiv 2310.11989, section 3.3; the contrast of clusters is arXiv 2009.09687's (Contrastive Clustering), eq. 6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rayclust import distributed
from rayclust.arrays import require_matrix
from rayclust.errors import ShapeError
from rayclust.kernels.screening import accum_dtype

SMALLEST_SHARE = 1e-9
"""Share of a cluster below which it has no gradient in the balance, as in the published program."""


def cluster_contrast(u: Tensor, v: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy with which each cluster's column finds its twin in the other partition.

    The 2K columns of [U V] are scaled to length 1 over the rows of all workers. A column's positive is the same cluster
    in the other matrix; negatives are the other 2K − 2 columns of both. Columns are not gathered: the 2K × 2K matrix of
    their products is a sum over rows, and so over workers.

    Args:
        u: Float[B K], probabilities of this worker's rows.
        v: Float[B K], of the same rows or of their neighbours.
        temperature: T, divides the cosines; above 0.

    Returns:
        Float[], nats, the same on all workers, at least 0; ln(1 + (2K − 2)e^(−1/T)) for equal, balanced, certain
        partitions, ln(2K − 1) where all rows are alike. Symmetric in u and v.

    Raises:
        ShapeError: the two are not matrices of one shape.

    Source: arXiv 2310.11989, eq. 8; D(U, V) of the released program, whose denominator has the columns of both.
    """
    require_matrix(u, "u")
    if u.shape != v.shape:
        raise ShapeError(f"v has shape {tuple(v.shape)}: that of u is needed, {tuple(u.shape)}")
    columns = torch.cat([u, v], dim=1)
    columns = columns.to(accum_dtype(columns.dtype))
    products = distributed.differentiable_all_reduce(columns.T @ columns)
    lengths = products.diagonal().clamp(min=torch.finfo(products.dtype).tiny).sqrt()
    logits = products / lengths[:, None] / lengths / temperature
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    twins = torch.arange(len(logits), device=logits.device).roll(len(logits) // 2)
    return functional.cross_entropy(logits.masked_fill(itself, -torch.inf), twins)


def agreement_loss(p: Tensor, q: Tensor) -> Tensor:
    """Return −mean ln(p_i · q_i), of this worker's rows.

    Args:
        p: Float[B K], probabilities.
        q: Float[B K], of the same rows.

    Returns:
        Float[], nats, from 0 (equal and certain) to 100 (no cluster in common); ln K for uniform rows.

    Source: arXiv 2310.11989, the consistency loss; its logarithm ends at −100, as in the released program.
    """
    similarity = (p * q).sum(1).clamp(max=1.0)
    return functional.binary_cross_entropy(similarity, torch.ones_like(similarity))


def balance(p: Tensor) -> Tensor:
    """Return the entropy of the clusters' shares over all workers' rows.

    Args:
        p: Float[B K], probabilities of this worker's rows.

    Returns:
        Float[], nats, the same on all workers: from 0 (one cluster) to ln K (equal shares).

    Source: arXiv 2310.11989, the balance loss is minus this, of both heads.
    """
    p = p.to(accum_dtype(p.dtype))
    total = distributed.differentiable_all_reduce(torch.cat([p.sum(0), p.new_full((1,), float(len(p)))]))
    shares = (total[:-1] / total[-1]).clamp(min=SMALLEST_SHARE)
    return -(shares * shares.log()).sum()
