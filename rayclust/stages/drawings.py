"""A run's figures from the numbers that the stage figures left, with the names that its clusters have now."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from rayclust.config import RunConfig
from rayclust.metrics.selection import CRITERIA
from rayclust.metrics.spectra import quantiles
from rayclust.report import svg
from rayclust.report.contents import Drawing
from rayclust.report.criteria import Criterion, criteria
from rayclust.report.formats import count, percent
from rayclust.report.heatmap import Group, Panel, heatmap
from rayclust.report.scatter import centers, hues, scatter
from rayclust.report.spectra import Spectrum, spectra
from rayclust.runtime.pipeline import SELECT_K, Manifests, run_stage
from rayclust.runtime.vocabularies import cluster_names
from rayclust.stages.figures import FEATURES, KERNEL_TEMPERATURE, OWN, PRECISION_AT, numbers
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from rayclust.store.manifest import read_json_output

_TITLES = {FEATURES: "encoder features", OWN: "z"}
_MEASURED = {
    "coding_length": "Coding length, nats per image",
    "silhouette": "Silhouette",
    "calinski_harabasz": "Calinski–Harabasz",
    "davies_bouldin": "Davies–Bouldin",
    "neighbor_agreement": "Neighbour agreement",
    "modularity": "Modularity",
    "map_equation": "Map equation",
    "stability": "Stability over seeds",
}
"""Criteria of `selection.json` that are drawn, in order; sizes are left to the file."""
_TABLES = ("map.parquet", "heat.parquet", "spectra.parquet")


def drawings(run: Run, selection: Mapping[str, Any] | None = None) -> list[Drawing]:
    """The figures of a run whose stage figures is sealed.

    Args:
        run: the run.
        selection: `selection.json` where the number of clusters was chosen.
    """
    summary = read_json_output(run, "figures", numbers(run, "summary.json"))
    dots, heat, lines = (tables.read_table(numbers(run, name)) for name in _TABLES)
    names = _names(run, {*dots["cluster"].to_pylist(), *heat["cluster"].to_pylist()})
    shades = hues(centers(*_points(dots)))
    groups = _groups(heat, names, shades)
    found = [_gram(heat, summary, groups), _membership(heat, summary, groups), _map(dots, summary, names)]
    found.append(_spectra(lines, summary))
    if selection is not None:
        found.append(_selection(selection))
    return found


def export(config: RunConfig, out: str | None) -> list[str]:
    """Writes the figures of a run as SVG files with the numbers behind them, running the stage figures where needed.

    Args:
        config: the run's.
        out: folder or URI; None takes the run's own `figures/`.

    Returns:
        What was written.
    """
    if Manifests(config).of("figures") is None:  # else nobody's lease is needed: reading is free
        run_stage("figures", config)
    run, seals = Run(config.run), Manifests(config)
    chosen = seals.of(SELECT_K) if config.needs_selection else None
    selection = read_json_output(run, SELECT_K, run.selection) if chosen is not None else None
    folder = numbers(run, "") if out is None else filesystem.absolute(out)
    files = {f"{drawn.key}.svg": svg.standalone(drawn.svg, drawn.text).encode() for drawn in drawings(run, selection)}
    for name in _TABLES if out is not None else ():
        files[name] = filesystem.read_bytes(numbers(run, name))
    files["map.csv"] = _csv(tables.read_table(numbers(run, "map.parquet")))
    if selection is not None:
        files["selection.csv"] = _csv(pa.Table.from_pylist(selection["candidates"]))
    for name, data in files.items():
        filesystem.write_bytes(filesystem.join(folder, name), data)
    return [filesystem.join(folder, name) for name in files]


def _csv(table: pa.Table) -> bytes:
    flat = [name for name in table.column_names if not pa.types.is_nested(table.schema.field(name).type)]
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table.select(flat), buffer)
    return buffer.getvalue()


def _names(run: Run, clusters: set[int]) -> dict[int, str]:
    """What figures call the clusters; a name that two of them have is told apart by their numbers."""
    given = cluster_names(run)
    often = Counter(given.values())
    return {
        k: f"Cluster {k}" if not (name := given.get(k)) else name if often[name] == 1 else f"{name} #{k}"
        for k in sorted(clusters)
    }


def _groups(heat: pa.Table, names: Mapping[int, str], shades: Mapping[int, int]) -> list[Group]:
    clusters = heat["cluster"].to_numpy()
    found, first, sizes = np.unique(clusters, return_index=True, return_counts=True)
    order = np.argsort(first)
    return [Group(names[k := int(found[i])], int(sizes[i]), shades.get(k, k % len(svg.HUES))) for i in order]


def _ceiling(matrices: list[np.ndarray]) -> float:
    """A round value that all but the most extreme entries off the diagonal stay below."""
    high = [np.quantile(m[~np.eye(len(m), dtype=bool)], 0.995) for m in matrices if len(m) > 1]
    return svg.ticks(0.0, max([1e-6, *high]), 11)[-1]


def _gram(heat: pa.Table, summary: Mapping[str, Any], groups: list[Group]) -> Drawing:
    spaces = summary["spaces"]
    matrices = {space: tables.matrix(heat[space]).astype(np.float64) for space in spaces}
    panels = [Panel(f"|ZᵀZ| of {_TITLES[space]}", matrix) for space, matrix in matrices.items()]
    title = "Cosines between images, sorted by cluster"
    drawn = heatmap(panels, groups, ceiling=min(1.0, _ceiling(list(matrices.values()))), title=title, key="gram")
    beside = (
        "Left: what the encoder gives. Right: the method's own space z."
        if OWN in spaces
        else ("The method has no space of its own: these are the features that it saw.")
    )
    text = (
        f"Absolute cosines between {count(heat.num_rows)} images{_lot(groups, summary)}. {beside} "
        "Blocks that stand out on the diagonal are clusters in directions of their own."
    )
    return Drawing(key="gram", title=title, text=text, svg=drawn, is_wide=len(panels) > 1)


def _membership(heat: pa.Table, summary: Mapping[str, Any], groups: list[Group]) -> Drawing:
    matrix = tables.matrix(heat["membership"]).astype(np.float64) * heat.num_rows
    title = "Membership Π, sorted by cluster"
    drawn = heatmap([Panel("n Π", matrix)], groups, ceiling=_ceiling([matrix]), title=title, key="membership")
    source = (
        "by entropic optimal transport between the method's codes"
        if summary["membership"] == "codes"
        else f"for want of codes, by a softmax of cosine / {KERNEL_TEMPERATURE} of the features over each row"
    )
    text = (
        f"How much each image belongs with each other one, {source}; 1 is what chance gives. "
        f"The same {count(heat.num_rows)} images{_lot(groups, summary)}."
    )
    return Drawing(key="membership", title=title, text=text, svg=drawn)


def _lot(groups: list[Group], summary: Mapping[str, Any]) -> str:
    if len(groups) == summary["clusters"]:
        return ""
    return f" of {count(len(groups))} clusters, drawn by lot from {count(summary['clusters'])}"


def _spectra(lines: pa.Table, summary: Mapping[str, Any]) -> Drawing:
    found: dict[tuple[str, str | None], list[np.ndarray]] = {}
    for line in lines.to_pylist():
        found.setdefault((line["space"], line["membership"]), []).append(np.array(line["values"]))
    series = []
    for place, space in enumerate(summary["spaces"]):
        own = quantiles(found[space, "own"], (0.1, 0.5, 0.9))
        series.append(Spectrum(_TITLES[space], place, found[space, None][0], own))
    if (FEATURES, "kmeans") in found:
        values = quantiles(found[FEATURES, "kmeans"], (0.1, 0.5, 0.9))
        series.append(Spectrum("encoder features, clusters of k-means", 2, None, values, is_dashed=True))
    title = "Singular values, over the largest"
    needed = [f"{_TITLES[space]} {n}" for space, n in summary["directions"].items()]
    text = (
        "The faster a line falls, the fewer directions the rows take up. At the right the median over clusters, with "
        "the band that holds four fifths of them. Directions that hold 90% of the energy of all rows: "
        f"{', '.join(needed)}."
    )
    return Drawing(key="singular-values", title=title, text=text, svg=spectra(series, title), is_wide=True)


def _points(dots: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Float[N 2] places and Int[N] clusters."""
    return np.stack([dots["x"].to_numpy(), dots["y"].to_numpy()], axis=1), dots["cluster"].to_numpy()


