"""figures: the numbers behind the figures of a run, on seeded samples of its rows; the report draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from rayclust.config import RunConfig
from rayclust.estimators import KMeans
from rayclust.features import FeatureTransform
from rayclust.methods.base import Method
from rayclust.metrics.affinity import absolute_gram, kernel_membership, neighbor_precision, similar_order
from rayclust.metrics.spectra import directions, singular_values
from rayclust.report.projection import planar_map
from rayclust.runtime.artefacts import Outputs, put_json, put_table
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.models import load_method, transform_rows
from rayclust.runtime.pipeline import Stage, StageContext, StageResult, content_digest, settings_of
from rayclust.runtime.rows import features_at, labels_at, row_starts, transform_of
from rayclust.store import tables
from rayclust.store.layout import Run

MAP_ROWS = 3000
"""Rows of the map and of the spectrum of all rows."""
HEAT_ROWS = 400
"""Rows of the heat-maps."""
CLUSTERS = 24
"""Clusters in the heat-maps and spectra; of more, as many are drawn by lot."""
CLUSTER_ROWS = 200
"""Rows of a cluster's spectrum."""
KERNEL_TEMPERATURE = 0.1
"""Of the softmax that stands for Π where a method has none."""
PRECISION_AT = 10

FEATURES, OWN = "features", "z"
"""The spaces: what methods see of the encoder's rows, and the method's own."""


def run(context: StageContext) -> StageResult:
    """Measures in one worker; two whole numbers a row are all it holds of N, besides the samples."""
    encode, config = context.inputs["encode"], context.config
    model = content_digest(context.inputs["train"])
    job = _Job(context.run, config, row_starts(encode), transform_of(encode, config.features), model)
    outputs, summary = run_remotely(_measure, job)
    return StageResult(outputs, {"rows": summary["rows"]}, {}, f"of {summary['rows']:,} rows")


@dataclass(frozen=True)
class _Job:
    """What the worker needs to know."""

    run: Run
    config: RunConfig
    starts: list[int]
    transform: FeatureTransform
    model: str


@dataclass(frozen=True)
class Lot:
    """The rows that were drawn."""

    spread: np.ndarray
    """Int64[m], sorted: evenly from all rows."""
    members: dict[int, np.ndarray]
    """Cluster → Int64[m], sorted: rows of the clusters drawn."""

    @property
    def rows(self) -> np.ndarray:
        """All of them, sorted, each once."""
        return np.unique(np.concatenate([self.spread, *self.members.values()]))


def draw(clusters: np.ndarray, seed: int) -> Lot:
    """Draws rows, and of many clusters some.

    Args:
        clusters: Int[N].
        seed: the run's.
    """
    rng = np.random.default_rng(seed)
    spread = np.sort(rng.choice(len(clusters), min(MAP_ROWS, len(clusters)), replace=False))
    occupied = np.unique(clusters)
    some = np.sort(rng.choice(occupied, min(CLUSTERS, len(occupied)), replace=False))
    members = {}
    for cluster in some.tolist():
        own = np.flatnonzero(clusters == cluster)
        members[cluster] = np.sort(rng.choice(own, min(CLUSTER_ROWS, len(own)), replace=False))
    return Lot(spread, members)


def _measure(job: _Job) -> tuple[Outputs, dict[str, Any]]:
    torch.set_num_threads(1)
    clusters = _clusters(job)
    lot = draw(clusters, job.config.seed)
    rows = lot.rows
    features = features_at(job.run, job.starts, job.transform, rows)
    method = load_method(job.run.uri, job.model)
    spaces = {FEATURES: features}
    if method.own_space is not None:
        spaces[OWN] = transform_rows(method, features)
    at = {int(row): place for place, row in enumerate(rows)}
    spread = np.array([at[row] for row in lot.spread.tolist()])
    members = {k: np.array([at[row] for row in own.tolist()]) for k, own in lot.members.items()}
    groups = _heat_groups(spaces[list(spaces)[-1]], members)
    heat, membership = _heat(spaces, groups, method, rows)
    places = planar_map(spaces[list(spaces)[-1]][spread], job.config.seed)
    columns = {"row": lot.spread, "cluster": clusters[lot.spread], "x": places[:, 0], "y": places[:, 1]}
    spectra = _spectra(spaces, spread, members, job.config.method.clusters, job.config.seed)
    summary = {
        "rows": len(rows),
        "spaces": list(spaces),
        "membership": membership,
        "clusters": len(np.unique(clusters)),
        "precision": _precision(job, spaces, lot.spread, spread),
        "directions": {name: directions(singular_values(x[spread])) for name, x in spaces.items()},
    }
    found = {"map": pa.table(columns), "heat": heat, "spectra": spectra}
    outputs: Outputs = put_json(job.run, numbers(job.run, "summary.json"), summary)
    for name, table in found.items():
        outputs |= put_table(job.run, numbers(job.run, f"{name}.parquet"), table)
    return outputs, summary


