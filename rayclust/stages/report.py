"""report: one self-contained page from the artefacts of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayclust.config import RunConfig
from rayclust.report.budget import PageLimits, featured
from rayclust.report.contents import (
    Cluster,
    Contingency,
    MethodResult,
    Picture,
    Reject,
    RejectGroup,
    ReportData,
    Retrieval,
    StageTime,
)
from rayclust.report.page import render
from rayclust.report.thumbnails import thumbnail
from rayclust.runtime.api import as_yaml, load_run
from rayclust.runtime.artefacts import put_bytes
from rayclust.runtime.pipeline import Stage, StageContext, StageResult, settings_of, stages_of
from rayclust.runtime.rows import row_starts
from rayclust.runtime.tasks import STORAGE_THREADS
from rayclust.stages.drawings import drawings
from rayclust.stages.evaluate import contingency_uri
from rayclust.stages.index import ENCODER, OWN, RETRIEVAL
from rayclust.stages.report_training import curves, health, history
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run, parts
from rayclust.store.manifest import Manifest, read_json_output, read_manifest
from rayclust.store.sources import fetch_many

EXAMPLES = 20
"""Rejects shown per reason."""
DRAWN_CLASSES = 60
"""Classes and clusters up to which the table of counts is drawn."""


def run(context: StageContext) -> StageResult:
    """Gathers and renders."""
    run, config, asked = context.run, context.config, load_run(context.run.uri)
    metrics = read_json_output(run, "evaluate", run.metrics)
    clusters = tables.read_table(run.clusters).to_pylist()
    limits = PageLimits(
        cards=config.report.max_clusters, exemplars=config.label.exemplars, outliers=config.label.outliers
    )
    shown = set(featured([cluster["size"] for cluster in clusters], limits))
    near = _near(context)
    wanted = [
        row for i, cluster in enumerate(clusters) if i in shown for row in cluster["exemplars"] + cluster["outliers"]
    ]
    pictures = _pictures(context, {*wanted, *_rows_of(near)})
    counts = _counts(run, context.inputs["evaluate"])
    data = ReportData(
        run=run.uri,
        images=metrics["rows"],
        encoder=config.encoder.name,
        dimension=int(context.inputs["encode"].extra["dimension"]),
        methods=(_method(context, metrics), *_levels(config.method.name, metrics), *_others(run, config.method.name)),
        clusters=tuple(_cluster(cluster, pictures, counts, context.inputs["label"]) for cluster in clusters),
        classes=metrics.get("classes"),
        stages=tuple(_times(run, asked)),
        versions=context.inputs["encode"].versions,
        config=as_yaml(asked),
        curves=tuple(curves(history(run))),
        confidence=tuple(context.inputs["label"].extra["confidence"]),
        contingency=_drawn(counts, len(clusters)),
        drawings=tuple(drawings(run, _selection(context))),
        retrieval=tuple(_retrieval(near, pictures)),
        rejects=tuple(_rejects(run, context.inputs["encode"])),
        notes=(*health(history(run)), *_notes(context)),
    )
    page = render(data, limits).encode()
    outputs = put_bytes(run, run.report, page)
    return StageResult(outputs, {"clusters": len(clusters)}, {}, f"{len(page) / 1e6:.1f} MB, {run.report}")


def _notes(context: StageContext) -> Iterator[str]:
    """What a reader should know before believing what they see."""
    if context.inputs["label"].extra.get("true_names"):
        yield (
            "The names of the clusters were chosen among words that hold the data set's own class names "
            "(label.vocabulary: classes). They don't show what would be found without labels."
        )


def _selection(context: StageContext) -> dict[str, Any] | None:
    """How the number of clusters was chosen, where it was."""
    run = context.run
    return read_json_output(run, "select-k", run.selection) if "select-k" in context.inputs else None


def _method(context: StageContext, metrics: dict[str, Any]) -> MethodResult:
    run = context.run
    settings = read_json_output(run, "train", filesystem.join(run.model_folder, "config.json"))["config"]
    settings = {key: value for key, value in settings.items() if key != "name"}
    said = context.inputs["label"].extra
    named = {key: value for key, value in said.items() if key.startswith("name_accuracy")}
    scores = {key: value for key, value in (metrics | named).items() if isinstance(value, float)}
    return MethodResult(name=context.config.method.name, settings=settings, metrics=scores)


def _levels(method: str, metrics: dict[str, Any]) -> list[MethodResult]:
    """The coarser levels, each beside the clusters that it is made of."""
    return [
        MethodResult(
            name=f"{method}, level of {level['clusters']:,} clusters",
            metrics={key: value for key, value in level.items() if isinstance(value, float)},
        )
        for level in metrics.get("levels", [])
    ]


def _others(run: Run, method: str) -> list[MethodResult]:
    """Methods that were run beside this one on the same rows; the demo leaves their scores."""
    try:
        beside = filesystem.read_json(run.at("beside.json"))
    except filesystem.MissingError:
        return []
    return [
        MethodResult(
            name=name,
            metrics={key: float(np.mean([run[key] for run in runs])) for key in runs[0]},
            spread={key: float(np.std([run[key] for run in runs])) for key in runs[0]},
        )
        for name, runs in beside.items()
        if name != method
    ]


def _near(context: StageContext) -> dict[str, Any]:
    """What the index stage found for a few rows in either space; empty without a space of the method's own."""
    if "index" not in context.inputs:
        return {}
    return read_json_output(context.run, "index", filesystem.join(context.run.index_folder, RETRIEVAL))


