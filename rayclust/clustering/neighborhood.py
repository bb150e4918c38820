"""The graph of nearest neighbours: smoothing of rows, modularity of partitions, leading eigenvectors."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from rayclust.arrays import require_matrix
from rayclust.clustering.spectral import Eigenpairs, leading_eigenpairs

_GATHERED = 2**24
"""Values gathered at once."""
_TOLERANCE = 1e-3
"""Longest residual of the graph's eigenvectors."""


def smooth(x: Tensor, neighbors: Tensor, rounds: int = 1) -> Tensor:
    """Replace each row's direction by that of the sum of itself and its neighbours, repeatedly.

    A low-pass filter of the graph: components that neighbours share are kept, those of single rows average out, so that
    clusters become rounder.

    Takes Float[N D] and Int[N M], −1 where a row has fewer than M, to Float[N D], unit rows; a zero row without
    neighbours stays zero, and 0 rounds return the directions of `x`.

    Source: arXiv 1906.01210, eq. 6 (graph convolution before clustering), with equal weights.
    """
    require_matrix(x, "x")
    require_matrix(neighbors, "neighbors")
    x = functional.normalize(x, dim=1)
    block = max(1, _GATHERED // max(1, neighbors.shape[1] * x.shape[1]))
    for _ in range(rounds):
        sums = [
            rows + (x[ids.clamp(min=0)] * (ids >= 0).unsqueeze(2)).sum(1)
            for rows, ids in zip(torch.split(x, block), torch.split(neighbors, block), strict=True)
        ]
        x = functional.normalize(torch.cat(sums), dim=1)
    return x


def modularity_terms(labels: Tensor, neighbor_labels: Tensor, clusters: int) -> Tensor:
    """Return the sums of which modularity is made; they add up over workers and over blocks of rows.

    Takes Int64[R N], the labels of R partitions, and Int64[R N M], those of each row's neighbours, −1 where there is
    none, to Float64[R K+2]: rows in each cluster, pairs whose ends share a cluster, pairs.
    """
    sizes = labels.new_zeros((len(labels), clusters)).scatter_add_(1, labels, torch.ones_like(labels))
    kept = (neighbor_labels == labels.unsqueeze(2)).sum((1, 2))
    pairs = (neighbor_labels >= 0).sum((1, 2))
    return torch.cat([sizes, kept[:, None], pairs[:, None]], dim=1).double()


def modularity(terms: Tensor) -> Tensor:
    """Return the share of neighbour pairs kept together, less that of a random partition of the same sizes.

    Larger is better: below 1, about 0 for a random partition, and 0 for a single cluster. Unlike the share of pairs
    that is kept, it does not reward a single cluster with all rows; unlike the mutual information of the pairs, it
    hardly favours even sizes. Takes `modularity_terms` to Float64[R]: share of pairs kept − Σ_c (share of rows)².

    Source: Newman and Girvan 2004, eq. 5, for a graph in which every row has equally many neighbours.
    """
    sizes, kept, pairs = terms[:, :-2], terms[:, -2], terms[:, -1]
    shares = sizes / sizes.sum(1, keepdim=True).clamp(min=1)
    return kept / pairs.clamp(min=1) - shares.square().sum(1)


def mean_of_neighbors(neighbors: Tensor) -> sparse.csr_array:
    """Return W, Float32[n n]: the mean over a row's neighbours; rows sum to 1, or to 0 without neighbours.

    Takes Int[n M], −1 where a row has fewer than M.
    """
    ids = neighbors.cpu().numpy()
    rows, columns = (ids >= 0).nonzero()
    each = (1.0 / np.maximum((ids >= 0).sum(1), 1)).astype(np.float32)
    return sparse.csr_array((each[rows], (rows, ids[rows, columns])), shape=(len(ids), len(ids)))


def graph_eigenpairs(graph: sparse.csr_array, count: int, seed: int) -> Eigenpairs:
    """Return the leading eigenpairs of D^{-1/2} A D^{-1/2}, A = ½ (W + Wᵀ), D its row sums; eigenvalues are at most 1.

    Args:
        graph: W, of `mean_of_neighbors`.
        count: how many, at most n.
        seed: of the first vectors.

    Source: Ng, Jordan and Weiss, On spectral clustering, 2001, section 2, on the graph of nearest neighbours.
    """
    affinity = 0.5 * (graph + graph.T)
    scale = 1.0 / np.sqrt(np.maximum(affinity.sum(axis=1), np.finfo(np.float32).tiny))
    normalized = (sparse.diags_array(scale) @ affinity @ sparse.diags_array(scale)).tocsr().astype(np.float32)
    start = torch.randn((len(scale), count + 4), generator=torch.Generator().manual_seed(seed))
    return leading_eigenpairs(lambda x: torch.from_numpy(normalized @ x.numpy()), start, count, tolerance=_TOLERANCE)
