"""The clusters of a run as they are shown: the stages' own, with the names and edits that people gave them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from rayclust.arrays import IntArray
from rayclust.errors import ArtefactError, ConfigError
from rayclust.runtime.pipeline import content_digest
from rayclust.runtime.rows import row_starts, table_at
from rayclust.settings import format_error
from rayclust.store import storage, tables
from rayclust.store.manifest import AssignOutputs, Manifest, read_manifest
from rayclust.store.overlay import (
    Edit,
    Edited,
    Overlay,
    Split,
    clusters_named,
    read_overlay,
    refit,
    write_overlay,
)
from rayclust.store.run import Run, parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShownClusters:
    """A run's clusters with the edits of its overlay."""

    overlay: Overlay
    """Fitted to the run's assignments."""
    edited: Edited
    """Its `of` gives the shown clusters of rows."""
    own_names: Mapping[int, str | None]
    """By the stage label, by cluster; {} before it."""

    @cached_property
    def names(self) -> dict[int, str | None]:
        """Names by shown cluster: that given by hand, else the stage's."""
        return {k: self.edited.names.get(k, self.own_names.get(k)) for k in self.edited.shown}

    @property
    def names_of_own(self) -> dict[int, str | None]:
        """Names by the run's own clusters: each has that of the cluster that it was merged into."""
        return {k: self.names[int(self.edited.final[k])] for k in range(self.edited.clusters)}

    def names_at(self, clusters: IntArray) -> pa.Array:
        """Return the names of shown clusters, Int[B], as strings with nulls."""
        table = pa.array([self.names.get(k) for k in range(len(self.edited.final))], pa.string())
        return table.take(pa.array(clusters))


def shown_clusters(run: Run) -> ShownClusters | None:
    """Return the clusters of a run with its overlay applied, None before the stage assign.

    Edits that no longer fit are logged, once. Raise `ArtefactError` if the overlay is no list of edits.
    """
    assign = read_manifest(run, "assign")
    if assign is None:
        return None
    overlay, _ = _fitted(run, assign)
    # Names hold only for the assignment that they were given to.
    label, own_names = read_manifest(run, "label"), dict[int, str | None]()
    if label is not None and label.inputs.get("assign") == content_digest(assign):
        named = tables.read_table(run.clusters, ["cluster", "name"])
        own_names = dict(zip(named["cluster"].to_pylist(), named["name"].to_pylist(), strict=True))
    return ShownClusters(overlay, Edited.by(overlay.edits, overlay.clusters), own_names)


def edit_clusters(run: Run, content: Edit | dict[str, Any]) -> None:
    """Add an edit, or the one that is given as its JSON, to a run's overlay.

    Raises:
        ArtefactError: the run has no typical images yet, by which the edit is found again after another assignment.
        ConfigError: it is no edit, or names a cluster that is not shown.
        HeldError: somebody else has edited the clusters meanwhile.
    """
    try:
        edit: Edit = TypeAdapter(Edit).validate_python(content)
    except ValidationError as error:
        raise ConfigError(f"edit: {format_error(error, ())}") from None
    assign, label, encode = (read_manifest(run, stage) for stage in ("assign", "label", "encode"))
    if assign is None or encode is None or label is None or label.inputs.get("assign") != content_digest(assign):
        raise ArtefactError(f"{run.uri}: has no typical images yet: run `rayclust label RUN.yaml` first")
    overlay, version = _fitted(run, assign)
    exemplars = tables.read_table(run.clusters, ["cluster", "exemplars"]).to_pylist()
    # Only of the clusters that take part: a cluster's page must open at once among many thousands. A merged cluster is
    # found again by the images of all that went into it.
    edits = (*overlay.edits, edit)
    final = Edited.by(edits, overlay.clusters).final
    ends = {int(final[k]) for k in clusters_named(edit)}
    wanted = {each["cluster"]: each["exemplars"] for each in exemplars if int(final[each["cluster"]]) in ends}
    rows = np.unique(np.array([row for some in wanted.values() for row in some], np.int64))
    found = table_at(run.rows, row_starts(encode), rows, ["key"])["key"].to_pylist()
    keys = dict(zip(rows.tolist(), found, strict=True))
    typical = {cluster: tuple(keys[row] for row in some) for cluster, some in wanted.items()}
    update = {"edits": edits, "fingerprints": typical | overlay.fingerprints}
    write_overlay(run, overlay.model_copy(update=update), version)


def undo_edit(run: Run) -> None:
    """Take back the last edit of a run's overlay, if there is one."""
    assign = read_manifest(run, "assign")
    if assign is not None:
        overlay, version = _fitted(run, assign)
        if overlay.edits:
            write_overlay(run, overlay.model_copy(update={"edits": overlay.edits[:-1]}), version)


def _fitted(run: Run, assign: Manifest) -> tuple[Overlay, str | None]:
    """Return the overlay fitted to the run's assignments, and the version of its file."""
    overlay, version = read_overlay(run)
    digest, clusters = content_digest(assign), len(assign.outputs_of(AssignOutputs).sizes)
    if not overlay.edits and not overlay.unfit:
        return Overlay(assign=digest, clusters=clusters), version
    if overlay.assign != digest:
        overlay = _refitted(run.uri, storage.canonical_json(overlay.model_dump(mode="json")), digest, clusters)
    return overlay, version


@lru_cache(4)
def _refitted(uri: str, content: str, digest: str, clusters: int) -> Overlay:
    """Return `refit` of an overlay's JSON; cached, as it reads the keys of all rows."""
    overlay, cluster_of = Overlay.model_validate_json(content), dict[str, int]()
    # The keys by which its clusters are found again, and those of its splits.
    keys = {key for keys in overlay.fingerprints.values() for key in keys}
    keys |= {key for edit in overlay.edits if isinstance(edit, Split) for key in edit.keys}
    wanted = pa.array(sorted(keys), pa.string())
    for _, part in parts(Run(uri).assignments_folder):
        table = tables.read_table(part, ["key", "cluster"])
        some = table.filter(pc.is_in(table["key"], value_set=wanted))
        cluster_of |= dict(zip(some["key"].to_pylist(), some["cluster"].to_pylist(), strict=True))
    found = refit(overlay, digest, clusters, cluster_of)
    for each in found.unfit[len(overlay.unfit) :]:
        logger.warning("%s: %s no longer fits: %s", Run(uri).overlay, each.edit.do, each.reason)
    return found
