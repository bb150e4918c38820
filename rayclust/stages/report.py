"""report: one self-contained page from the artefacts of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayclust.config import RunConfig
from rayclust.report import model
from rayclust.report.page import PageLimits, featured, render
from rayclust.report.thumbnails import thumbnail
from rayclust.runtime.api import as_yaml, load_run
from rayclust.runtime.artefacts import put_bytes
from rayclust.runtime.edits import overlay_digest, shown_clusters
from rayclust.runtime.pipeline import CURATE, SELECT_K, Stage, StageContext, StageResult, settings_of, stages_of
from rayclust.runtime.rows import row_starts, rows_by_part
from rayclust.runtime.tasks import STORAGE_THREADS
from rayclust.runtime.trackers import Trackers
from rayclust.stages.curate import FACTS, FOLDER
from rayclust.stages.figures import drawings
from rayclust.stages.index import ENCODER, OWN, RETRIEVAL
from rayclust.store import storage, tables
from rayclust.store.manifest import Manifest, read_json_output, read_manifest
from rayclust.store.run import Run, parts
from rayclust.store.sources import fetch_many

EXAMPLES = 20
"""Rejects shown per reason."""
DRAWN_CLASSES = 60
"""Classes and clusters up to which the table of counts is drawn."""


def run(context: StageContext) -> StageResult:
    """Gather the content of the page, and render it."""
    run, config, written = context.run, context.config, load_run(context.run.uri)
    encode, label, evaluate = (context.inputs[stage] for stage in ("encode", "label", "evaluate"))
    metrics = read_json_output(run, "evaluate", run.metrics)
    clusters = tables.read_table(run.clusters).to_pylist()
    edited = shown_clusters(run)
    if edited is not None and edited.edited.edits:
        clusters = [cluster | {"name": edited.names_of_own[cluster["cluster"]]} for cluster in clusters]
    limits = PageLimits(
        cards=config.report.max_clusters, exemplars=config.label.exemplars, outliers=config.label.outliers
    )
    # 1. Pictures of the clusters that have a card, and of the searches that stand side by side.
    near: dict[str, Any] = {}
    if "index" in context.inputs:
        near = read_json_output(run, "index", storage.join(run.index_folder, RETRIEVAL))
    shown = featured([cluster["size"] for cluster in clusters], limits)
    wanted = {row for k in shown for row in clusters[k]["exemplars"] + clusters[k]["outliers"]}
    wanted |= {hit["row"] for space in (ENCODER, OWN) for hits in near.get(space, ()) for hit in hits}
    curated: dict[str, Any] = {}
    if CURATE in context.inputs:
        curated = read_json_output(run, CURATE, run.at(FOLDER, FACTS))
        wanted |= _rows_of(curated["examples"])
    pictures = _pictures(context, sorted(wanted.union(near.get("rows", ()))))
    # 2. Classes against clusters, where there are labels.
    counts = None
    if run.path(run.contingency) in evaluate.outputs:
        counts = tables.read_table(run.contingency)
    majorities = {} if counts is None else _majorities(counts)
    # 3. The training.
    history = tables.read_table(storage.join(run.model_folder, "metrics.parquet"))
    notes = _health(history)
    if label.extra.get("true_names"):
        notes.append(
            "The names of the clusters were chosen among words that hold the data set's own class names "
            "(label.vocabulary: classes). They don't show what would be found without labels."
        )
    if edited is not None and (edited.overlay.edits or edited.overlay.unfit):
        done, lost = len(edited.overlay.edits), len(edited.overlay.unfit)
        unfit = f"; {lost} more no longer fit these clusters and are left out" if lost else ""
        notes.append(
            f"Names are as edited by hand ({done} edits in overlay.json{unfit}). Clusters that were merged are shown "
            "one by one under their common name; sizes and scores are those of the method's own clusters."
        )
    selection = read_json_output(run, SELECT_K, run.selection) if SELECT_K in context.inputs else None
    data = model.ReportData(
        run=run.uri,
        images=metrics["rows"],
        encoder=" + ".join(encoder.name for encoder in config.each_encoder),
        dimension=int(encode.extra["dimension"]),
        methods=tuple(_methods(context, metrics)),
        clusters=tuple(_cluster(cluster, pictures, majorities, label) for cluster in clusters),
        classes=metrics.get("classes"),
        stages=tuple(
            model.StageTime(name=name, seconds=manifest.seconds, count=manifest.counts.get("rows"))
            for name in stages_of(written)
            if name != "report" and (manifest := read_manifest(run, name)) is not None
        ),
        versions=encode.versions,
        config=as_yaml(written),
        curves=tuple(_curves(history)),
        candidates=tuple(_candidates(history)),
        confidence=tuple(label.extra["confidence"]),
        contingency=None if counts is None else _contingency(counts, len(clusters)),
        drawings=tuple(drawings(run, selection)),
        retrieval=tuple(_retrieval(near, pictures)),
        curation=_curation(curated, pictures) if curated else None,
        rejects=tuple(_rejects(run, encode)),
        notes=tuple(notes),
    )
    rendered = render(data, limits)
    page = rendered.encode()
    outputs = put_bytes(run, run.report, page)
    if config.tracking.to:
        Trackers(config, context.inputs["train"].digest).finish(metrics, rendered)
    return StageResult(outputs, {"clusters": len(clusters)}, {}, f"{len(page) / 1e6:.1f} MB, {run.report}")


def _methods(context: StageContext, metrics: dict[str, Any]) -> Iterator[model.MethodResult]:
    """Yield the run's method, its coarser levels, and methods that were run beside it on the same rows."""
    run, method = context.run, context.config.method.name
    settings = read_json_output(run, "train", storage.join(run.model_folder, "config.json"))["config"]
    named = {key: value for key, value in context.inputs["label"].extra.items() if key.startswith("name_accuracy")}
    yield model.MethodResult(
        name=method,
        settings={key: value for key, value in settings.items() if key != "name"},
        metrics={key: value for key, value in (metrics | named).items() if isinstance(value, float)},
    )
    for split in ("train", "test"):
        if split in metrics:
            found = {key: value for key, value in metrics[split].items() if isinstance(value, float)}
            yield model.MethodResult(name=f"{method}, {metrics[split]['rows']:,} {split} rows", metrics=found)
    for level in metrics.get("levels", []):
        yield model.MethodResult(
            name=f"{method}, level of {level['clusters']:,} clusters",
            metrics={key: value for key, value in level.items() if isinstance(value, float)},
        )
    try:
        beside = storage.read_json(run.at("beside.json"))  # the demo leaves it: scores of each seed
    except storage.MissingError:
        return
    for name, runs in beside.items():
        if name != method:
            scores = {key: np.array([run[key] for run in runs]) for key in runs[0]}
            yield model.MethodResult(
                name=name,
                metrics={key: float(np.mean(values)) for key, values in scores.items()},
                spread={key: float(np.std(values)) for key, values in scores.items()},
            )


