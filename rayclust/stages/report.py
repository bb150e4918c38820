"""report: the page of a run from its artefacts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayclust.report import model
from rayclust.report.formats import last_part
from rayclust.report.page import write
from rayclust.runtime.api import as_yaml, load_run
from rayclust.runtime.edits import shown_clusters
from rayclust.runtime.pipeline import CURATE, SELECT_K, StageContext, StageResult, stages_of
from rayclust.runtime.spaces import ENCODER, OWN
from rayclust.runtime.trackers import Trackers
from rayclust.stages.curate import FACTS, FOLDER
from rayclust.stages.figures import drawings
from rayclust.stages.index import RETRIEVAL
from rayclust.stages.report_rows import ShownRows, map_points, nearest_clusters, show_rows
from rayclust.store import storage, tables
from rayclust.store.manifest import (
    AssignOutputs,
    EncodeOutputs,
    LabelOutputs,
    Manifest,
    Outputs,
    put_bytes,
    read_json_output,
    read_manifest,
)
from rayclust.store.run import Run, parts

EXAMPLES = 20
"""Rejects shown per reason."""
DRAWN_CLASSES = 60
"""Classes and clusters up to which the table of counts is drawn."""


def run(context: StageContext) -> StageResult:
    """Gather the content of the page, and write it with the files beside it."""
    run, config, written = context.run, context.config, load_run(context.run.uri)
    encode, label, evaluate = (context.inputs[stage] for stage in ("encode", "label", "evaluate"))
    metrics = read_json_output(run, "evaluate", run.metrics)
    clusters = tables.read_table(run.clusters).to_pylist()
    edited = shown_clusters(run)
    if edited is not None and edited.edited.edits:
        clusters = [cluster | {"name": edited.names_of_own[cluster["cluster"]]} for cluster in clusters]
    # 1. Pictures of the clusters, and of the searches that stand side by side.
    near: dict[str, Any] = {}
    if "index" in context.inputs:
        near = read_json_output(run, "index", storage.join(run.index_folder, RETRIEVAL))
    extremes = pictured(clusters, config.report.pictures)
    wanted = {row for rows in extremes.values() for kind in rows for row in kind}
    wanted |= {hit["row"] for space in (ENCODER, OWN) for hits in near.get(space, ()) for hit in hits}
    curated: dict[str, Any] = {}
    if CURATE in context.inputs:
        curated = read_json_output(run, CURATE, run.at(FOLDER, FACTS))
        examples = curated["examples"]
        wanted |= {row for group in examples["groups"] for row in group["rows"]} | set(examples["outliers"])
        wanted |= {row for near in examples["pairs"] for pair in near["pairs"] for row in pair[:2]}
    shown = show_rows(context, np.array(sorted(wanted.union(near.get("rows", ()))), np.int64))
    # 2. Classes against clusters, where there are labels.
    counts = None
    if run.path(run.contingency) in evaluate.outputs:
        counts = tables.read_table(run.contingency)
    selection = read_json_output(run, SELECT_K, run.selection) if SELECT_K in context.inputs else None
    history = tables.read_table(storage.join(run.model_folder, "metrics.parquet"))
    data = model.ReportData(
        run=run.uri,
        title=last_part(config.images.uri),
        images=metrics["rows"],
        encoder=" + ".join(encoder.name for encoder in config.each_encoder),
        dimension=encode.outputs_of(EncodeOutputs).dimension,
        methods=tuple(_methods(context, metrics)),
        clusters=tuple(_clusters(context, clusters, extremes, shown, counts)),
        gallery=lambda cluster: shown.gallery(*extremes.get(cluster, ((), ()))),
        levels=context.inputs["assign"].outputs_of(AssignOutputs).levels,
        points=map_points(context, shown.rows),
        classes=metrics.get("classes"),
        stages=tuple(_stage_times(run, stages_of(written))),
        versions=encode.versions,
        config=as_yaml(written),
        curves=tuple(_curves(history)),
        candidates=tuple(_candidates(history, metrics)),
        confidence=label.outputs_of(LabelOutputs).confidence,
        contingency=None if counts is None else _contingency(counts, len(clusters)),
        drawings=tuple(drawn for drawn in drawings(run, selection) if drawn.key != "map"),
        retrieval=tuple(_retrieval(near, shown)),
        curation=_curation(curated, shown) if curated else None,
        rejects=tuple(_rejects(run, encode)),
        notes=tuple(_notes(context, history)),
    )
    # 3. The page, and what lies beside it; an earlier report may have left more files.
    outputs, folder = Outputs(), run.report.rpartition("/")[0]
    write(data, lambda name, content: outputs.update(put_bytes(run, storage.join(folder, name), content)))
    for file in list(storage.walk(storage.join(folder, "data"), missing_ok=True)):
        if run.path(file.uri) not in outputs:
            storage.remove(file.uri)
    if config.tracking.to:
        Trackers(config, context.inputs["train"].digest).finish(metrics, run.report)
    size = f"{sum(each['size'] for each in outputs.values()) / 1e6:.1f} MB in {len(outputs)} files"
    return StageResult(outputs, {"clusters": len(clusters), "pictures": len(shown.rows)}, {}, f"{size}, {run.report}")


def pictured(clusters: Sequence[dict[str, Any]], most: int) -> dict[int, tuple[list[int], list[int]]]:
    """Return the typical and the uncertain rows of each cluster that get a picture.

    Args:
        clusters: rows of `clusters.parquet`.
        most: pictures in all; every cluster gets as many, at least three, and two typical ones for an uncertain one.
    """
    each = max(3, most // max(1, sum(cluster["size"] > 0 for cluster in clusters)))
    found = {}
    for cluster in clusters:
        typical, uncertain = cluster["exemplars"], cluster["outliers"]
        few = min(len(uncertain), max(each // 3, each - len(typical)))
        found[cluster["cluster"]] = (typical[: each - few], uncertain[:few])
    return found


def _stage_times(run: Run, names: Sequence[str]) -> Iterator[model.StageTime]:
    """Yield what each stage took, but for the report."""
    for name in names:
        manifest = read_manifest(run, name)
        if manifest is not None and name != "report":
            workers = max((section.workers for section in manifest.measured), default=0)
            busy, count = sum(sum(section.busy.values()) for section in manifest.measured), manifest.counts.get("rows")
            yield model.StageTime(name=name, seconds=manifest.seconds, count=count, workers=workers, busy=busy)


def _notes(context: StageContext, history: pa.Table) -> Iterator[str]:
    """Yield what the reader should know first: a collapse in training, names among the classes' own, edits by hand."""
    last = history.slice(max(0, history.num_rows - 1)).to_pylist()
    if last and last[0].get("collapsed"):
        live, heads = last[0]["live_clusters"], last[0]["collapsed_heads"]
        yield f"Clusters collapsed in {heads} of the heads; the best one has {live:,} live clusters. Lower method.beta."
    if context.inputs["label"].outputs_of(LabelOutputs).true_names:
        yield (
            "The names of the clusters were chosen among words that hold the data set's own class names "
            "(label.vocabulary: classes). They don't show what would be found without labels."
        )
    edited = shown_clusters(context.run)
    if edited is not None and (edited.overlay.edits or edited.overlay.unfit):
        done, lost = len(edited.overlay.edits), len(edited.overlay.unfit)
        unfit = f"; {lost} more no longer fit these clusters and are left out" if lost else ""
        yield (
            f"Names are as edited by hand ({done} edits in overlay.json{unfit}). Clusters that were merged are shown "
            "one by one under their common name; sizes and scores are those of the method's own clusters."
        )


