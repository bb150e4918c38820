"""label: what each cluster shows: its most typical images, its least certain ones, a name where words are given."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from rayclust.config import RunConfig
from rayclust.errors import ConfigError
from rayclust.features import FeatureTransform
from rayclust.language.exemplars import TopRows, typicality
from rayclust.language.naming import ClusterName, cluster_votes, name_clusters
from rayclust.stages.cluster import run_remotely
from rayclust.stages.outputs import put_table
from rayclust.stages.pipeline import StageContext, StageResult
from rayclust.stages.rows import row_starts, transform_of
from rayclust.stages.units import Unit, UnitResult, run_units
from rayclust.stages.words import embedded, read_vocabulary, vocabulary_kind
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import digest_of

logger = logging.getLogger(__name__)

BINS = 20
"""Equal bins of the histogram of confidence over [0, 1]."""


def run(context: StageContext) -> StageResult:
    """Finds exemplars and outliers in one worker, lets the images vote part by part, and writes one line a cluster."""
    encode, config = context.inputs["encode"], context.config
    job = _Job(context.run, config, row_starts(encode), transform_of(encode, config.features))
    names = _names(context, job)
    found: _Extremes = run_remotely(_extremes, job)
    sizes = context.inputs["assign"].extra["sizes"]
    rows = [
        {
            "cluster": cluster,
            "size": size,
            "name": names[cluster].name,
            "score": names[cluster].score,
            "runners_up": [{"name": name, "score": score} for name, score in names[cluster].runners_up],
            "exemplars": found.exemplars[cluster],
            "outliers": found.outliers[cluster],
        }
        for cluster, size in enumerate(sizes)
    ]
    outputs = put_table(context.run, context.run.clusters, pa.Table.from_pylist(rows, schema=tables.CLUSTERS))
    named = sum(name.name is not None for name in names)
    extra = {"confidence": found.histogram, "mean_confidence": found.confidence}
    summary = f"{named} of {len(rows)} clusters named" if named else f"{len(rows)} clusters, no vocabulary"
    return StageResult(outputs, {"clusters": len(rows), "named": named}, extra, summary)


@dataclass(frozen=True)
class _Job:
    """What the workers need to know."""

    run: Run
    config: RunConfig
    starts: list[int]
    transform: FeatureTransform

    def part(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Float16[B D] embeddings, Int32[B] clusters and Float32[B] confidence of one part."""
        embeddings = tables.matrix(tables.read_table(self.run.embeddings(index), ["embedding"])["embedding"])
        assigned = tables.read_table(self.run.assignments(index), ["cluster", "confidence"])
        return embeddings, assigned["cluster"].to_numpy(), assigned["confidence"].to_numpy()


@dataclass(frozen=True)
class _Extremes:
    exemplars: list[list[int]]
    outliers: list[list[int]]
    confidence: list[float | None]
    """Mean of each cluster; None for an empty one."""
    histogram: list[int]


def _extremes(job: _Job) -> _Extremes:
    """Two passes: the clusters' mean directions, then each image's cosine to its own."""
    count, label = job.config.method.clusters, job.config.label
    typical, odd = TopRows(label.exemplars), TopRows(label.outliers, largest=False)
    sums, confidence, sizes, histogram = _sums(job, count)
    for index, start in enumerate(job.starts[:-1]):
        embeddings, clusters, certain = job.part(index)
        rows = np.arange(start, start + len(clusters))
        typical.update(rows, clusters, typicality(job.transform(embeddings), clusters, sums))
        odd.update(rows, clusters, certain)
    exemplars = [typical.of(cluster) for cluster in range(count)]
    outliers = [_apart(odd.of(cluster), exemplars[cluster]) for cluster in range(count)]
    means = [float(c / n) if n else None for c, n in zip(confidence, sizes, strict=True)]
    return _Extremes(exemplars, outliers, means, histogram.tolist())


