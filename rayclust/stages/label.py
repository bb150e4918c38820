"""label: what each cluster shows: its most typical images, its least certain ones, a name where words are given."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from rayclust.config import RunConfig
from rayclust.features import FeatureTransform
from rayclust.language.exemplars import TopRows, typicality
from rayclust.language.naming import ClusterName
from rayclust.stages.cluster import run_remotely
from rayclust.stages.outputs import put_table
from rayclust.stages.pipeline import StageContext, StageResult
from rayclust.stages.rows import row_starts, transform_of
from rayclust.stages.units import Unit, run_units
from rayclust.stages.votes import WITHOUT_CLASSES, Votes
from rayclust.stages.words import kinds
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
    names, said = _names(context, job)
    found: _Extremes = run_remotely(_extremes, job)
    sizes = context.inputs["assign"].extra["sizes"]
    blind = names.get(WITHOUT_CLASSES)
    rows = [
        {
            "cluster": cluster,
            "size": size,
            "name": names["all"][cluster].name,
            "score": names["all"][cluster].score,
            "runners_up": [{"name": name, "score": score} for name, score in names["all"][cluster].runners_up],
            "name_without_classes": blind[cluster].name if blind else None,
            "score_without_classes": blind[cluster].score if blind else None,
            "exemplars": found.exemplars[cluster],
            "outliers": found.outliers[cluster],
        }
        for cluster, size in enumerate(sizes)
    ]
    outputs = put_table(context.run, context.run.clusters, pa.Table.from_pylist(rows, schema=tables.CLUSTERS))
    named = sum(name.name is not None for name in names["all"])
    extra = {"confidence": found.histogram, "mean_confidence": found.confidence} | said
    return StageResult(outputs, {"clusters": len(rows), "named": named}, extra, _summary(named, len(rows), said))


def _summary(named: int, clusters: int, said: dict[str, Any]) -> str:
    if not named:
        return f"{clusters} clusters, no vocabulary"
    text = f"{named} of {clusters} clusters named"
    if said["name_accuracy"] is not None:
        text += f", {said['name_accuracy']:.1%} of the images by their class's name"
    return text + (", with the data set's own class names among the words" if said["true_names"] else "")


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


def _names(context: StageContext, job: _Job) -> tuple[dict[str, list[ClusterName]], dict[str, Any]]:
    """Each cluster's name by the vote of its images, by naming, and what there is to say about them."""
    found = kinds(job.config)
    if not found:
        return {"all": [ClusterName(None, None, ())] * job.config.method.clusters}, {}
    votes = Votes(context.run, job.config, job.starts, job.transform, context.run.at("label", context.digest))
    words = run_remotely(votes.prepare)
    parts = context.inputs["encode"].extra["parts"]
    units = [Unit(i, digest_of([context.digest, i]), size=rows) for i, rows in enumerate(parts)]
    run_units(context.run, "label", units, votes.vote)
    names, voters = run_remotely(votes.count)
    said: dict[str, Any] = {"words": words, "voters": voters, "true_names": "classes" in found.values()}
    for naming, key in (("all", "name_accuracy"), (WITHOUT_CLASSES, f"name_accuracy_{WITHOUT_CLASSES}")):
        if naming in names:
            said[key] = run_remotely(votes.named_as_classes, [name.name for name in names[naming]])
    # Markers first: without them the votes are cast again, without the votes they would stand for nothing.
    filesystem.remove_tree(context.run.at("manifests", "label"))
    filesystem.remove_tree(context.run.at("label"))
    return names, said
