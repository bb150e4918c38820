"""Rows with a number of clusters that is known: groups in orthogonal low-dimensional subspaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.stages.runs import tree


def planted(clusters: int, seed: int, *, per_cluster: int = 50, dims: int = 2, signed: bool = True) -> np.ndarray:
    """Float32[N 3·K·dims]: unit rows with a little noise, `dims` dimensions a group, each orthogonal to all others.

    Args:
        clusters: K.
        seed: of the rows, of the groups' place and of the order.
        per_cluster: rows of each group.
        dims: dimensions of each group.
        signed: whether a group holds rows and their opposites; else they lie around one direction, which k-means needs.
    """
    rng = np.random.default_rng(seed)
    width = 3 * clusters * dims
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0].T
    groups = []
    for k in range(clusters):
        codes = rng.normal(size=(per_cluster, dims))
        codes[:, 0] = codes[:, 0] if signed else 4 + np.abs(codes[:, 0])
        groups.append(codes @ basis[k * dims : (k + 1) * dims])
    rows = np.concatenate(groups)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) + 0.02 * rng.normal(size=rows.shape)
    return rng.permutation(rows).astype(np.float32)


def planted_tree(folder: Path, rows: np.ndarray, **groups: Any) -> dict[str, Any]:
    """A RUN.yaml over such rows as ready embeddings, its number of clusters open from 2 to 12."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    np.save(folder / "rows" / "rows.npy", rows)
    method = {"name": "kmeans", "clusters": list(range(2, 13))} | groups.pop("method", {})
    base = {"features": {"center": False}, "neighbors": {"k": 10}}
    return tree(str(folder / "run"), str(folder / "rows"), method=method, **(base | groups))
