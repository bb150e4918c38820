"""Rows with a number of clusters that is known: groups in orthogonal one-dimensional subspaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.stages.runs import tree


def planted(clusters: int, seed: int, *, per_cluster: int = 50) -> np.ndarray:
    """Float32[N 16+2·K]: rows along K orthogonal directions, with a little noise, in a seeded order."""
    rng = np.random.default_rng(seed)
    width = 16 + 2 * clusters
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0][:clusters]
    rows = np.repeat(directions, per_cluster, axis=0) + 0.02 * rng.normal(size=(clusters * per_cluster, width))
    return rng.permutation(rows).astype(np.float32)


def planted_tree(folder: Path, rows: np.ndarray, **groups: Any) -> dict[str, Any]:
    """A RUN.yaml over such rows as ready embeddings, its number of clusters open from 2 to 12."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    np.save(folder / "rows" / "rows.npy", rows)
    method = {"name": "kmeans", "clusters": list(range(2, 13))} | groups.pop("method", {})
    base = {"features": {"center": False}, "neighbors": {"k": 10}}
    return tree(str(folder / "run"), str(folder / "rows"), method=method, **(base | groups))