def _methods(context: StageContext, metrics: dict[str, Any]) -> Iterator[model.MethodResult]:
    """Yield the run's method, its coarser levels, and methods that were run beside it on the same rows."""
    run, method = context.run, context.config.method.name
    settings = read_json_output(run, "train", storage.join(run.model_folder, "config.json"))["config"]
    prefixes = ("name_accuracy", "zero_shot")
    named = {key: value for key, value in context.inputs["label"].extra.items() if key.startswith(prefixes)}
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


def _retrieval(near: dict[str, Any], shown: ShownRows) -> Iterator[model.Retrieval]:
    """Yield the searches of the index stage; none without a space of the method's own."""
    for place, row in enumerate(near.get("rows", ())):
        nearest = {
            title: tuple((shown.picture(hit["row"]), hit["similarity"]) for hit in near[space][place])
            for space, title in ((ENCODER, "Encoder"), (OWN, "z"))
        }
        yield model.Retrieval(query=shown.picture(row), found=nearest)


def _curation(facts: dict[str, Any], shown: ShownRows) -> model.Curation:
    """Return what curate found, with its examples as pictures."""
    examples = facts["examples"]
    return model.Curation(
        counts=facts["counts"],
        epsilon=facts["epsilon"],
        policy=facts["settings"]["duplicates"]["policy"],
        recall=facts["recall"],
        curve=tuple((point["epsilon"], point["share_kept"]) for point in facts["curve"]),
        groups=tuple(
            (group["size"], tuple(shown.picture(row) for row in group["rows"])) for group in examples["groups"]
        ),
        pairs=tuple(
            (near["epsilon"], tuple((shown.picture(i), shown.picture(j), cosine) for i, j, cosine in near["pairs"]))
            for near in examples["pairs"]
        ),
        outliers=tuple(shown.picture(row) for row in examples["outliers"]),
    )


