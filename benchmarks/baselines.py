"""What a user would pick instead: faiss on the same threads, in its plain form."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray


def faiss_neighbors(x: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Int64[B k + 1] nearest rows by inner product, each query's own row among them, from faiss's flat index."""
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    return index.search(queries, k + 1)[1]


def faiss_kmeans(x: NDArray[np.float32], clusters: int, seed: int, passes: int = 25) -> NDArray[np.float32]:
    """Float32[K D] centres of faiss.Kmeans on all rows, with its own number of passes."""
    found = faiss.Kmeans(x.shape[1], clusters, niter=passes, seed=seed, max_points_per_centroid=len(x))
    found.train(x)
    return found.centroids