def _retrieval(near: dict[str, Any], pictures: dict[int, model.Picture]) -> Iterator[model.Retrieval]:
    """Yield the searches of the index stage; none without a space of the method's own."""
    for place, row in enumerate(near.get("rows", ())):
        nearest = {
            title: tuple((pictures[hit["row"]], hit["similarity"]) for hit in near[space][place])
            for space, title in ((ENCODER, "Encoder"), (OWN, "z"))
        }
        yield model.Retrieval(query=pictures[row], found=nearest)


def _rows_of(examples: dict[str, Any]) -> set[int]:
    """Return the rows that curate wants to be shown."""
    rows = {row for group in examples["groups"] for row in group["rows"]} | set(examples["outliers"])
    return rows | {row for near in examples["pairs"] for pair in near["pairs"] for row in pair[:2]}


def _curation(facts: dict[str, Any], pictures: dict[int, model.Picture]) -> model.Curation:
    """Return what curate found, with its examples as pictures."""
    examples = facts["examples"]
    return model.Curation(
        counts=facts["counts"],
        epsilon=facts["epsilon"],
        policy=facts["settings"]["duplicates"]["policy"],
        recall=facts["recall"],
        curve=tuple((point["epsilon"], point["share_kept"]) for point in facts["curve"]),
        groups=tuple((group["size"], tuple(pictures[row] for row in group["rows"])) for group in examples["groups"]),
        pairs=tuple(
            (near["epsilon"], tuple((pictures[i], pictures[j], cosine) for i, j, cosine in near["pairs"]))
            for near in examples["pairs"]
        ),
        outliers=tuple(pictures[row] for row in examples["outliers"]),
    )


