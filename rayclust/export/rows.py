"""The rows of a finished run as exports and the explorer read them: part by part, with the clusters as edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError
from rayclust.runtime.edits import shown_clusters
from rayclust.runtime.pipeline import Manifests
from rayclust.runtime.rows import part_features, row_starts, transform_of
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
        self.figures = manifests.of("figures")
        """Manifest of its figures; None where there are none."""

    @property
    def parts(self) -> list[int]:
        """Indices of the parts that hold rows."""
        return [part for part, start in enumerate(self.starts[:-1]) if self.starts[part + 1] > start]

    def table(self, part: int) -> pa.Table:
        """Return row, key, uri, label, cluster, name and confidence of one part, and `cluster_<K>` of coarser levels.

        A level is that of the method's own cluster, before any edit.
        """
        known = tables.read_table(self.run.rows(part), ["row", "key", "uri", "label"])
        assigned = tables.read_table(self.run.assignments(part), ["cluster", "confidence", *self.levels])
        clusters = self.shown.of(assigned["cluster"].to_numpy(), known["key"])
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

    def plane(self) -> tuple[NDArray[np.float32], str]:
        """Return a place on the plane for every row, Float32[N 2], and what it is.

        It is the map of the figures where that has every row; else the first two principal components of the features,
        whose covariance is summed part by part.
        """
        map_uri = self.run.at("figures", "map.parquet")
        if self.figures is not None and self.run.path(map_uri) in self.figures.outputs:
            dots = tables.read_table(map_uri, ["row", "x", "y"])
            if dots.num_rows == self.count:  # each once, in order
                return np.stack([dots["x"].to_numpy(), dots["y"].to_numpy()], axis=1), "t-SNE, the map of the figures"
        transform = transform_of(self.encode, self.config.features)
        total, squares = np.zeros(0), np.zeros((0, 0))
        for part in self.parts:
            rows = part_features(self.run, part, transform).astype(np.float64)
            total = rows.sum(axis=0) + (total if len(total) else 0)
            squares = rows.T @ rows + (squares if len(squares) else 0)
        mean = total / self.count
        _, vectors = np.linalg.eigh(squares / self.count - np.outer(mean, mean))
        axes = vectors[:, ::-1][:, :2]
        # A component's sign is free: its largest entry is made positive, so that equal runs give equal maps.
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        places = np.zeros((self.count, 2), np.float32)
        for part in self.parts:
            start, stop = self.starts[part : part + 2]
            rows = part_features(self.run, part, transform)
            places[start:stop, : axes.shape[1]] = (rows - mean) @ axes
        return places, "the first two principal components of the features"