def _clusters(
    context: StageContext,
    clusters: Sequence[dict[str, Any]],
    extremes: dict[int, tuple[list[int], list[int]]],
    shown: ShownRows,
    counts: pa.Table | None,
) -> Iterator[model.Cluster]:
    """Convert the rows of `clusters.parquet` to clusters of the page; `counts` are those of classes in clusters."""
    # 1. Each cluster's commonest class and that class's share; of equals, the first in the table.
    majorities = dict[int, tuple[str, float]]()
    if counts is not None and counts.num_rows:
        owners, sizes = counts["cluster"].to_numpy(), counts["count"].to_numpy()
        order = np.lexsort((-sizes, owners))  # stable
        keys, first = np.unique(owners[order], return_index=True)
        shares = (sizes[order[first]] / np.add.reduceat(sizes[order], first)).tolist()
        classes = counts["label"].take(order[first]).to_pylist()
        majorities = dict(zip(keys.tolist(), zip(classes, shares, strict=True), strict=True))
    # 2. The clusters.
    typical = {k: rows for k, (rows, _) in extremes.items() if rows}
    nearest = nearest_clusters(context, typical, shown.learnt)
    columns = [tables.level_column(size) for size in context.inputs["assign"].outputs_of(AssignOutputs).levels]
    confidence = context.inputs["label"].outputs_of(LabelOutputs).mean_confidence
    for cluster in clusters:
        k = cluster["cluster"]
        majority, purity = majorities.get(k, (None, None))
        blind = cluster["name_without_classes"]
        # A cluster's parents are those of any of its rows; an empty one has none and is not shown.
        any_row = next((rows[0] for rows in extremes[k] if rows), None)
        place = None if any_row is None else int(np.searchsorted(shown.rows, any_row))
        yield model.Cluster(
            id=k,
            size=cluster["size"],
            name=cluster["name"],
            score=cluster["score"],
            runners_up=tuple((other["name"], other["score"]) for other in cluster["runners_up"]),
            blind=None if blind is None else (blind, cluster["score_without_classes"]),
            majority=majority,
            purity=purity,
            confidence=confidence[k],
            nearest=nearest.get(k, ()),
            parents=tuple(-1 if place is None else shown.records[name][place].as_py() for name in columns),
        )


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
    titles |= {"feature_std": "Spread of the learnt features: 1 in all directions, 0 has collapsed"}
    if "candidate" in history.column_names:
        history = history.filter(pc.is_null(history["candidate"]))
    curves: list[model.Curve] = []
    for name, title in titles.items():
        if name in history.column_names and history.num_rows > 1:
            values = np.array([float("nan") if value is None else value for value in history[name].to_pylist()])
            known = np.flatnonzero(np.isfinite(values))
            if 1 < len(known) < len(values) and history[name].null_count:  # of some epochs: a line
                between = np.interp(np.arange(known[0], known[-1] + 1), known, values[known])
                values[known[0] : known[-1] + 1] = between
            curves.append(model.Curve(title=title, series={name: values.tolist()}))
    return curves


def _candidates(history: pa.Table, metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the partitions among which the method chose, with the evidence by its title; of members also their ACC."""
    titles = {"inertia": "Inertia per row", "modularity": "Modularity", "size_entropy": "Evenness of sizes"}
    titles |= {"neighbor_agreement": "Neighbours kept together", "score": "Labels predicted on held-out rows"}
    titles |= {"normalized_score": "The same, above the largest share", "largest_share": "Share of the largest cluster"}
    titles |= {"share_entropy": "Evenness of labels", "occupied": "Clusters with rows"}
    titles |= {"agreement": "Agreement", "anmi": "ANMI with the voters"}
    if "candidate" in history.column_names:
        rows = history.filter(pc.is_valid(history["candidate"])).to_pylist()
        for row, accuracy in zip(rows, metrics.get("members", ()), strict=False):
            row["accuracy"] = accuracy
        if "members" in metrics:
            titles["accuracy"] = "ACC, by labels"
            rows[-1]["accuracy"] = metrics.get("accuracy")
        shown = {name: title for name, title in titles.items() if any(row.get(name) is not None for row in rows)}
        for row in rows:
            evidence = {title: row.get(name) for name, title in shown.items()}
            note = {"note": row["note"]} if row.get("note") else {}
            yield {"name": row["candidate"], "chosen": bool(row["chosen"]), "evidence": evidence} | note


def _rejects(run: Run, encode: Manifest) -> list[model.RejectGroup]:
    """Return reasons with their counts and the first examples; parts are read only until every reason has enough."""
    reasons = encode.outputs_of(EncodeOutputs).reasons
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
