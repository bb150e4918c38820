"""The images that the report shows: what the tables say of their rows, and their thumbnails.

Memory holds some hundred bytes for each; thumbnails lie in a temporary file.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rayclust.arrays import unit_rows
from rayclust.report import model
from rayclust.report.formats import percent
from rayclust.report.thumbnails import thumbnail
from rayclust.runtime.pipeline import StageContext
from rayclust.runtime.rows import part_features, row_starts, rows_by_part, table_at, transform_of
from rayclust.runtime.spaces import learnt_index
from rayclust.search.knn import top_k
from rayclust.stages.figures import PRECISION_AT, TITLES, numbers
from rayclust.store import tables
from rayclust.store.manifest import AssignOutputs, read_json_output
from rayclust.store.sources import fetch_many
from rayclust.store.storage import prefetch

if TYPE_CHECKING:
    from rayclust.search.index import VectorIndex  # brings faiss

NEIGHBORS = 6
"""Nearest images shown of each."""
BORDER = 2
"""An uncertain image is a borderline one if so many of them lie in one other cluster, else an outlier."""
NEAREST = 5
"""Nearest clusters shown of each."""
FETCHED = 64
"""Images that are in memory at once for each reader, …"""
READERS = 8
"""… and readers."""
MAP_POINTS = 200_000
"""Most points of the map."""


@dataclass(frozen=True)
class Thumbnails:
    """Thumbnails by row, in an unnamed temporary file."""

    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    """Closed with the object, at the end of the stage."""
    spans: dict[int, slice] = field(default_factory=dict)
    """Where each lies in the file."""

    def add(self, row: int, data: bytes) -> None:
        """Store the thumbnail of a row."""
        start = self.file.seek(0, io.SEEK_END)
        self.spans[row] = slice(start, start + self.file.write(data))

    def get(self, row: int) -> bytes | None:
        """Return the thumbnail of a row; None where it has none."""
        span = self.spans.get(row)
        if span is None:
            return None
        self.file.seek(span.start)
        return self.file.read(span.stop - span.start)


@dataclass(frozen=True)
class ShownRows:
    """Rows with pictures, sorted, and what is known of each."""

    rows: NDArray[np.int64]
    records: pa.Table
    """key, uri, label, cluster, confidence and a column for each coarser level."""
    near: NDArray[np.int64]
    """Int64[n M], the nearest rows, −1 for none, …"""
    cosines: NDArray[np.floating[Any]]
    """… Float[n M] …"""
    near_clusters: NDArray[np.int32]
    """… and Int32[n M], −1 for none."""
    thumbnails: Thumbnails
    learnt: VectorIndex | None = None
    """See `learnt_index`."""

    def picture(self, row: int) -> model.Picture:
        """Return one of the rows as the page shows it."""
        place = int(np.searchsorted(self.rows, row))
        near = zip(
            self.near[place].tolist(), self.near_clusters[place].tolist(), self.cosines[place].tolist(), strict=True
        )
        key, uri, label, confidence = (
            self.records[name][place].as_py() for name in ("key", "uri", "label", "confidence")
        )
        return model.Picture(
            key=key,
            uri=uri,
            label=label,
            confidence=confidence,
            row=row,
            thumbnail=self.thumbnails.get(row),
            neighbors=tuple((other, cluster, cosine) for other, cluster, cosine in near if cluster >= 0),
        )

    def gallery(self, typical: Sequence[int], uncertain: Sequence[int]) -> model.Gallery:
        """Return rows of one cluster as its images; the uncertain ones are borderline where another cluster is near."""
        borderline, outliers = list[model.Picture](), list[model.Picture]()
        for row in uncertain:
            place = int(np.searchsorted(self.rows, row))
            others = self.near_clusters[place]
            others = others[(others >= 0) & (others != self.records["cluster"][place].as_py())]
            is_border = len(others) > 0 and np.unique(others, return_counts=True)[1].max() >= BORDER
            (borderline if is_border else outliers).append(self.picture(row))
        return model.Gallery(
            typical=tuple(map(self.picture, typical)), borderline=tuple(borderline), outliers=tuple(outliers)
        )


def show_rows(context: StageContext, rows: NDArray[np.int64]) -> ShownRows:
    """Gather what the page says of rows, Int64[n] sorted, and fetch their images."""
    run, starts = context.run, row_starts(context.inputs["encode"])
    levels = [tables.level_column(size) for size in context.inputs["assign"].outputs_of(AssignOutputs).levels]
    records = table_at(run.rows, starts, rows, ["key", "uri", "label"])
    assigned = table_at(run.assignments, starts, rows, ["cluster", "confidence", *levels])
    for name in assigned.column_names:
        records = records.append_column(name, assigned[name])
    # Neighbours and their clusters.
    near: NDArray[np.int64]
    cosines: NDArray[np.floating[Any]]
    if (learnt := learnt_index(context.config)) is not None:
        near, cosines = learnt.neighbors(rows, NEIGHBORS)
    else:
        table = table_at(run.neighbors, starts, rows, ["neighbors", "similarity"])
        near, cosines = (tables.matrix(table[name])[:, :NEIGHBORS] for name in ("neighbors", "similarity"))
    others = np.unique(near[near >= 0])
    of = table_at(run.assignments, starts, others, ["cluster"])["cluster"].to_numpy()
    clusters = np.full(near.shape, -1, np.int32)
    clusters[near >= 0] = of[np.searchsorted(others, near[near >= 0])]
    # Thumbnails: none for ready embeddings, or images that have been moved since. Files are fetched side by side, what
    # lies in one tar or table together, so many at once that memory holds them.
    together: dict[str, list[tuple[str, int]]] = {}
    for uri, row in zip(records["uri"].to_pylist(), rows.tolist(), strict=True):
        file, inside, _ = uri.partition("#")
        together.setdefault(file if inside else "", []).append((uri, row))
    chunks = [group[i : i + FETCHED] for group in together.values() for i in range(0, len(group), FETCHED)]
    config, thumbnails = context.config, Thumbnails()

    def fetch(chunk: list[tuple[str, int]]) -> dict[str, bytes]:
        found = fetch_many([uri for uri, _ in chunk], config.images.columns)
        return {uri: thumbnail(data, config.report.thumbnail) for uri, data in found if data is not None}

    for chunk, found in prefetch(fetch, chunks, READERS):
        for uri, row in chunk:
            if uri in found:
                thumbnails.add(row, found[uri])
    return ShownRows(rows, records, near, cosines, clusters, thumbnails, learnt)


def nearest_clusters(
    context: StageContext, typical: dict[int, list[int]], learnt: VectorIndex | None
) -> dict[int, tuple[tuple[int, float], ...]]:
    """Return (cluster, cosine) of the clusters nearest to each by the mean direction of their typical rows.

    Args:
        context: of the stage.
        typical: rows by cluster, without empty clusters.
        learnt: of `learnt_index`.
    """
    ids, encode = np.array(sorted(typical)), context.inputs["encode"]
    if len(ids) < 2:
        return {}
    rows = np.concatenate([typical[k] for k in ids.tolist()])
    owners = np.repeat(np.arange(len(ids)), [len(typical[k]) for k in ids.tolist()])
    order = rows.argsort()
    rows, owners = rows[order], owners[order]
    # 1. Mean directions, Float32[K D].
    if learnt is not None:
        blocks = iter([learnt.vectors(rows)])
    else:
        transform = transform_of(encode, context.config.features)
        parts = rows_by_part(row_starts(encode), rows)
        blocks = (part_features(context.run, part, transform)[local] for part, local in parts)
    means, done = np.zeros(0, np.float32), 0
    for features in blocks:
        if not done:
            means = np.zeros((len(ids), features.shape[1]), np.float32)
        np.add.at(means, owners[done : done + len(features)], unit_rows(features))
        done += len(features)
    # 2. The nearest others.
    unit = torch.from_numpy(unit_rows(means).astype(np.float32))
    found, cosines = top_k(unit, unit, min(NEAREST, len(ids) - 1), query_ids=torch.arange(len(ids)))
    pairs = zip(ids[found.numpy()].tolist(), cosines.tolist(), strict=True)
    return {k: tuple(zip(*pair, strict=True)) for k, pair in zip(ids.tolist(), pairs, strict=True)}


def map_points(context: StageContext, shown: NDArray[np.int64]) -> model.MapPoints:
    """Return the map of all rows with how to read it; of many, of those with pictures and an even sample of the others.

    Args:
        context: of the stage.
        shown: Int64[n] sorted, rows with pictures.
    """
    # 1. How to read it.
    run, starts = context.run, row_starts(context.inputs["encode"])
    summary = read_json_output(run, "figures", numbers(run, "summary.json"))
    space = TITLES[summary["spaces"][-1]]
    text = (
        f"PaCMAP of {space}, in the colours of the clusters. Neighbours are alike; far groups' distances mean little."
    )
    if summary["precision"]:
        shares = ", ".join(f"{percent(share)} for {TITLES[name]}" for name, share in summary["precision"].items())
        text += f" Of the {PRECISION_AT} nearest images of a sample, so many have the image's own class: {shares}."
    # 2. Its points.
    if starts[-1] <= MAP_POINTS:
        rows = np.arange(starts[-1])
    else:
        rng = np.random.default_rng(context.config.seed)
        drawn = rng.choice(starts[-1], max(0, MAP_POINTS - len(shown)), replace=False, shuffle=False)
        rows = np.union1d(shown, drawn)[:MAP_POINTS]
    places = table_at(run.map, starts, rows, ["x", "y"])
    return model.MapPoints(
        row=rows,
        cluster=table_at(run.assignments, starts, rows, ["cluster"])["cluster"].to_numpy(),
        x=places["x"].to_numpy(),
        y=places["y"].to_numpy(),
        keys=table_at(run.rows, starts, rows, ["key"])["key"].to_pylist(),
        title=f"Map of {space}",
        text=text,
    )
