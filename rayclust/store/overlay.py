"""Edits of a run's clusters by people, in `overlay.json`: renames, merges, splits and marks.

The stages' artefacts stay as they are; whatever shows clusters applies the edits, in their order, to what it reads. The
numbers in them are those of one assignment of the rows. After another one, `refit` finds each cluster again by the keys
of its typical images, and says which edits no longer fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from rayclust.arrays import IntArray
from rayclust.errors import ArtefactError, ConfigError, HeldError
from rayclust.settings import Config, format_error
from rayclust.store import storage
from rayclust.store.run import Run

Number = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
MAJORITY = 0.5
"""A cluster is found again where more than this share of its typical images lies."""


class Rename(Config):
    """Another name for a cluster."""

    cluster: Number
    do: Literal["rename"] = "rename"
    name: Text


class Merge(Config):
    """Several clusters as one, under the number and the name of the first."""

    do: Literal["merge"] = "merge"
    clusters: tuple[Number, ...] = Field(min_length=2)


class Split(Config):
    """Some images of a cluster as a cluster of their own, whose number is the next one that is free."""

    cluster: Number
    do: Literal["split"] = "split"
    keys: tuple[str, ...] = Field(min_length=1)
    """Of the images; those that are not in the cluster stay where they are."""
    name: Text | None = None


class Mark(Config):
    """A word beside a cluster, such as `checked` or `junk`."""

    cluster: Number
    do: Literal["mark"] = "mark"
    mark: Text | None
    """None removes it."""


Edit = Annotated[Rename | Merge | Split | Mark, Field(discriminator="do")]


def clusters_named(edit: Edit) -> tuple[int, ...]:
    """Return the numbers of the clusters that an edit names."""
    return edit.clusters if isinstance(edit, Merge) else (edit.cluster,)


class Unfit(Config):
    """An edit that no longer fits the run's clusters, kept for people to see."""

    edit: Edit
    reason: str


class Overlay(Config):
    """The edits of a run, in the order in which they were made."""

    version: Literal[1] = 1
    assign: str = ""
    """Content digest of the assignments whose clusters are numbered here."""
    clusters: int = Field(0, ge=0)
    """K of them. Splits are numbered K, K + 1 and so on, in their order."""
    fingerprints: dict[int, tuple[str, ...]] = Field(default_factory=dict)
    """Keys of the most typical images of each of the K clusters that an edit names."""
    edits: tuple[Edit, ...] = ()
    unfit: tuple[Unfit, ...] = ()


@dataclass(frozen=True)
class Edited:
    """The clusters as they are shown: what became of each by an overlay's edits."""

    final: NDArray[np.int32]
    """Int32[K + S], the cluster in which each number ends: that of its merge, else itself."""
    names: dict[int, str]
    """Names given by hand, by cluster."""
    marks: dict[int, str]
    """Marks by cluster."""
    edits: tuple[Edit, ...]
    clusters: int
    """K."""
    split_keys: pa.Array
    """Keys that some split names."""

    @classmethod
    def by(cls, edits: Iterable[Edit], clusters: int) -> Edited:
        """Apply edits to K clusters.

        Raises:
            ConfigError: an edit names a cluster that is not there, or no longer, by its number.
        """
        edits = tuple(edits)
        splits = [edit for edit in edits if isinstance(edit, Split)]
        final = np.arange(clusters + len(splits), dtype=np.int32)
        names, marks, count = dict[int, str](), dict[int, str](), clusters
        for place, edit in enumerate(edits):
            for cluster in clusters_named(edit):
                if cluster >= count or final[cluster] != cluster:
                    where = f", it is part of {final[cluster]}" if cluster < count else f" among {count}"
                    raise ConfigError(f"edit {place + 1}, {edit.do}: there is no cluster {cluster}{where}")
            if isinstance(edit, Merge):
                if len(set(edit.clusters)) < len(edit.clusters):
                    raise ConfigError(f"edit {place + 1}, merge: {list(edit.clusters)} names a cluster twice")
                final[np.isin(final, edit.clusters)] = edit.clusters[0]
            elif isinstance(edit, Rename):
                names[edit.cluster] = edit.name
            elif isinstance(edit, Mark):
                marks = {k: mark for k, mark in marks.items() if k != edit.cluster}
                marks |= {} if edit.mark is None else {edit.cluster: edit.mark}
            else:
                names |= {} if edit.name is None else {count: edit.name}
                count += 1
        keys = pa.array(sorted({key for split in splits for key in split.keys}), pa.string())
        return cls(final, names, marks, edits, clusters, keys)

    @property
    def shown(self) -> list[int]:
        """Numbers of the clusters that are shown, in order."""
        return np.flatnonzero(self.final == np.arange(len(self.final))).tolist()

    def of(self, clusters: IntArray, keys: pa.Array | pa.ChunkedArray | None = None) -> NDArray[np.int32]:
        """Return the shown clusters of rows, Int32[B].

        Args:
            clusters: Int[B] as the stage assign, or the method, gave them.
            keys: of the rows; None for new images, which no split names.
        """
        found = self.final[clusters]
        if keys is None or not len(self.split_keys):
            return found
        # Only rows that some split names go through the edits one by one: a split depends on the merges before it.
        named = np.flatnonzero(pc.is_in(keys, value_set=self.split_keys).to_numpy(zero_copy_only=False))
        own, own_keys, count = np.asarray(clusters)[named].astype(np.int32), keys.take(pa.array(named)), self.clusters
        for edit in self.edits if len(named) else ():
            if isinstance(edit, Merge):
                own[np.isin(own, edit.clusters)] = edit.clusters[0]
            elif isinstance(edit, Split):
                listed = pc.is_in(own_keys, value_set=pa.array(edit.keys, pa.string()))
                own[(own == edit.cluster) & listed.to_numpy(zero_copy_only=False)] = count
                count += 1
        found[named] = own
        return found