def _sums(job: _Job, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Float64[K D] sums of features, Float64[K] of confidence, Int64[K] sizes, Int64[BINS] images by confidence."""
    confidence, sizes, histogram = np.zeros(count), np.zeros(count, np.int64), np.zeros(BINS, np.int64)
    sums: Any = 0.0
    for index in range(len(job.starts) - 1):
        embeddings, clusters, certain = job.part(index)
        place = (clusters, np.arange(len(clusters)))
        members = sparse.csr_array((np.ones(len(clusters)), place), shape=(count, len(clusters)))
        sums = sums + members @ job.transform(embeddings).astype(np.float64)
        confidence += np.bincount(clusters, certain, count)
        sizes += np.bincount(clusters, minlength=count)
        histogram += np.histogram(certain, BINS, (0, 1))[0]
    return sums, confidence, sizes, histogram


def _apart(outliers: list[int], exemplars: list[int]) -> list[int]:
    """Outliers of a cluster so small that its exemplars are all there is would show the same images twice."""
    others = [row for row in outliers if row not in set(exemplars)]
    return others or outliers[:1]


def _names(context: StageContext, job: _Job) -> list[ClusterName]:
    """Each cluster's name by the vote of its images; without a vocabulary, no names."""
    count = job.config.method.clusters
    words = read_vocabulary(job.config)
    if words is None:
        return [ClusterName(None, None, ())] * count
    scratch = context.run.at("label", context.digest)
    votes = _Votes(job, scratch, vocabulary_kind(job.config))
    run_remotely(votes.prepare)
    parts = context.inputs["encode"].extra["parts"]
    units = [Unit(i, digest_of([context.digest, i]), size=rows) for i, rows in enumerate(parts)]
    run_units(context.run, "label", units, votes.vote)
    sizes = np.array(context.inputs["assign"].extra["sizes"])
    names: list[ClusterName] = run_remotely(votes.count, len(units), sizes, words.words)
    # Markers first: without them the votes are cast again, without the votes they would stand for nothing.
    filesystem.remove_tree(context.run.at("manifests", "label"))
    filesystem.remove_tree(context.run.at("label"))
    return names


class _Votes:
    """Votes of each part as a table (cluster, word, mass) in a folder that goes when they are counted."""

    def __init__(self, job: _Job, folder: str, kind: str) -> None:
        self._job, self._folder = job, folder
        space = job.config.label.space
        # Words that come with embeddings were made for features; a text tower's share the encoder's own space.
        self._in_features = space == "features" or (space == "auto" and kind == "embeddings")

    def prepare(self) -> None:
        """Writes the words with their embeddings, once, for all workers."""
        words = read_vocabulary(self._job.config)
        if words is None:
            raise ConfigError("label.vocabulary = none: there is nothing to vote for")
        tables.write_table(self._at("words.parquet"), embedded(self._job.config, words))

    def vote(self, unit: Unit) -> UnitResult:
        """The votes of one part's images."""
        nouns = tables.matrix(tables.read_table(self._at("words.parquet"), ["embedding"])["embedding"])
        embeddings, clusters, _ = self._job.part(unit.index)
        label, count = self._job.config.label, self._job.config.method.clusters
        transform = self._job.transform if self._in_features else None
        votes = cluster_votes(embeddings, clusters, nouns, count, transform=transform, scale=label.scale).tocoo()
        table = pa.table({"cluster": votes.coords[0], "word": votes.coords[1], "mass": votes.data})
        outputs = put_table(self._job.run, self._at(f"votes-{unit.index:05d}.parquet"), table)
        return UnitResult(outputs, {"rows": len(clusters)})

    def count(self, parts: int, sizes: np.ndarray, words: tuple[str, ...]) -> list[ClusterName]:
        """The names by all votes together."""
        total = sparse.csr_array((len(sizes), len(words)))
        for index in range(parts):
            table = tables.read_table(self._at(f"votes-{index:05d}.parquet"))
            place = (table["cluster"].to_numpy(), table["word"].to_numpy())
            total = total + sparse.csr_array((table["mass"].to_numpy(), place), shape=total.shape)
        return name_clusters(total, sizes, words, unique=self._job.config.label.unique)

    def _at(self, name: str) -> str:
        return filesystem.join(self._folder, name)