def _rows_of(near: dict[str, Any]) -> Iterator[int]:
    yield from near.get("rows", ())
    for space in (ENCODER, OWN):
        yield from (hit["row"] for hits in near.get(space, ()) for hit in hits)


def _retrieval(near: dict[str, Any], pictures: dict[int, Picture]) -> Iterator[Retrieval]:
    """One block a query."""
    titles = {ENCODER: "Encoder", OWN: "z"}
    for place, row in enumerate(near.get("rows", ())):
        found = {
            title: tuple((pictures[hit["row"]], hit["similarity"]) for hit in near[space][place])
            for space, title in titles.items()
        }
        yield Retrieval(query=pictures[row], found=found)


def _pictures(context: StageContext, rows: Iterable[int]) -> dict[int, Picture]:
    """Row → picture, for the rows that are shown with pictures."""
    wanted = sorted(rows)
    records = _records(context, np.array(wanted, np.int64))
    images = _fetched([record["uri"] for record in records])

    def picture(record: dict[str, Any]) -> Picture:
        data = images.get(record["uri"])  # none for ready embeddings, or images that have been moved since
        return Picture(
            key=record["key"],
            uri=record["uri"],
            label=record["label"],
            confidence=record["confidence"],
            thumbnail=None if data is None else thumbnail(data, context.config.report.thumbnail),
        )

    return {row: picture(record) for row, record in zip(wanted, records, strict=True)}


def _fetched(uris: Sequence[str]) -> dict[str, bytes | None]:
    """Images by URI; files side by side, what lies in one tar or table together."""
    together: dict[str, list[str]] = {}
    for uri in uris:
        together.setdefault(uri.partition("#")[0], []).append(uri)
    with ThreadPoolExecutor(STORAGE_THREADS) as threads:
        return {
            uri: data for group in threads.map(lambda g: list(fetch_many(g)), together.values()) for uri, data in group
        }


def _records(context: StageContext, rows: np.ndarray) -> list[dict[str, Any]]:
    """Key, URI, label and confidence of some rows, in order; only the parts that hold them are read."""
    run, starts = context.run, row_starts(context.inputs["encode"])
    found: list[dict[str, Any]] = []
    for part, start in enumerate(starts[:-1]):
        own = rows[(rows >= start) & (rows < starts[part + 1])] - start
        if len(own):
            table = tables.read_table(run.embeddings(part), ["key", "uri", "label"])
            confidence = tables.read_table(run.assignments(part), ["confidence"])["confidence"]
            found += table.append_column("confidence", confidence).take(pa.array(own)).to_pylist()
    return found


def _counts(run: Run, evaluate: Manifest) -> pa.Table | None:
    uri = contingency_uri(run)
    if uri.removeprefix(run.uri.rstrip("/") + "/") not in evaluate.outputs:
        return None
    return tables.read_table(uri)


def _cluster(
    cluster: dict[str, Any], pictures: dict[int, Picture], counts: pa.Table | None, label: Manifest
) -> Cluster:
    majority, purity = _majority(counts, cluster["cluster"])
    blind = cluster["name_without_classes"]
    return Cluster(
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


def _majority(counts: pa.Table | None, cluster: int) -> tuple[str | None, float | None]:
    if counts is None:
        return None, None
    own = counts.filter(pc.equal(counts["cluster"], cluster))
    if not own.num_rows:
        return None, None
    sizes = own["count"].to_numpy()
    best = int(sizes.argmax())
    return own["label"][best].as_py(), float(sizes[best] / sizes.sum())


def _drawn(counts: pa.Table | None, clusters: int) -> Contingency | None:
    if counts is None:
        return None
    classes = sorted(set(counts["label"].to_pylist()))
    if len(classes) > DRAWN_CLASSES or clusters > DRAWN_CLASSES:
        return None
    table = np.zeros((len(classes), clusters), np.int64)
    where = {name: i for i, name in enumerate(classes)}
    for cell in counts.to_pylist():
        table[where[cell["label"]], cell["cluster"]] = cell["count"]
    return Contingency(counts=table, classes=tuple(classes), clusters=tuple(range(clusters)))


def _times(run: Run, asked: RunConfig) -> list[StageTime]:
    sealed = [(name, read_manifest(run, name)) for name in stages_of(asked) if name != "report"]
    return [
        StageTime(name=name, seconds=manifest.seconds, count=manifest.counts.get("rows"))
        for name, manifest in sealed
        if manifest is not None
    ]


def _rejects(run: Run, encode: Manifest) -> list[RejectGroup]:
    """Reasons with their counts and the first examples; parts are read only until every reason has enough."""
    reasons: dict[str, int] = encode.extra["reasons"]
    examples: dict[str, list[Reject]] = {reason: [] for reason in reasons}
    for _, uri in parts(run.rejects_folder):
        if all(len(examples[reason]) >= min(EXAMPLES, count) for reason, count in reasons.items()):
            break
        for reject in tables.read_table(uri).to_pylist():
            known = examples.setdefault(reject["reason"], [])
            if len(known) < EXAMPLES:
                known.append(Reject(key=reject["key"], uri=reject["uri"], detail=reject["detail"]))
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return [RejectGroup(reason=reason, count=count, examples=tuple(examples[reason])) for reason, count in ordered]


def _settings(config: RunConfig) -> dict[str, Any]:
    return {"report": settings_of(config.report)}


STAGE = Stage(
    "report",
    _settings,
    run,
    needs=("encode", "train", "assign", "label", "evaluate", "figures"),
    own_space_needs=("index",),
    needs_choice=True,
)
