"""figures: the numbers behind a run's figures, on seeded samples of its rows, and the figures drawn from them.

The stage measures; the report and `rayclust figures` draw, with the names that the clusters have by then.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import torch

from rayclust.config import RunConfig
from rayclust.features import SpaceTransforms
from rayclust.methods.base import Membership, Transform
from rayclust.metrics import geometry
from rayclust.metrics.selection import CRITERIA
from rayclust.report import charts, svg
from rayclust.report.formats import count, percent
from rayclust.report.model import Drawing
from rayclust.runtime.cluster import run_remotely
from rayclust.runtime.edits import shown_clusters
from rayclust.runtime.pipeline import (
    SELECT_K,
    Manifests,
    StageContext,
    StageResult,
    content_digest,
    run_stage,
)
from rayclust.runtime.rows import all_clusters, features_at, row_starts, table_at, transform_of
from rayclust.runtime.tensors import load_method, transform_rows
from rayclust.store import storage, tables
from rayclust.store.manifest import Outputs, put_json, put_table, read_json_output
from rayclust.store.run import Run

MAP_ROWS = 3000
"""Rows of the drawn map and of the spectrum of all rows."""
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
TITLES = {FEATURES: "encoder features", OWN: "z"}
_TABLES = ("map.parquet", "heat.parquet", "spectra.parquet")
_MEASURED = {
    "coding_length": "Coding length, nats per image",
    "feature_coding_length": "Coding length of the features",
    "eigengap": "Eigengap",
    "silhouette": "Silhouette",
    "calinski_harabasz": "Calinski–Harabasz",
    "davies_bouldin": "Davies–Bouldin",
    "neighbor_agreement": "Neighbour agreement",
    "modularity": "Modularity",
    "near_modularity": "Modularity, nearest 10",
    "map_equation": "Map equation",
    "stability": "Stability over seeds",
    "prediction_strength": "Prediction strength",
    "null_contrast": "Silhouette above null models",
    "resampled_silhouette": "Silhouette in subsamples",
    "umap_silhouette": "Silhouette in a UMAP",
}
"""Criteria of `selection.json` that are drawn, in order; sizes are left to the file."""


@dataclass(frozen=True)
class Sample:
    """The rows that are measured."""

    spread: np.ndarray
    """Int64[m], sorted: evenly from all rows."""
    members: dict[int, np.ndarray]
    """Cluster → Int64[m], sorted: rows of the clusters drawn."""
    rows: np.ndarray
    """Int64[m], sorted: all of these, each once."""


def run(context: StageContext) -> StageResult:
    """Measure in one worker, which holds two whole numbers a row of N, besides the samples."""
    encode, config = context.inputs["encode"], context.config
    model = content_digest(context.inputs["train"])
    transform = transform_of(encode, config.features)
    outputs, summary = run_remotely(_measure, context.run, config, row_starts(encode), transform, model)
    return StageResult(outputs, {"rows": summary["rows"]}, {}, f"of {summary['rows']:,} rows")


def numbers(run: Run, name: str) -> str:
    """Return the URI of `map.parquet`, `heat.parquet`, `spectra.parquet` or `summary.json`."""
    return run.at("figures", name)


def sample(clusters: np.ndarray, seed: int) -> Sample:
    """Draw rows, and of many clusters some, from the clusters of all rows, Int[N]."""
    rng = np.random.default_rng(seed)
    spread = np.sort(rng.choice(len(clusters), min(MAP_ROWS, len(clusters)), replace=False))
    occupied = np.unique(clusters)
    members = {}
    for cluster in np.sort(rng.choice(occupied, min(CLUSTERS, len(occupied)), replace=False)).tolist():
        rows = np.flatnonzero(clusters == cluster)
        members[cluster] = np.sort(rng.choice(rows, min(CLUSTER_ROWS, len(rows)), replace=False))
    return Sample(spread, members, np.unique(np.concatenate([spread, *members.values()])))


def _measure(
    run: Run, config: RunConfig, starts: list[int], transform: SpaceTransforms, model: str
) -> tuple[Outputs, dict[str, Any]]:
    torch.set_num_threads(1)
    clusters = all_clusters(run, starts)
    # 1. Draw rows, and give them in every space; from here on `spread` and `members` are places among them.
    drawn = sample(clusters, config.seed)
    rows = drawn.rows
    features = features_at(run, starts, transform, rows)
    method = load_method(run.uri, model)
    spaces = {FEATURES: features}
    if isinstance(method, Transform):
        spaces[OWN] = transform_rows(method, features)
    last = spaces[list(spaces)[-1]]
    spread = np.searchsorted(rows, drawn.spread)
    members = {k: np.searchsorted(rows, chosen) for k, chosen in drawn.members.items()}
    # 2. Heat-maps: clusters in an order in which alike ones are side by side, each with its share of the rows.
    keys, total = list(members), sum(map(len, members.values()))
    order = geometry.similar_order(np.stack([last[members[k]].mean(axis=0) for k in keys]))
    shares = {k: max(2, round(HEAT_ROWS * len(members[k]) / max(total, HEAT_ROWS))) for k in keys}
    groups = {keys[i]: members[keys[i]][: shares[keys[i]]] for i in order}
    places = np.concatenate(list(groups.values()))
    with torch.inference_mode():
        codes = method.membership(torch.from_numpy(features[places])) if isinstance(method, Membership) else None
    kernel = geometry.kernel_membership(last[places], KERNEL_TEMPERATURE)
    heat: dict[str, Any] = {
        "row": rows[places],
        "cluster": np.concatenate([np.full(len(group), k, np.int32) for k, group in groups.items()]),
    }
    matrices = {name: geometry.absolute_gram(x[places]) for name, x in spaces.items()}
    matrices["membership"] = kernel if codes is None else codes.double().numpy()
    heat |= {name: tables.fixed_list(matrix.astype(np.float16)) for name, matrix in matrices.items()}
    # 3. The map, with the share of neighbours in it that have a row's own class.
    flat = table_at(run.map, starts, drawn.spread, ["x", "y"])
    dots = {"row": drawn.spread, "cluster": clusters[drawn.spread], "x": flat["x"], "y": flat["y"]}
    labels = table_at(run.rows, starts, drawn.spread, ["label"])["label"].to_pylist()
    known = np.array([label is not None for label in labels])
    precision = {}
    if known.sum() > 1:
        classes = np.unique(np.array([label or "" for label in labels])[known], return_inverse=True)[1]
        precision = {
            name: geometry.neighbor_precision(x[spread[known]], classes, PRECISION_AT) for name, x in spaces.items()
        }
    summary = {
        "rows": len(rows),
        "spaces": list(spaces),
        "membership": "kernel" if codes is None else "codes",
        "clusters": len(np.unique(clusters)),
        "precision": precision,
        "directions": {name: geometry.directions(geometry.singular_values(x[spread])) for name, x in spaces.items()},
    }
    lines = _spectra(spaces, spread, members, config.method.clusters, config.seed)
    outputs: Outputs = put_json(run, numbers(run, "summary.json"), summary)
    for name, table in zip(_TABLES, (pa.table(dots), pa.table(heat), lines), strict=True):
        outputs |= put_table(run, numbers(run, name), table)
    return outputs, summary


def _spectra(
    spaces: dict[str, np.ndarray], spread: np.ndarray, members: dict[int, np.ndarray], count: int, seed: int
) -> pa.Table:
    """Return singular values of all rows and of each cluster: space, membership, cluster (null: all), values."""
    from rayclust.estimators import KMeans

    lines: list[dict[str, Any]] = []

    def add(space: str, membership: str | None, cluster: int | None, rows: np.ndarray) -> None:
        values = geometry.singular_values(spaces[space][rows]).astype(np.float32)
        lines.append({"space": space, "membership": membership, "cluster": cluster, "values": values})

    for space in spaces:
        add(space, None, None, spread)
        for cluster, rows in members.items():
            add(space, "own", cluster, rows)
    if OWN in spaces and 2 <= count <= len(spread) // 20:
        # The paper compares the method's clusters of z with what k-means makes of the encoder's rows.
        labels = KMeans(n_clusters=count, metric="cosine", random_state=seed).fit_predict(spaces[FEATURES][spread])
        for cluster in np.unique(labels)[:CLUSTERS].tolist():
            add(FEATURES, "kmeans", cluster, spread[labels == cluster][:CLUSTER_ROWS])
    values = pa.list_(pa.field("element", pa.float32()))
    fields = [pa.field("space", pa.string(), nullable=False), ("membership", pa.string()), ("cluster", pa.int32())]
    schema = pa.schema([*fields, pa.field("values", values, nullable=False)])
    return pa.Table.from_pylist(lines, schema=schema)


def export(config: RunConfig, out: str | None) -> list[str]:
    """Write the figures of a run as SVG files with the numbers behind them, after the stage figures where needed.

    Args:
        config: the run's.
        out: folder or URI; None takes the run's own `figures/`.

    Returns:
        URIs of the files.
    """
    if Manifests(config).of("figures") is None:  # the run is locked only where something is missing
        run_stage("figures", config)
    run = Run(config.run)
    chosen = Manifests(config).of(SELECT_K) if config.needs_selection else None
    selection = read_json_output(run, SELECT_K, run.selection) if chosen is not None else None
    folder = numbers(run, "") if out is None else storage.absolute(out)
    files = {f"{drawn.key}.svg": svg.standalone(drawn.svg, drawn.text).encode() for drawn in drawings(run, selection)}
    for name in _TABLES if out is not None else ():
        files[name] = storage.read_bytes(numbers(run, name))
    listed = {"map.csv": tables.read_table(numbers(run, "map.parquet"))}
    if selection is not None:
        listed["selection.csv"] = pa.Table.from_pylist(selection["candidates"])
    for name, table in listed.items():
        flat = [column for column in table.column_names if not pa.types.is_nested(table.schema.field(column).type)]
        buffer = io.BytesIO()
        pyarrow.csv.write_csv(table.select(flat), buffer)
        files[name] = buffer.getvalue()
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return [storage.join(folder, name) for name in files]


def drawings(run: Run, selection: Mapping[str, Any] | None = None) -> list[Drawing]:
    """Return the figures of a complete stage; `selection` is selection.json where the number of clusters was chosen."""
    summary = read_json_output(run, "figures", numbers(run, "summary.json"))
    dots, heat, lines = (tables.read_table(numbers(run, name)) for name in _TABLES)
    points = np.stack([dots["x"].to_numpy(), dots["y"].to_numpy()], axis=1)
    of_dots, of_heat = dots["cluster"].to_numpy(), heat["cluster"].to_numpy()
    # Two clusters of one name are shown with their numbers.
    edited = shown_clusters(run)
    stored = edited.names_of_own if edited else {}
    counts = Counter(stored.values())
    names = {
        k: f"Cluster {k}" if not (name := stored.get(k)) else name if counts[name] == 1 else f"{name} #{k}"
        for k in sorted({*of_dots.tolist(), *of_heat.tolist()})
    }
    hues = charts.hues(charts.centers(points, of_dots))
    clusters, first, sizes = np.unique(of_heat, return_index=True, return_counts=True)
    groups = [
        charts.Group(names[k := int(clusters[i])], int(sizes[i]), hues.get(k, k % len(svg.HUES)))
        for i in first.argsort()
    ]
    space = TITLES[summary["spaces"][-1]]
    text = (
        f"PaCMAP of {space} of {count(dots.num_rows)} images, in the colours of their clusters. Neighbours are alike; "
        "distances between far groups mean little."
    )
    if summary["precision"]:
        shares = ", ".join(f"{percent(share)} for {TITLES[name]}" for name, share in summary["precision"].items())
        text += f" Of the {PRECISION_AT} nearest among them, so many have the image's own class: {shares}."
    title = f"Map of {space}"
    chart = charts.scatter(points, of_dots, names, title=title)
    flat = Drawing(key="map", title=title, text=text, svg=chart)
    drawn = [*_heat_maps(heat, summary, groups), flat, _spectra_drawing(lines, summary)]
    return drawn if selection is None else [*drawn, _selection(selection)]


def _heat_maps(heat: pa.Table, summary: Mapping[str, Any], groups: Sequence[charts.Group]) -> list[Drawing]:
    """Return the drawings of |ZᵀZ| and of Π."""
    lot = ""
    if len(groups) != summary["clusters"]:
        lot = f" of {count(len(groups))} clusters, drawn by lot from {count(summary['clusters'])}"
    spaces = {space: tables.matrix(heat[space]).astype(np.float64) for space in summary["spaces"]}
    beside = (
        "Above: what the encoder gives. Below: the method's own space z."
        if OWN in spaces
        else "The method has no space of its own: these are the features that it saw."
    )
    gram_title, title = "Cosines between images, sorted by cluster", "Membership Π, sorted by cluster"
    gram_text = (
        f"Absolute cosines between {count(heat.num_rows)} images{lot}, whose unit rows are Z. {beside} "
        "Blocks that stand out on the diagonal are clusters in directions of their own."
    )
    seen = TITLES[summary["spaces"][-1]]
    source = (
        "by entropic optimal transport between the codes that the method computes of them"
        if summary["membership"] == "codes"
        else f"here by a softmax of cosine / {KERNEL_TEMPERATURE} of {seen} over each row"
    )
    text = (
        f"Π is how much each image belongs with each other one, {source}. Shown is n Π, over the n = "
        f"{count(heat.num_rows)} images of the other drawing{lot}: 1 is what chance gives."
    )
    panels = {f"|ZᵀZ| of {TITLES[space]}": matrix for space, matrix in spaces.items()}
    gram = charts.heatmap(panels, groups, ceiling=min(1.0, _ceiling(list(spaces.values()))), title=gram_title)
    matrix = tables.matrix(heat["membership"]).astype(np.float64) * heat.num_rows
    membership = charts.heatmap({"n Π": matrix}, groups, ceiling=_ceiling([matrix]), title=title)
    return [
        Drawing(key="gram", title=gram_title, text=gram_text, svg=gram),
        Drawing(key="membership", title=title, text=text, svg=membership),
    ]


def _ceiling(matrices: list[np.ndarray]) -> float:
    """Return a round value that all but the most extreme entries off the diagonal stay below."""
    high = [np.quantile(m[~np.eye(len(m), dtype=bool)], 0.995) for m in matrices if len(m) > 1]
    return svg.ticks(0.0, max([1e-6, *high]), 11)[-1]


def _spectra_drawing(lines: pa.Table, summary: Mapping[str, Any]) -> Drawing:
    spectra: dict[tuple[str, str | None], list[np.ndarray]] = {}
    for line in lines.to_pylist():
        spectra.setdefault((line["space"], line["membership"]), []).append(np.array(line["values"]))
    series = []
    for place, space in enumerate(summary["spaces"]):
        bands = geometry.quantiles(spectra[space, "own"], (0.1, 0.5, 0.9))
        series.append(charts.Spectrum(TITLES[space], place, spectra[space, None][0], bands))
    if (FEATURES, "kmeans") in spectra:
        values = geometry.quantiles(spectra[FEATURES, "kmeans"], (0.1, 0.5, 0.9))
        series.append(charts.Spectrum("encoder features, clusters of k-means", 2, None, values, is_dashed=True))
    title = "Singular values, over the largest"
    needed = ", ".join(f"{TITLES[space]} {n}" for space, n in summary["directions"].items())
    text = (
        "The faster a line falls, the fewer directions the rows take up. Below the median over clusters, with "
        f"the band that holds four fifths of them. Directions that hold 90% of the energy of all rows: {needed}."
    )
    return Drawing(key="singular-values", title=title, text=text, svg=charts.spectra(series, title))


def _selection(selection: Mapping[str, Any]) -> Drawing:
    knee, shown = selection.get("picks", {}).get("knee"), []
    for name, title in _MEASURED.items():
        values = {int(each["k"]): float(each[name]) for each in selection["candidates"] if each.get(name) is not None}
        if values:
            better = CRITERIA[name].larger_is_better if name in CRITERIA else None
            arrow, bend = {True: " ↑", False: " ↓", None: ""}[better], knee if name == "coding_length" else None
            shown.append(charts.Criterion(title + arrow, values, better, knee=bend))
    title = "Criteria against the number of clusters"
    text = (
        f"{count(selection['chosen'])} clusters were chosen (dashed): {selection['reason'].rstrip('.')}. Arrows say "
        "which end is better, large orange dots are each criterion's own best, a large green one is the knee."
    )
    drawn = charts.criteria(shown, int(selection["chosen"]), title)
    return Drawing(key="selection", title=title, text=text, svg=drawn)
