"""What the page tells of a training: curves, and whether it went wrong."""

from __future__ import annotations

import pyarrow as pa

from rayclust.report.contents import Curve
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run


def history(run: Run) -> pa.Table:
    """The table of metrics that a training left."""
    return tables.read_table(filesystem.join(run.model_folder, "metrics.parquet"))


def curves(history: pa.Table) -> list[Curve]:
    """What is worth drawing of it."""
    titles = {"loss": "Loss", "inertia": "Inertia", "marginal_entropy": "Entropy of the clusters' shares, nats"}
    titles |= {"live_clusters": "Live clusters of the best head", "agreement": "Agreement of the best head's teacher"}
    found = []
    for name, title in titles.items():
        if name in history.column_names and history.num_rows > 1:
            values = [float("nan") if value is None else value for value in history[name].to_pylist()]
            found.append(Curve(title=title, series={name: values}))
    return found


def health(history: pa.Table) -> list[str]:
    """What a reader should know of the training first."""
    last = history.slice(max(0, history.num_rows - 1)).to_pylist()
    if not last or not last[0].get("collapsed"):
        return []
    live, heads = last[0]["live_clusters"], last[0]["collapsed_heads"]
    return [f"Clusters collapsed in {heads} of the heads; the best one has {live:,} live clusters. Lower method.beta."]
