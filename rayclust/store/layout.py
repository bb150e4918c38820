"""Where the artefacts of a run lie below its URI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rayclust.store import filesystem

PART = "part-{:05d}.parquet"
"""Name of the table with index i in a folder of tables."""

STAGES = ("encode", "neighbors", "select-k", "train", "assign", "label", "index", "evaluate", "figures", "report")
"""In the order in which a run does them."""

_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True)
class Run:
    """The names of a run's artefacts, each a URI."""

    uri: str
    """A folder or an `s3://` URI."""

    def at(self, *parts: str) -> str:
        """The URI of something below the run."""
        return filesystem.join(self.uri, *parts)

    def path(self, uri: str) -> str:
        """The path below the run of something at `uri`, as manifests name it."""
        return uri.removeprefix(self.uri.rstrip("/") + "/")

    @property
    def config(self) -> str:
        """The config that the run was last started with."""
        return self.at("config.json")

    @property
    def lease(self) -> str:
        """Who works on the run."""
        return self.at("lease.json")

    @property
    def embeddings_folder(self) -> str:
        """Folder of `tables.EMBEDDINGS`, one table per input shard."""
        return self.at("embeddings")

    def embeddings(self, index: int) -> str:
        """Embeddings of input shard `index`."""
        return self._part("embeddings", index)

    @property
    def rejects_folder(self) -> str:
        """Folder of `tables.REJECTS`, one table per input shard."""
        return self.at("rejects")

    def rejects(self, index: int) -> str:
        """Rejects of input shard `index`."""
        return self._part("rejects", index)

    @property
    def neighbors_folder(self) -> str:
        """Folder of `tables.NEIGHBORS`."""
        return self.at("neighbors")

    def neighbors(self, index: int) -> str:
        """Neighbours of the rows of embeddings part `index`."""
        return self._part("neighbors", index)

    @property
    def assignments_folder(self) -> str:
        """Folder of `tables.ASSIGNMENTS`."""
        return self.at("assignments")

    def assignments(self, index: int) -> str:
        """Clusters of the rows of embeddings part `index`."""
        return self._part("assignments", index)

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
        """Folder of the model that select-k fitted with so many clusters; beside it, ending in .json, its criteria."""
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
        """Folder of the checkpoints of the training whose settings have this digest."""
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
        """What seals a stage."""
        return self.at("manifests", f"{stage}.json")

    def shard_manifest(self, index: int, stage: str = "encode") -> str:
        """What seals one input shard within a stage."""
        return self.at("manifests", stage, f"part-{index:05d}.json")

    def _part(self, folder: str, index: int) -> str:
        return self.at(folder, PART.format(index))


def parts(folder: str) -> Iterator[tuple[int, str]]:
    """Index and URI of every table in a folder of tables, in order of the index; none where the folder is missing."""
    found = {}
    for file in filesystem.walk(folder, suffixes=(".parquet",), missing_ok=True):
        name = _PART_NAME.fullmatch(file.key)
        if name:
            found[int(name[1])] = file.uri
    yield from sorted(found.items())
