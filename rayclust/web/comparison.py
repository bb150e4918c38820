"""Two runs over the same images: how far their clusters agree, and which images went where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayclust.errors import DataError
from rayclust.export.rows import RunRows
from rayclust.metrics.external import ari
from rayclust.runtime.edits import ShownClusters

FLOWS = 300
"""Most flows that are listed."""
ABSENT = -1
"""Cluster of an image that the other run does not have."""


class Comparison:
    """The clusters of another run, as edited, for the rows of this one; images are the same where their keys are.

    Args:
        keys: of this run's rows, part by part.
        other: the other run.

    Raises:
        DataError: the two have no image in common.
    """

    def __init__(self, keys: pa.ChunkedArray, other: RunRows) -> None:
        self._names, self.uri = other.shown.names, other.run.uri
        tables = [other.table(part).select(["key", "cluster"]) for part in other.parts]
        found = pa.concat_tables(tables)
        places = pc.index_in(keys, value_set=found["key"].combine_chunks())
        clusters = found["cluster"].take(places).fill_null(ABSENT)
        self.clusters: NDArray[np.int32] = clusters.to_numpy().astype(np.int32)
        """Int32[N], `ABSENT` for an image that the other run does not have."""
        if (self.clusters == ABSENT).all():
            raise DataError(f"{self.uri}: has none of this run's images: keys are compared")

    def facts(self, own: NDArray[np.int32], shown: ShownClusters) -> dict[str, Any]:
        """Return how far the runs agree, with this run's clusters as edited, Int32[N].

        Returns:
            other; images in both runs and those that are absent; ari over the former; `together`, the share of them
            that went where most of their cluster did; flows, the largest first, each with its clusters and their names,
            the images, their share of either cluster, and whether most of the cluster went elsewhere (`moved`).
        """
        common = self.clusters != ABSENT
        a, b = own[common].astype(np.int64), self.clusters[common].astype(np.int64)
        width = int(b.max()) + 1
        codes, counts = np.unique(a * width + b, return_counts=True)
        source, target = codes // width, codes % width
        sizes, other_sizes = np.bincount(a), np.bincount(b)
        largest = np.zeros(len(sizes), np.int64)
        np.maximum.at(largest, source, counts)
        # Of equal flows out of a cluster the first one is its main one.
        order = np.lexsort((target, -counts))
        is_main = np.zeros(len(codes), bool)
        first = np.unique(source[order], return_index=True)[1]
        is_main[order[first]] = True
        # The largest of either kind: a run with many clusters has more main flows than are listed.
        listed = [order[is_main[order] == kind][: FLOWS // 2] for kind in (True, False)]
        flows = [
            {
                "from": int(source[i]),
                "from_name": shown.names.get(int(source[i])),
                "to": int(target[i]),
                "to_name": self._names.get(int(target[i])),
                "images": int(counts[i]),
                "share": round(float(counts[i] / sizes[source[i]]), 4),
                "share_of_other": round(float(counts[i] / other_sizes[target[i]]), 4),
                "moved": not is_main[i],
            }
            for i in sorted(np.concatenate(listed).tolist(), key=lambda i: (-counts[i], source[i], target[i]))
        ]
        return {
            "other": self.uri,
            "images": len(a),
            "absent": int((~common).sum()),
            "ari": round(ari(a, b), 4),
            "together": round(float(largest.sum() / len(a)), 4),
            "flows": flows,
        }
