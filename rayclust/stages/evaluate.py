"""Stage `evaluate`: metrics of the partition, against labels where there are any and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayclust.config import RunConfig
from rayclust.features import FeatureTransform
from rayclust.methods.base import Membership
from rayclust.runtime.artefacts import put_json, put_table
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.models import load_method
from rayclust.runtime.pipeline import Stage, StageContext, StageResult, content_digest, settings_of
from rayclust.runtime.rows import features_at, row_starts, transform_of
from rayclust.store import tables
from rayclust.store.run import Run

MEMBERSHIP_ROWS = 1000
"""Rows of the seeded sample on which a method's Π is measured."""
EDGE = 0.1
"""Entries of Π, n × n, count as non-zero above this share of 1/n, the value of a uniform Π."""


def run(context: StageContext) -> StageResult:
    """Score the run in one worker, which holds two integers per row."""
    encode = context.inputs["encode"]
    starts = row_starts(encode)
    transform = transform_of(encode, context.config.features)
    sizes = context.inputs["assign"].extra["sizes"]
    levels = context.inputs["assign"].extra.get("levels", [])
    metrics: dict[str, Any] = run_remotely(_score, context.run, starts, transform, context.config)
    if levels:
        metrics["levels"] = run_remotely(_levels, context.run, starts, levels)
    if "train" in context.inputs:
        model = content_digest(context.inputs["train"])
        metrics |= run_remotely(_membership, context.run, starts, transform, context.config, model)
    counts = metrics.pop("contingency")
    metrics["sizes"] = sizes
    outputs = put_json(context.run, context.run.metrics, metrics)
    if counts is not None:
        outputs |= put_table(context.run, contingency_uri(context.run), counts)
    shown = [f"{name} {metrics[name]:.4f}" for name in ("accuracy", "nmi", "ari", "silhouette") if name in metrics]
    return StageResult(outputs, {"rows": starts[-1], "labelled": encode.counts["labelled"]}, {}, ", ".join(shown))


def contingency_uri(run: Run) -> str:
    """Return the URI of the contingency table of classes and clusters; it exists only where labels do."""
    return run.at("evaluation", "contingency.parquet")


def _score(run: Run, starts: list[int], transform: FeatureTransform, config: RunConfig) -> dict[str, Any]:
    from rayclust.metrics import internal

    clusters, codes, classes = _columns(run, starts)
    metrics: dict[str, Any] = {"rows": len(clusters), "clusters": config.method.clusters}
    labelled = codes >= 0
    metrics["contingency"] = None
    if labelled.any() and len(classes) > 1:
        metrics |= _against_labels(codes[labelled], clusters[labelled])
        metrics |= {"classes": len(classes), "labelled": int(labelled.sum())}
        metrics["contingency"] = _contingency(codes[labelled], clusters[labelled], classes)
        metrics |= _linear_probe(run, starts, transform, config, codes)
        if labelled.all():
            metrics["knn_accuracy"] = _probe(run, starts, codes, config.evaluate.probe_neighbors)
    sample = _sample(len(clusters), config)
    if len(sample) and len(np.unique(clusters[sample])) > 1:
        features = features_at(run, starts, transform, sample)
        metrics["silhouette"] = internal.silhouette(features, clusters[sample])
        metrics["silhouette_rows"] = len(sample)
    return metrics


def _membership(
    run: Run, starts: list[int], transform: FeatureTransform, config: RunConfig, model: str
) -> dict[str, float]:
    """Measure the membership Π of a sample of rows (labelled ones where there are), for methods that have one."""
    from rayclust.metrics import geometry

    torch.set_num_threads(1)
    method = load_method(run.uri, model)
    if not isinstance(method, Membership):
        return {}
    _, codes, classes = _columns(run, starts)
    is_labelled = len(classes) > 1
    known = np.flatnonzero(codes >= 0) if is_labelled else np.arange(len(codes))
    count = min(MEMBERSHIP_ROWS, len(known))
    rows = np.sort(np.random.default_rng(config.seed).choice(known, count, replace=False))
    with torch.inference_mode():
        found = method.membership(torch.from_numpy(features_at(run, starts, transform, rows)))
    matrix, least = found.double().numpy(), EDGE / count
    measured = {
        "membership_nonzeros": geometry.nonzeros(matrix, least),
        "membership_components": float(geometry.components(matrix, least)),
    }
    if is_labelled:
        measured["membership_detection_error"] = geometry.detection_error(matrix, codes[rows])
        measured["membership_wrong_edges"] = geometry.wrong_edges(matrix, codes[rows], least)
    return measured