def _pictures(context: StageContext, rows: Sequence[int]) -> dict[int, model.Picture]:
    """Return row → picture for sorted rows; only the parts that hold them are read."""
    run, records = context.run, list[dict[str, Any]]()
    for part, positions in rows_by_part(row_starts(context.inputs["encode"]), np.array(rows, np.int64)):
        table = tables.read_table(run.rows(part), ["key", "uri", "label"])
        confidence = tables.read_table(run.assignments(part), ["confidence"])["confidence"]
        records += table.append_column("confidence", confidence).take(pa.array(positions)).to_pylist()
    # Files side by side, what lies in one tar or table together.
    together: dict[str, list[str]] = {}
    for record in records:
        together.setdefault(record["uri"].partition("#")[0], []).append(record["uri"])
    with ThreadPoolExecutor(STORAGE_THREADS) as threads:
        columns = context.config.images.columns
        fetched = threads.map(lambda uris: list(fetch_many(uris, columns)), together.values())
        images = {uri: data for group in fetched for uri, data in group}
    pictures = {}
    for row, record in zip(rows, records, strict=True):
        data = images.get(record["uri"])  # none for ready embeddings, or images that have been moved since
        small = None if data is None else thumbnail(data, context.config.report.thumbnail)
        pictures[row] = model.Picture(thumbnail=small, **record)
    return pictures


def _cluster(
    cluster: dict[str, Any],
    pictures: dict[int, model.Picture],
    majorities: dict[int, tuple[str, float]],
    label: Manifest,
) -> model.Cluster:
    """Convert a row of `clusters.parquet` to a cluster of the page."""
    majority, purity = majorities.get(cluster["cluster"], (None, None))
    blind = cluster["name_without_classes"]
    return model.Cluster(
        id=cluster["cluster"],
        size=cluster["size"],
        name=cluster["name"],
        score=cluster["score"],
        runners_up=tuple((other["name"], other["score"]) for other in cluster["runners_up"]),
        blind=None if blind is None else (blind, cluster["score_without_classes"]),
        majority=majority,
        purity=purity,
        confidence=label.extra["mean_confidence"][cluster["cluster"]],
        exemplars=tuple(pictures[row] for row in cluster["exemplars"] if row in pictures),
        outliers=tuple(pictures[row] for row in cluster["outliers"] if row in pictures),
    )


def _majorities(counts: pa.Table) -> dict[int, tuple[str, float]]:
    """Return cluster → its commonest class and that class's share; of equals, the first in the table."""
    clusters, sizes = counts["cluster"].to_numpy(), counts["count"].to_numpy()
    order = np.lexsort((-sizes, clusters))  # stable
    keys, first = np.unique(clusters[order], return_index=True)
    totals = np.add.reduceat(sizes[order], first) if len(first) else sizes
    classes = counts["label"].take(order[first]).to_pylist()
    shares = (sizes[order[first]] / totals).tolist()
    return dict(zip(keys.tolist(), zip(classes, shares, strict=True), strict=True))