def numbers(run: Run, name: str) -> str:
    """Where numbers behind figures lie: `map.parquet`, `heat.parquet`, `spectra.parquet`, `summary.json`."""
    return run.at("figures", name)


def _clusters(job: _Job) -> np.ndarray:
    """Int32[N]."""
    clusters = np.empty(job.starts[-1], np.int32)
    for part, start in enumerate(job.starts[:-1]):
        clusters[start : job.starts[part + 1]] = tables.read_table(job.run.assignments(part), ["cluster"])["cluster"]
    return clusters


def _heat_groups(x: np.ndarray, members: dict[int, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """Clusters in an order in which alike ones are side by side, each with its share of the rows, at least two."""
    total = sum(map(len, members.values()))
    keys = list(members)
    order = similar_order(np.stack([x[members[k]].mean(axis=0) for k in keys]))
    shares = {k: max(2, round(HEAT_ROWS * len(members[k]) / max(total, HEAT_ROWS))) for k in keys}
    return [(keys[i], members[keys[i]][: shares[keys[i]]]) for i in order]


def _heat(
    spaces: dict[str, np.ndarray], groups: Sequence[tuple[int, np.ndarray]], method: Method, rows: np.ndarray
) -> tuple[pa.Table, str]:
    """The matrices of the heat-maps as a table of rows, and where Π comes from: the method's `codes` or a `kernel`."""
    places = np.concatenate([own for _, own in groups])
    columns: dict[str, Any] = {
        "row": rows[places],
        "cluster": np.concatenate([np.full(len(own), k, np.int32) for k, own in groups]),
    }
    for name, x in spaces.items():
        columns[name] = _halves(absolute_gram(x[places]))
    with torch.inference_mode():
        found = method.membership(torch.from_numpy(spaces[FEATURES][places]))
    kernel = kernel_membership(spaces[FEATURES][places], KERNEL_TEMPERATURE)
    columns["membership"] = _halves(kernel if found is None else found.double().numpy())
    return pa.table(columns), "kernel" if found is None else "codes"


def _halves(matrix: np.ndarray) -> pa.Array:
    return tables.fixed_list(matrix.astype(np.float16))


def _spectra(
    spaces: dict[str, np.ndarray], spread: np.ndarray, members: dict[int, np.ndarray], count: int, seed: int
) -> pa.Table:
    """Singular values of all rows drawn and of each cluster drawn: space, membership, cluster (null: all), values."""
    lines: list[dict[str, Any]] = []

    def add(space: str, membership: str, groups: dict[int, np.ndarray]) -> None:
        for cluster, own in groups.items():
            values = singular_values(spaces[space][own]).astype(np.float32)
            lines.append({"space": space, "membership": membership, "cluster": cluster, "values": values})

    for space, x in spaces.items():
        values = singular_values(x[spread]).astype(np.float32)
        lines.append({"space": space, "membership": None, "cluster": None, "values": values})
        add(space, "own", members)
    if OWN in spaces and 2 <= count <= len(spread) // 20:
        # The paper compares the method's clusters of z with what k-means makes of the encoder's rows.
        add(FEATURES, "kmeans", dict(_kmeans_members(spaces[FEATURES], spread, count, seed)))
    schema = pa.schema(
        [
            pa.field("space", pa.string(), nullable=False),
            pa.field("membership", pa.string()),
            pa.field("cluster", pa.int32()),
            pa.field("values", pa.list_(pa.field("element", pa.float32())), nullable=False),
        ]
    )
    return pa.Table.from_pylist(lines, schema=schema)


def _kmeans_members(x: np.ndarray, spread: np.ndarray, count: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    labels = KMeans(n_clusters=count, random_state=seed).fit_predict(x[spread])
    for cluster in np.unique(labels)[:CLUSTERS].tolist():
        yield cluster, spread[labels == cluster][:CLUSTER_ROWS]


def _precision(job: _Job, spaces: dict[str, np.ndarray], rows: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """Precision@10 within the rows drawn from all, by space; nothing without labels."""
    labels = labels_at(job.run, job.starts, rows)
    known = np.array([label is not None for label in labels])
    if known.sum() < 2:
        return {}
    codes = np.unique(np.array([label or "" for label in labels])[known], return_inverse=True)[1]
    return {name: neighbor_precision(x[places[known]], codes, PRECISION_AT) for name, x in spaces.items()}


def _settings(config: RunConfig) -> dict[str, Any]:
    return {"features": settings_of(config.features), "seed": config.seed}


STAGE = Stage("figures", _settings, run, needs=("encode", "train", "assign"))
