"""Two runs over the same images: how far their clusters agree, and which images went where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayclust.errors import DataError
from rayclust.export.rows import RunRows
from rayclust.report.charts import Flow, sankey
from rayclust.report.svg import HUES
from rayclust.runtime.edits import ShownClusters

FLOWS = 300
"""Most flows that are listed."""
DRAWN = 14
"""Most clusters of either run that are drawn by themselves."""
LOOKED_AT = 1000
"""Flows among which these are sought."""
ABSENT = -1
"""Cluster of an image that the other run does not have."""
Names = Mapping[int, str | None]


class Comparison:
    """The clusters of another run, as edited, for the rows of this one; images are the same where their keys are.

    Args:
        keys: of this run's rows, part by part.
        other: the other run.

    Raises:
        DataError: the two have no image in common.
    """

    def __init__(self, keys: pa.ChunkedArray, other: RunRows) -> None:
        self.names: Names = other.shown.names
        """Of the other run's clusters."""
        self.uri = other.run.uri
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
            the images, their share of either cluster, and whether most of the cluster went elsewhere (`moved`); the
            drawing of what moved, as SVG.
        """
        from rayclust.metrics.external import ari  # scipy and scikit-learn: a server without comparison goes without

        common = self.clusters != ABSENT
        a, b = own[common].astype(np.int64), self.clusters[common].astype(np.int64)
        flows = _Flows.between(a, b)
        sizes, other_sizes = np.bincount(a), np.bincount(b)
        # The largest of either kind: a run with many clusters has more main flows than are listed.
        listed = np.concatenate([np.flatnonzero(flows.is_main == kind)[: FLOWS // 2] for kind in (True, False)])
        shown_flows = []
        for i in np.sort(listed):
            source, target, images = int(flows.source[i]), int(flows.target[i]), int(flows.images[i])
            names = {"from_name": shown.names.get(source), "to_name": self.names.get(target)}
            shares = {"share": images / sizes[source], "share_of_other": images / other_sizes[target]}
            facts = {"from": source, "to": target, "images": images, "moved": not flows.is_main[i]}
            shown_flows.append(facts | names | {name: round(float(share), 4) for name, share in shares.items()})
        return {
            "other": self.uri,
            "images": len(a),
            "absent": int((~common).sum()),
            "ari": round(ari(a, b), 4),
            "together": round(float(flows.images[flows.is_main].sum() / len(a)), 4),
            "flows": shown_flows,
            "drawing": flows.drawn(shown.names, self.names),
        }


@dataclass(frozen=True)
class _Flows:
    """How many images are in a cluster of one run and in one of another, for the pairs that have any, largest first."""

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    images: NDArray[np.int64]
    is_main: NDArray[np.bool_]
    """Whether no more images of the source went elsewhere."""

    @classmethod
    def between(cls, a: NDArray[np.int64], b: NDArray[np.int64]) -> _Flows:
        """Count the pairs of two assignments of the same images, both Int64[n]."""
        width = int(b.max()) + 1
        codes, counts = np.unique(a * width + b, return_counts=True)
        order = np.lexsort((codes, -counts))
        source, target = codes[order] // width, codes[order] % width
        is_main = np.zeros(len(codes), bool)
        is_main[np.unique(source, return_index=True)[1]] = True  # of equal flows out of a cluster the first one
        return cls(source, target, counts[order], is_main)

    def drawn(self, names: Names, other_names: Names) -> str:
        """Return a Sankey of the clusters that most images left or came to; the others are one group at either side.

        Images that went where most of their cluster did are faint; what goes from one group of others to the other is
        left out.
        """
        # 1. The largest moves, each with where the rest of its cluster went; then the largest clusters.
        main = dict(zip(self.source[self.is_main].tolist(), self.target[self.is_main].tolist(), strict=True))
        left, right = set[int](), set[int]()
        for i in np.argsort(self.is_main, kind="stable")[:LOOKED_AT].tolist():
            source, target = int(self.source[i]), int(self.target[i])
            wanted = left | {source}, right | {target, main[source]}
            if max(map(len, wanted)) <= DRAWN:
                left, right = wanted
        # 2. Images by pairs of groups, those of the others in the last row and column.
        ids, other_ids = (np.array(sorted(clusters)) for clusters in (left, right))
        table = np.zeros((len(ids) + 1, len(other_ids) + 1), np.int64)
        places = [
            np.where(np.isin(clusters, known), np.searchsorted(known, clusters), len(known))
            for clusters, known in ((self.source, ids), (self.target, other_ids))
        ]
        np.add.at(table, tuple(places), self.images)
        table[-1, -1] = 0
        # 3. Large clusters first, and opposite each the clusters that most of it went to.
        order = np.argsort(-table[:-1].sum(1), kind="stable")
        ids, table = ids[order], table[[*order, -1]]
        order = np.argsort(np.arange(len(table)) @ table[:, :-1] / table[:, :-1].sum(0), kind="stable")
        other_ids, table = other_ids[order], table[:, [*order, -1]]
        flows = list[Flow]()
        for i, j in np.argwhere(table).tolist():
            if i < len(ids) and j < len(other_ids):
                source, target = int(ids[i]), int(other_ids[j])
                look = {"hue": i % len(HUES), "is_faint": main[source] == target, "url": f"#/flow/{source}/{target}"}
                flows.append(Flow(i, j, int(table[i, j]), **look))
            else:
                flows.append(Flow(i, j, int(table[i, j]), is_faint=True))
        # 4. The groups' titles; that of the others says how many clusters they are.
        titles = list[list[str]]()
        for drawn, known, clusters, others in (
            (ids, names, self.source, table[-1]),
            (other_ids, other_names, self.target, table[:, -1]),
        ):
            titles.append([known.get(cluster) or f"Cluster {cluster}" for cluster in drawn.tolist()])
            titles[-1] += [f"{len(np.unique(clusters)) - len(drawn):,} more"] if others.any() else []
        return sankey(flows, titles[0], titles[1], "Clusters of this run at the left, of the other run at the right")
