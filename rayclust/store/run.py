"""The URIs of a run's artefacts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rayclust.store import storage

PART = "part-{:05d}.parquet"
"""Name of the table with index i in a folder of tables."""

_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True)
class Run:
    """The names of a run's artefacts, each a URI."""

    uri: str
    """A folder, local or in object storage."""

    def at(self, *parts: str) -> str:
        """Return the URI of something below the run."""
        return storage.join(self.uri, *parts)

    def path(self, uri: str) -> str:
        """Return the path below the run of something at `uri`, as manifests name it."""
        return uri.removeprefix(self.uri.rstrip("/") + "/")

    @property
    def config(self) -> str:
        """The config that the run was last started with."""
        return self.at("config.json")

    @property
    def lease(self) -> str:
        """The lock of the run: who works on it."""
        return self.at("lease.json")

    def rows(self, index: int) -> str:
        """Return where the rows of input shard `index` are numbered, in a run with several encoders."""
        return self.at("rows", PART.format(index))

    @property
    def embeddings_folder(self) -> str:
        """Folder of `tables.EMBEDDINGS`, one table per input shard, in a run with one encoder."""
        return self.at("embeddings")

    def embeddings(self, index: int, space: str | None = None) -> str:
        """Return the embeddings of input shard `index`.

        Args:
            index: of the shard.
            space: name of the encoder, in a run with several; None in a run with one, whose tables hold the rows too.
        """
        return self.at("embeddings", *([space] if space else []), PART.format(index))

    @property
    def rejects_folder(self) -> str:
        """Folder of `tables.REJECTS`, one table per input shard."""
        return self.at("rejects")

    def rejects(self, index: int) -> str:
        """Return the rejects of input shard `index`."""
        return self.at("rejects", PART.format(index))

    @property
    def neighbors_folder(self) -> str:
        """Folder of `tables.NEIGHBORS`."""
        return self.at("neighbors")

    def neighbors(self, index: int) -> str:
        """Return the neighbours of the rows of embeddings part `index`."""
        return self.at("neighbors", PART.format(index))

    @property
    def assignments_folder(self) -> str:
        """Folder of `tables.ASSIGNMENTS`."""
        return self.at("assignments")

    def assignments(self, index: int) -> str:
        """Return the clusters of the rows of embeddings part `index`."""
        return self.at("assignments", PART.format(index))

    @property
    def clusters(self) -> str:
        """The table `tables.CLUSTERS`."""
        return self.at("clusters.parquet")

    @property
    def metrics(self) -> str:
        """Scores, a JSON object."""
        return self.at("metrics.json")

    @property
    def selection(self) -> str:
        """The number of clusters that was chosen, and why."""
        return self.at("selection.json")

    def candidate(self, clusters: int) -> str:
        """Return the folder of the model that select-k fitted with so many clusters; its criteria end in .json."""
        return self.at("selection", f"k-{clusters:05d}")

    @property
    def selection_fit(self) -> str:
        """Folder of the one model of which all candidates are cut, for methods that need no fit for each."""
        return self.at("selection", "fit")

    @property
    def model_folder(self) -> str:
        """The trained method: weights, config and a table of metrics per epoch."""
        return self.at("model")

    def checkpoints(self, digest: str) -> str:
        """Return the folder of the checkpoints of the training whose settings have this digest."""
        return self.at("checkpoints", digest)

    @property
    def index_folder(self) -> str:
        """The search index."""
        return self.at("index")

    @property
    def report(self) -> str:
        """The page for people."""
        return self.at("report", "index.html")

    def manifest(self, stage: str) -> str:
        """Return the manifest of a stage."""
        return self.at("manifests", f"{stage}.json")

    def shard_manifest(self, index: int, stage: str = "encode") -> str:
        """Return the marker of one input shard within a stage."""
        return self.at("manifests", stage, f"part-{index:05d}.json")


def parts(folder: str) -> Iterator[tuple[int, str]]:
    """Yield index and URI of every table in a folder of tables by index; none where the folder is missing."""
    found = {}
    for file in storage.walk(folder, suffixes=(".parquet",), missing_ok=True):
        name = _PART_NAME.fullmatch(file.key)
        if name:
            found[int(name[1])] = file.uri
    yield from sorted(found.items())