def read_overlay(run: Run) -> tuple[Overlay, str | None]:
    """Return the edits of a run and the version of their file, for `write_overlay`; no edits and None without a file.

    Raises:
        ArtefactError: it is not an overlay.
    """
    found = storage.read_versioned(run.overlay)
    if found is None:
        return Overlay(), None
    try:
        return Overlay.model_validate(storage.read_json(run.overlay, found[0])), found[1]
    except ValidationError as error:
        raise ArtefactError(f"{run.overlay}: is not a list of edits: {format_error(error, ())}") from None


def write_overlay(run: Run, overlay: Overlay, version: str | None) -> str:
    """Write the edits of a run if nobody else did since they were read; return the new version.

    Raises:
        HeldError: somebody did.
    """
    data = storage.canonical_json(overlay.model_dump(mode="json")).encode()
    written = storage.put_if_match(run.overlay, data, version)
    if written is None:
        raise HeldError(f"{run.overlay}: somebody else has edited the clusters meanwhile; load them again")
    return written


def refit(overlay: Overlay, assign: str, clusters: int, cluster_of: Mapping[str, int]) -> Overlay:
    """Return the overlay for another assignment of the rows; what no longer fits goes to `unfit` with the reason.

    A cluster is found again where most of its typical images lie now. If those of several lie in one, it belongs to
    the one with most of them, and edits of the others do not fit, unless they were merged.

    Args:
        overlay: of the earlier assignment.
        assign: content digest of the new one.
        clusters: K of the new one.
        cluster_of: cluster of each key of fingerprints and splits in the new one; keys that are gone are missing.
    """
    # 1. Where each old cluster lies, and to which old cluster each of these places belongs above all.
    now, owner, most = dict[int, int](), dict[int, int](), dict[int, int]()
    for cluster, keys in sorted(overlay.fingerprints.items()):
        counts = Counter(cluster_of[key] for key in keys if key in cluster_of)
        where, images = counts.most_common(1)[0] if counts else (0, 0)
        if images > MAJORITY * len(keys):
            now[cluster] = where
            if images > most.get(where, 0):
                owner[where], most[where] = cluster, images
    # 2. The edits, as far as they fit.
    final = Edited.by(overlay.edits, overlay.clusters).final
    kept, unfit, old_split, new_split = list[Edit](), list(overlay.unfit), overlay.clusters, clusters
    for edit in overlay.edits:
        current = Edited.by(kept, clusters)
        try:
            lost = [k for k in clusters_named(edit) if k not in now]
            if lost:
                raise ConfigError(f"the typical images of cluster {lost[0]} no longer lie together")
            if isinstance(edit, Merge):
                some = dict.fromkeys(int(current.final[now[k]]) for k in edit.clusters)
                # Clusters that have become one need no merge.
                kept += [Merge(clusters=tuple(some))] if len(some) > 1 else []
                continue
            where = now[edit.cluster]
            if edit.cluster < overlay.clusters and final[owner[where]] != final[edit.cluster]:
                raise ConfigError(f"cluster {edit.cluster} lies in cluster {where} with cluster {owner[where]}")
            cluster = int(current.final[where])
            if isinstance(edit, Split):
                there = [key for key in edit.keys if key in cluster_of]
                places = np.array([cluster_of[key] for key in there], np.int32)
                inside = current.of(places, pa.array(there, pa.string()))
                if not (inside == cluster).any():
                    raise ConfigError(f"none of its {len(edit.keys)} images lies in cluster {cluster} any more")
                now[old_split] = new_split
                new_split += 1
            kept.append(edit.model_copy(update={"cluster": cluster}))
        except ConfigError as error:
            unfit.append(Unfit(edit=edit, reason=str(error)))
        finally:
            old_split += isinstance(edit, Split)
    # 3. The images by which each is found after the next assignment.
    fingerprints = dict[int, tuple[str, ...]]()
    for cluster, own in overlay.fingerprints.items():
        if cluster in now:
            fingerprints[now[cluster]] = fingerprints.get(now[cluster], ()) + own
    return Overlay(assign=assign, clusters=clusters, fingerprints=fingerprints, edits=tuple(kept), unfit=tuple(unfit))