def _levels(run: Run, starts: list[int], levels: list[int]) -> list[dict[str, Any]]:
    """Score the coarser levels, finest first."""
    found = []
    for size in levels:
        clusters, codes, classes = _columns(run, starts, tables.level_column(size))
        level: dict[str, Any] = {"clusters": size, "occupied": len(np.unique(clusters))}
        labelled = codes >= 0
        if labelled.any() and len(classes) > 1:
            level |= _against_labels(codes[labelled], clusters[labelled])
        found.append(level)
    return found


def _linear_probe(
    run: Run, starts: list[int], transform: FeatureTransform, config: RunConfig, codes: np.ndarray
) -> dict[str, float]:
    """Train a linear probe on half of a sample of the labelled rows and return its accuracy on the other half."""
    from rayclust.metrics.probes import linear_probe_accuracy

    known = np.flatnonzero(codes >= 0)
    wanted = min(config.evaluate.linear_probe_rows, len(known))
    if wanted < 2:
        return {}
    drawn = np.random.default_rng(config.seed).choice(known, wanted, replace=False)
    rows = np.sort(drawn)
    features, half = features_at(run, starts, transform, rows), np.isin(rows, drawn[: wanted // 2])
    return {
        "linear_probe": linear_probe_accuracy(features[half], codes[rows[half]], features[~half], codes[rows[~half]])
    }


def _against_labels(codes: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    from rayclust.metrics import external

    overclustered = len(np.unique(clusters)) > len(np.unique(codes))
    mapped = {
        "accuracy_held_out": external.halves_accuracy(codes, clusters),
        "accuracy_in_sample": external.in_sample_accuracy(codes, clusters),
    }
    return (mapped if overclustered else {}) | {
        "accuracy": external.accuracy(codes, clusters),
        "nmi": external.nmi(codes, clusters),
        "ari": external.ari(codes, clusters),
        "ami": external.ami(codes, clusters),
        "purity": external.purity(codes, clusters),
    }


def _contingency(codes: np.ndarray, clusters: np.ndarray, classes: list[str]) -> pa.Table:
    """Return the cells that are not empty, by class and cluster."""
    pairs, counts = np.unique(np.stack([codes, clusters]), axis=1, return_counts=True)
    return pa.table({"label": [classes[code] for code in pairs[0]], "cluster": pairs[1], "count": counts})


def _columns(run: Run, starts: list[int], column: str = "cluster") -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return Int32[N] clusters, Int32[N] label codes (−1 without a label), and the labels in order of their codes."""
    clusters = np.empty(starts[-1], np.int32)
    codes = np.full(starts[-1], -1, np.int32)
    known: dict[str, int] = {}
    for part, start in enumerate(starts[:-1]):
        stop = starts[part + 1]
        if stop == start:
            continue
        clusters[start:stop] = tables.read_table(run.assignments(part), [column])[column].to_numpy()
        labels = tables.read_table(run.embeddings(part), ["label"])["label"].combine_chunks().dictionary_encode()
        names = labels.dictionary.to_pylist()
        # The last place stands for null, whose index is filled with −1.
        own = np.array([known.setdefault(name, len(known)) for name in names] + [-1], np.int32)
        codes[start:stop] = own[labels.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return clusters, codes, list(known)


def _probe(run: Run, starts: list[int], codes: np.ndarray, neighbors: int) -> float:
    """Return the leave-one-out accuracy of the k-NN vote over all rows, part by part."""
    from rayclust.metrics import external

    right = 0.0
    for part, start in enumerate(starts[:-1]):
        stop = starts[part + 1]
        if stop == start:
            continue
        table = tables.read_table(run.neighbors(part), ["neighbors", "similarity"])
        ids, similarity = tables.matrix(table["neighbors"]), tables.matrix(table["similarity"])
        right += (stop - start) * external.knn_accuracy(ids, similarity, codes, codes[start:stop], k=neighbors)
    return right / starts[-1]


def _sample(count: int, config: RunConfig) -> np.ndarray:
    wanted = min(config.evaluate.silhouette_rows, count)
    return np.sort(np.random.default_rng(config.seed).choice(count, wanted, replace=False))


def _settings(config: RunConfig) -> dict[str, Any]:
    return {
        "evaluate": settings_of(config.evaluate),
        "features": settings_of(config.features),
        "seed": config.seed,
    }


STAGE = Stage(
    "evaluate", _settings, run, needs=("encode", "neighbors", "assign"), own_space_needs=("train",), revision=2
)