def _contingency(counts: pa.Table, clusters: int) -> model.Contingency | None:
    """Return the table of counts while it is small enough to be drawn."""
    classes = sorted(set(counts["label"].to_pylist()))
    if len(classes) > DRAWN_CLASSES or clusters > DRAWN_CLASSES:
        return None
    table = np.zeros((len(classes), clusters), np.int64)
    where = {name: i for i, name in enumerate(classes)}
    for cell in counts.to_pylist():
        table[where[cell["label"]], cell["cluster"]] = cell["count"]
    return model.Contingency(counts=table, classes=tuple(classes), clusters=tuple(range(clusters)))


def _curves(history: pa.Table) -> list[model.Curve]:
    """Return the training curves that are worth drawing."""
    titles = {"loss": "Loss", "inertia": "Inertia", "marginal_entropy": "Entropy of the clusters' shares, nats"}
    titles |= {"live_clusters": "Live clusters of the best head", "agreement": "Agreement of the best head's teacher"}
    if "candidate" in history.column_names:
        history = history.filter(pc.is_null(history["candidate"]))
    curves: list[model.Curve] = []
    for name, title in titles.items():
        if name in history.column_names and history.num_rows > 1:
            values = [float("nan") if value is None else value for value in history[name].to_pylist()]
            curves.append(model.Curve(title=title, series={name: values}))
    return curves


def _candidates(history: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the partitions among which the method chose, with the evidence by its title."""
    titles = {"inertia": "Inertia per row", "modularity": "Modularity", "size_entropy": "Evenness of sizes"}
    titles |= {"neighbor_agreement": "Neighbours kept together", "score": "Labels predicted on held-out rows"}
    titles |= {"normalized_score": "The same, above the largest share", "largest_share": "Share of the largest cluster"}
    titles |= {"share_entropy": "Evenness of labels", "occupied": "Clusters with rows"}
    titles |= {"agreement": "Agreement", "anmi": "ANMI with the voters"}
    if "candidate" in history.column_names:
        rows = history.filter(pc.is_valid(history["candidate"])).to_pylist()
        shown = {name: title for name, title in titles.items() if any(row.get(name) is not None for row in rows)}
        for row in rows:
            evidence = {title: row[name] for name, title in shown.items()}
            note = {"note": row["note"]} if "note" in row else {}
            yield {"name": row["candidate"], "chosen": bool(row["chosen"]), "evidence": evidence} | note


def _health(history: pa.Table) -> list[str]:
    """Return warnings about the training, shown first on the page."""
    last = history.slice(max(0, history.num_rows - 1)).to_pylist()
    if not last or not last[0].get("collapsed"):
        return []
    live, heads = last[0]["live_clusters"], last[0]["collapsed_heads"]
    return [f"Clusters collapsed in {heads} of the heads; the best one has {live:,} live clusters. Lower method.beta."]


def _rejects(run: Run, encode: Manifest) -> list[model.RejectGroup]:
    """Return reasons with their counts and the first examples; parts are read only until every reason has enough."""
    reasons: dict[str, int] = encode.extra["reasons"]
    examples: dict[str, list[dict[str, str]]] = {reason: [] for reason in reasons}
    for _, uri in parts(run.rejects_folder):
        if all(len(examples[reason]) >= min(EXAMPLES, count) for reason, count in reasons.items()):
            break
        for reject in tables.read_table(uri).to_pylist():
            known = examples.setdefault(reject["reason"], [])
            if len(known) < EXAMPLES:
                known.append({name: reject[name] for name in ("key", "uri", "detail")})
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [
        model.RejectGroup(reason=reason, count=count, examples=tuple(examples[reason])) for reason, count in ordered
    ]


def _settings(config: RunConfig) -> dict[str, Any]:
    edits = overlay_digest(Run(config.run))
    return {"report": settings_of(config.report)} | ({"overlay": edits} if edits else {})


STAGE = Stage(
    "report",
    _settings,
    run,
    needs=("encode", "train", "assign", "label", "evaluate", "figures"),
    own_space_needs=("index",),
    needs_choice=True,
    needs_curation=True,
    revision=3,
)