def _map(dots: pa.Table, summary: Mapping[str, Any], names: Mapping[int, str]) -> Drawing:
    space = _TITLES[summary["spaces"][-1]]
    title = f"Map of {space}"
    drawn = scatter(*_points(dots), names, title=title)
    text = (
        f"t-SNE of {space} of {count(dots.num_rows)} images, in the colours of their clusters. Neighbours are alike; "
        "distances between far groups mean little."
    )
    if summary["precision"]:
        shares = ", ".join(f"{percent(share)} for {_TITLES[name]}" for name, share in summary["precision"].items())
        text += f" Of the {PRECISION_AT} nearest among them, so many have the image's own class: {shares}."
    return Drawing(key="map", title=title, text=text, svg=drawn)


def _selection(selection: Mapping[str, Any]) -> Drawing:
    table: dict[str, dict[int, float]] = {}
    for candidate in selection["candidates"]:
        for name in _MEASURED:
            if candidate.get(name) is not None:
                table.setdefault(name, {})[int(candidate["k"])] = float(candidate[name])
    knee = selection.get("picks", {}).get("knee")
    found = []
    for name, values in table.items():
        better = CRITERIA[name].larger_is_better if name in CRITERIA else None
        arrow = {True: " ↑", False: " ↓", None: ""}[better]
        bend = knee if name == "coding_length" else None
        found.append(Criterion(_MEASURED[name] + arrow, values, better, knee=bend))
    title = "Criteria against the number of clusters"
    text = (
        f"{count(selection['chosen'])} clusters were chosen (dashed): {selection['reason'].rstrip('.')}. Arrows say "
        "which end is better, large orange dots are each criterion's own best, a large green one is the knee."
    )
    drawn = criteria(found, int(selection["chosen"]), title)
    return Drawing(key="selection", title=title, text=text, svg=drawn, is_wide=True)
