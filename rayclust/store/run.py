"""The URIs of a run's artefacts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partialmethod

from rayclust.store import storage

PART = "part-{:05d}.parquet"
"""Name of the table with index i in a folder of tables."""

_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True)
class Run:
    """The names of a run's artefacts, each a URI."""

    uri: str
    """A folder, local or in object storage."""
    spaces: tuple[str, ...] = ()
    """Names of the spaces of a run with several encoders; () has one table for rows and embeddings alike."""
    config: str = field(default="config.json", init=False)
    """The config that the run was last started with."""
    lease: str = field(default="lease.json", init=False)
    """The lock of the run."""
    progress: str = field(default="progress.json", init=False)
    """What the stage under way, or the one that was interrupted, has done."""
    tracking: str = field(default="tracking.json", init=False)
    """Under which id trackers know the fit."""
    embeddings_folder: str = field(default="embeddings", init=False)
    """Folder of `tables.EMBEDDINGS`, one table per input shard; with several spaces of a folder for each."""
    rows_folder: str = field(default="rows", init=False)
    """Folder of the tables of keys, URIs and labels: `embeddings_folder`, but with several spaces one of its own."""
    rejects_folder: str = field(default="rejects", init=False)
    """Folder of `tables.REJECTS`, one table per input shard."""
    neighbors_folder: str = field(default="neighbors", init=False)
    """Folder of `tables.NEIGHBORS`."""
    counterparts_folder: str = field(default="counterparts", init=False)
    """Folder of `tables.COUNTERPARTS`, with that of their `tables.NEIGHBORS` in it."""
    nouns: str = field(default="counterparts/nouns.parquet", init=False)
    """The table `tables.NOUNS`."""
    assignments_folder: str = field(default="assignments", init=False)
    """Folder of `tables.ASSIGNMENTS`."""
    map_folder: str = field(default="map", init=False)
    """Folder of `tables.MAP`."""
    clusters: str = field(default="clusters.parquet", init=False)
    """The table `tables.CLUSTERS`."""
    metrics: str = field(default="metrics.json", init=False)
    """Scores, a JSON object."""
    contingency: str = field(default="evaluation/contingency.parquet", init=False)
    """Table of rows by class and cluster; exists only where there are labels."""
    selection: str = field(default="selection.json", init=False)
    """The number of clusters that was chosen, and why."""
    selection_fit: str = field(default="selection/fit", init=False)
    """Folder of the one model of which all candidates are cut, for methods that need no fit for each."""
    model_folder: str = field(default="model", init=False)
    """The trained method: weights, config and a table of metrics per epoch."""
    overlay: str = field(default="overlay.json", init=False)
    """Edits of the clusters by people."""
    index_folder: str = field(default="index", init=False)
    """The search index."""
    report: str = field(default="report/index.html", init=False)
    """The page for people."""

    def __post_init__(self) -> None:
        # The defaults are paths below the run.
        for each in fields(self)[2:]:
            object.__setattr__(self, each.name, self.at(str(each.default)))
        if not self.spaces:
            object.__setattr__(self, "rows_folder", self.embeddings_folder)

    def at(self, *parts: str) -> str:
        """Return the URI of something below the run."""
        return storage.join(self.uri, *parts)

    def path(self, uri: str) -> str:
        """Return the path below the run of something at `uri`, as manifests name it."""
        return uri.removeprefix(self.uri.rstrip("/") + "/")

    def _part(self, folder: str, index: int) -> str:
        """Return the table with this index in a folder of tables."""
        return self.at(folder, PART.format(index))

    def rows(self, index: int) -> str:
        """Return the table with keys, URIs and labels of an input shard's rows."""
        return storage.join(self.rows_folder, PART.format(index))

    def embeddings(self, index: int, space: str | None = None) -> str:
        """Return the embeddings of an input shard; in one of several spaces, if it is named."""
        return self._part("embeddings" if space is None else storage.join("embeddings", space), index)

    rejects = partialmethod(_part, "rejects")
    """Takes the index of an input shard and returns its rejects."""
    neighbors = partialmethod(_part, "neighbors")
    """Takes the index of a part of the embeddings and returns the neighbours of its rows."""
    counterparts = partialmethod(_part, "counterparts")
    """Takes the index of a part of the embeddings and returns the counterparts in text of its rows."""
    text_neighbors = partialmethod(_part, "counterparts/neighbors")
    """Takes the index of a part of the embeddings and returns the neighbours of its rows' counterparts."""
    assignments = partialmethod(_part, "assignments")
    """Takes the index of a part of the embeddings and returns the clusters of its rows."""
    map = partialmethod(_part, "map")
    """Takes the index of a part of the embeddings and returns the places of its rows on the plane."""

    def candidate(self, clusters: int) -> str:
        """Return the folder of the model that select-k fitted with so many clusters; its criteria end in .json."""
        return self.at("selection", f"k-{clusters:05d}")

    checkpoints = partialmethod(at, "checkpoints")
    """Takes the digest of the settings of a training and returns the folder of its checkpoints."""

    def manifest(self, stage: str) -> str:
        """Return the manifest of a stage."""
        return self.at("manifests", f"{stage}.json")

    def mark(self, index: int, stage: str = "encode") -> str:
        """Return the mark of one finished task of a stage."""
        return self.at("manifests", stage, f"part-{index:05d}.json")


def parts(folder: str) -> Iterator[tuple[int, str]]:
    """Yield index and URI of every table in a folder of tables by index; none where the folder is missing."""
    found = {}
    for file in storage.walk(folder, suffixes=(".parquet",), missing_ok=True):
        name = _PART_NAME.fullmatch(file.key)
        if name:
            found[int(name[1])] = file.uri
    yield from sorted(found.items())
