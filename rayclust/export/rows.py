"""The rows of a finished run as exports and the explorer read them: part by part, with the clusters as edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError
from rayclust.runtime.edits import shown_clusters
from rayclust.runtime.pipeline import Manifests
from rayclust.runtime.rows import filled_parts, row_starts
from rayclust.store import tables
from rayclust.store.manifest import AssignOutputs
from rayclust.store.run import Run
from rayclust.store.sources import fetch_many

IMAGES_AT_ONCE = 512
"""Images that are read together."""


class RunRows:
    """The rows of a run that is assigned.

    Raises:
        ArtefactError: it is not, for the config that it has now.
    """

    def __init__(self, config: RunConfig) -> None:
        run, manifests = Run(config.run, config.spaces), Manifests(config)
        encode, assign, shown = manifests.of("encode"), manifests.of("assign"), shown_clusters(run)
        if encode is None or assign is None or shown is None:
            raise ArtefactError(f"{run.uri}: has no clusters for its config: run `rayclust run RUN.yaml` first")
        self.config, self.run = config, run
        self.shown = shown
        """Its clusters, as edited."""
        self.starts = row_starts(encode)
        """The row at which each part begins, and N."""
        self.parts = filled_parts(self.starts)
        """Indices of the parts that hold rows."""
        self.count = self.starts[-1]
        """N."""
        self.encode = encode
        """Manifest of its embeddings."""
        self.is_labelled = manifests.of("label") is not None
        """Whether its clusters have typical images, and names where there are words."""
        self.levels = [tables.level_column(size) for size in assign.outputs_of(AssignOutputs).levels]
        """Columns of the coarser levels."""
        self.neighbors = manifests.of("neighbors")
        """Manifest of its neighbours; None where there are none."""
        self.is_mapped = manifests.of("map") is not None
        """Whether its rows have places on the plane."""

    def table(self, part: int) -> pa.Table:
        """Return row, key, uri, label, cluster, name and confidence of one part, and `cluster_<K>` of coarser levels.

        A level is that of the method's own cluster, before any edit.
        """
        known = tables.read_table(self.run.rows(part), ["row", "key", "uri", "label"])
        assigned = tables.read_table(self.run.assignments(part), ["cluster", "confidence", *self.levels])
        clusters = self.shown.edited.of(assigned["cluster"].to_numpy(), known["key"])
        columns = {name: known[name] for name in known.column_names}
        columns |= {"cluster": pa.array(clusters), "name": self.shown.names_at(clusters)}
        columns |= {name: assigned[name] for name in ("confidence", *self.levels)}
        return pa.table(columns)

    def images(self, uris: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield each URI in order with its image; None for one that cannot be read."""
        left = iter(uris)
        while some := list(islice(left, IMAGES_AT_ONCE)):
            found = dict(fetch_many(some, self.config.images.columns))
            yield from ((uri, found.get(uri)) for uri in some)
