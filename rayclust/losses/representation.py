"""Losses that teach a network its representation: two views of an image agree, whole clusters keep apart.

Rows are unit vectors unless said otherwise. Every loss is one of the whole batch, whose rows are spread over workers:
value and gradient do not depend on how many there are.

Sources: arXiv 2111.11821 (ProPos), 2006.07733 (BYOL), 2011.10566 (SimSiam), 2002.05709 (SimCLR), 1911.05722 (MoCo),
2005.04966 (PCL).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rayclust.distributed import all_reduce, data_group, differentiable_all_gather, differentiable_all_reduce


def alignment(p: Tensor, z: Tensor) -> Tensor:
    """Return −mean cos(p, z), from −1 to 1: SimSiam's D; BYOL's and ProPos' is 2 + 2·this.

    Args:
        p: Float[B d], predictions of any length.
        z: Float[B d], what they should point to; the caller detaches it where the paper stops the gradient.
    """
    return -functional.cosine_similarity(p, z, dim=1).mean()


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the normalised cross-entropy of finding an image's other view among all views of the batch.

    Args:
        first: Float[B d], unit rows, this worker's.
        second: Float[B d], the other views of the same images.
        temperature: divides the cosines.

    Source: arXiv 2002.05709, eq. 1; the mean over the 2B anchors.
    """
    counts = data_group().all_gather(torch.tensor(len(first), device=first.device))
    start, total = int(counts[: data_group().rank].sum()), int(counts.sum())
    everyone = torch.cat([differentiable_all_gather(first), differentiable_all_gather(second)])
    own = torch.arange(start, start + len(first), device=first.device)
    logits = torch.cat([first, second]) @ everyone.T / temperature
    itself, positive = torch.cat([own, own + total]), torch.cat([own + total, own])
    logits = logits.scatter(1, itself[:, None], -torch.inf)
    return functional.cross_entropy(logits, positive)


def queue_contrast(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of finding an image's key among those of a queue.

    Args:
        q: Float[B d], unit queries.
        k: Float[B d], unit keys of the same images, without gradient.
        queue: Float[Q d], unit keys of other images.
        temperature: divides the cosines.

    Source: arXiv 1911.05722, eq. 1.
    """
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def class_prototypes(
    z: Tensor, labels: Tensor, clusters: int, queued: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the direction of each cluster's mean over the batch of all workers.

    Args:
        z: Float[B d], unit rows.
        labels: Int64[B], cluster of each row.
        clusters: K.
        queued: Float[Q d] and Int64[Q], rows of earlier batches and their clusters, the same on all workers.

    Returns:
        Float[K d], unit rows, zero for clusters without rows; Bool[K], which have rows in anybody's part.
    """
    sums = differentiable_all_reduce(z.new_zeros((clusters, z.shape[1])).index_add(0, labels, z))
    counts = all_reduce(torch.bincount(labels, minlength=clusters))
    if queued is not None:
        sums = sums.index_add(0, queued[1], queued[0])
        counts = counts + torch.bincount(queued[1], minlength=clusters)
    return functional.normalize(sums, dim=1), counts > 0


def prototype_scattering(online: Tensor, target: Tensor, present: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of finding a prototype's target among the other online prototypes.

    Args:
        online: Float[K d], from `class_prototypes`.
        target: Float[K d], the same of the target network, without gradient.
        present: Bool[K]; absent clusters are neither anchors nor negatives.
        temperature: divides the cosines.

    Source: arXiv 2111.11821, eq. 8: the positive is the target's, negatives are online.
    """
    online, target = online[present], target[present]
    logits = online @ online.T / temperature
    positive = (online * target).sum(1) / temperature
    logits = logits.diagonal_scatter(positive)
    return (logits.logsumexp(1) - positive).mean()


def concentration(distances: Tensor, labels: Tensor, clusters: int, temperature: float) -> Tensor:
    """Return each cluster's φ, by which PCL divides the similarity to its centre: small where its rows lie close.

    Args:
        distances: Float[N], of each row to its centre, all rows.
        labels: Int64[N].
        clusters: K.
        temperature: mean of the result.

    Source: arXiv 2005.04966, eq. 12, with α = 10; clipped to the 10th and 90th percentile as in its program. Clusters
    of one row or none take the largest φ.
    """
    counts = torch.bincount(labels, minlength=clusters)
    sums = distances.new_zeros(clusters).index_add_(0, labels, distances)
    phi = sums / counts.clamp(min=1) / (counts + 10.0).log()
    phi = torch.where(counts > 1, phi, phi.max())
    phi = phi.clamp(*torch.quantile(phi, phi.new_tensor([0.1, 0.9])).tolist())
    return temperature * phi / phi.mean()


def prototype_contrast(q: Tensor, own: Tensor, centers: Tensor, phi: Tensor, negatives: Tensor) -> Tensor:
    """Return the cross-entropy of finding a row's centre among other centres.

    Args:
        q: Float[B d], unit queries.
        own: Int64[B], each row's cluster.
        centers: Float[K d], unit rows.
        phi: Float[K], from `concentration`.
        negatives: Int64[R], clusters that are no row's own.

    Source: arXiv 2005.04966, eq. 11, for one number of clusters.
    """
    positive = (q * centers[own]).sum(1, keepdim=True) / phi[own, None]
    logits = torch.cat([positive, q @ centers[negatives].T / phi[negatives]], dim=1)
    return functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
