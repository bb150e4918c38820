"""One self-contained HTML page of a run: it loads nothing, runs anywhere, and is the same text for the same report.

`PageLimits` bound how much of a report is shown, so that a page opens quickly whatever the run's size; `SCORES` lists
the metrics with their names and formats.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field

from rayclust.report import charts, formats, thumbnails
from rayclust.report.formats import number, percent
from rayclust.report.model import Cluster, MethodResult, Picture, RejectGroup, ReportData
from rayclust.settings import Config

logger = logging.getLogger(__name__)

CLASSES_DRAWN = 60
"""The table of classes against clusters is drawn for at most so many classes …"""
CLUSTERS_DRAWN = 100
"""… and so many clusters: beyond, its cells are too small to read."""
CHOICE = "selection"
"""Key of the drawing that has a section of its own: how the number of clusters was chosen."""
ROW_BYTES = 400
"""Room for a row of the table: the longest shown name and class, and the numbers."""
TAG_BYTES = 120
"""Room for the tag around a picture's data."""
CONFIG_CHARACTERS = 100_000


class PageLimits(Config):
    """Limits of one page; the page states the number of items left out."""

    cards: int = Field(200, ge=0)
    """Clusters shown with pictures, the largest ones; the others stand in the table alone."""
    exemplars: int = Field(9, ge=0)
    """Typical images per cluster."""
    outliers: int = Field(6, ge=0)
    """Least typical images per cluster."""
    rows: int = Field(25_000, ge=0)
    """Rows in the table of all clusters, the largest ones."""
    rejects: int = Field(10, ge=0)
    """Examples per reason in the table of rejects."""
    reasons: int = Field(50, ge=1)
    """Reasons in the table of rejects, the most frequent ones."""
    bytes: int = Field(20_000_000, ge=200_000)
    """Size of the page in bytes; pictures that would exceed it are left out, first the least typical ones."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The part of a report that its page shows: the largest clusters and the most frequent rejects first."""

    cards: tuple[Cluster, ...]
    """With pictures."""
    rows: tuple[Cluster, ...]
    """In the table."""
    rejects: tuple[RejectGroup, ...]
    other_reasons: int = 0
    dropped_pictures: int = 0


@dataclass(frozen=True)
class Score:
    """How one metric is shown."""

    key: str
    """In `metrics.json`."""
    short: str
    """The column's head."""
    meaning: str
    """A sentence with range and chance level."""
    is_share: bool = True
    """Written in percent."""
    larger_is_better: bool | None = True
    """None marks no winner."""

    def write(self, value: float | None, spread: float | None = None) -> str:
        """Return the value as text, with ± its spread over seeds where there is one."""
        if spread is None or value is None:
            return percent(value) if self.is_share else number(value)
        return f"{100 * value:.1f} ± {100 * spread:.1f}%" if self.is_share else f"{number(value)} ± {number(spread, 2)}"


SCORES = (
    Score("accuracy", "ACC", "Images in the right class when clusters are matched to classes one to one. 0 to 100%."),
    Score(
        "accuracy_held_out",
        "ACC, map from other half",
        "Images with their cluster's most common class, taken from the train rows or from the other half.",
    ),
    Score(
        "accuracy_in_sample",
        "ACC, map from same images",
        "As published for many clusters: the map is fitted on the images that it scores and rises with more.",
        larger_is_better=None,
    ),
    Score("nmi", "NMI", "Mutual information of clusters and classes over their mean entropy. 0 to 100%."),
    Score("ari", "ARI", "Agreement over all pairs of images, corrected for chance. 0% is chance, 100% perfect."),
    Score("ami", "AMI", "Mutual information corrected for chance. 0% is chance, 100% perfect."),
    Score("purity", "Purity", "Images that belong to their cluster's most common class. Rises with more clusters."),
    Score(
        "linear_probe", "Linear probe", "Images whose class a linear layer tells after seeing others with their labels."
    ),
    Score("knn_accuracy", "kNN probe", "Images whose class their nearest neighbours tell: what the encoder sees."),
    Score("knn_accuracy_top5", "kNN probe, top 5", "Images whose class is among the five that their neighbours tell."),
    Score(
        "name_accuracy",
        "Names",
        "Images whose cluster is named exactly as their class. Only as good as the list of names.",
    ),
    Score(
        "name_accuracy_without_classes",
        "Names, blind",
        "The same where the data set's own class names were not among the candidates.",
    ),
    Score(
        "silhouette",
        "Silhouette",
        "How much closer images lie to their own cluster than to the next one, on a sample. -1 to 1. Needs no labels.",
        is_share=False,
    ),
    Score(
        "coding_length",
        "Coding length",
        "How long a description the embeddings need when their clusters are known. Smaller is better. Needs no labels.",
        is_share=False,
        larger_is_better=False,
    ),
    Score(
        "membership_detection_error",
        "Π outside class",
        "How much of an image's membership, on a sample, goes to images of other classes. Smaller is better.",
        larger_is_better=False,
    ),
    Score(
        "membership_wrong_edges",
        "Π wrong edges",
        "Pairs of images that belong together by the membership, but not by their classes. Smaller is better.",
        larger_is_better=False,
    ),
    Score(
        "membership_nonzeros",
        "Π entries",
        "Images of the sample, itself included, to which an image belongs: more than a tenth of an even share.",
        is_share=False,
        larger_is_better=None,
    ),
    Score(
        "membership_components",
        "Π components",
        "Groups of the sample's images between which there is no membership. Needs no labels.",
        is_share=False,
        larger_is_better=None,
    ),
)


def columns(methods: Iterable[MethodResult]) -> list[Score]:
    """Return the scores that at least one method has: known ones in the usual order, then the others as they come."""
    keys = {key: None for method in methods for key, value in method.metrics.items() if value is not None}
    known = [score for score in SCORES if score.key in keys]
    others = [key for key in keys if key not in {score.key for score in known}]
    return known + [Score(key, key, "", is_share=False, larger_is_better=None) for key in others]


def best(score: Score, methods: Iterable[MethodResult]) -> float | None:
    """Return the best value among methods; None where the score has no better end or fewer than two have it."""
    scores = [method.metrics.get(score.key) for method in methods]
    values = [value for value in scores if value is not None and math.isfinite(value)]
    if len(values) < 2 or score.larger_is_better is None:
        return None
    return max(values) if score.larger_is_better else min(values)


def featured(sizes: Sequence[int], limits: PageLimits | None = None) -> list[int]:
    """Return the clusters that get pictures, of K sizes: images are fetched for these alone.

    Largest first, the smaller number first among equals; empty clusters get no pictures.
    """
    filled = (cluster for cluster, size in enumerate(sizes) if size > 0)
    return sorted(filled, key=lambda cluster: (-sizes[cluster], cluster))[: (limits or PageLimits()).cards]


def select(data: ReportData, limits: PageLimits) -> Selection:
    """Return the largest clusters, the commonest rejects and no more pictures per cluster than allowed."""
    largest = sorted(data.clusters, key=lambda cluster: (-cluster.size, cluster.id))
    filled = [cluster for cluster in largest if cluster.size > 0]
    groups = sorted(data.rejects, key=lambda group: (-group.count, group.reason))
    return Selection(
        cards=tuple(
            replace(c, exemplars=c.exemplars[: limits.exemplars], outliers=c.outliers[: limits.outliers])
            for c in filled[: limits.cards]
        ),
        rows=tuple(largest[: min(limits.rows, limits.bytes // 2 // ROW_BYTES)]),
        rejects=tuple(replace(g, examples=g.examples[: limits.rejects]) for g in groups[: limits.reasons]),
        other_reasons=max(0, len(groups) - limits.reasons),
    )


def fit_pictures(selection: Selection, room: int) -> Selection:
    """Take out the thumbnails that do not fit: every cluster's first ones are kept before any cluster's later ones.

    `room` is bytes for pictures, base64 and all; negative keeps none.
    """
    # Exemplars 0, 1 and 2 of all clusters, then exemplar 3 and outlier 0, and so on.
    queue = sorted(
        (place + 3 * kind, index, kind)
        for index, card in enumerate(selection.cards)
        for kind, pictures in enumerate((card.exemplars, card.outliers))
        for place, picture in enumerate(pictures)
        if picture.thumbnail is not None
    )
    kept = [([*card.exemplars], [*card.outliers]) for card in selection.cards]
    dropped = 0
    for rank, index, kind in queue:
        pictures, place = kept[index][kind], rank - 3 * kind
        cost = TAG_BYTES + 4 * math.ceil(len(pictures[place].thumbnail or b"") / 3)
        if dropped or cost > room:
            dropped += 1
            pictures[place] = replace(pictures[place], thumbnail=None)
        else:
            room -= cost
    cards = tuple(
        replace(card, exemplars=tuple(exemplars), outliers=tuple(outliers))
        for card, (exemplars, outliers) in zip(selection.cards, kept, strict=True)
    )
    return replace(selection, cards=cards, dropped_pictures=dropped)


def render(report: ReportData, limits: PageLimits | None = None) -> str:
    """Return the page of a run.

    Every string of the report is shown as text and escaped; a key or a name can hold anything. The page forbids itself,
    by its content security policy, to load or send anything.

    Returns:
        HTML5 text that UTF-8 can encode, within `limits.bytes` unless names, settings and figures alone exceed it.
    """
    limits = limits or PageLimits()
    shown = select(report, limits)
    context: dict[str, Any] = {
        "report": report,
        "title": report.title or formats.last_part(report.run) or "run",
        "headline": _headline(report),
        "columns": columns(report.methods),
        "charts": _charts(report),
        "choice": [drawing for drawing in report.drawings if drawing.key == CHOICE],
        "drawings": [drawing for drawing in report.drawings if drawing.key != CHOICE],
        "empty": sum(cluster.size == 0 for cluster in report.clusters),
        "named": any(cluster.name for cluster in report.clusters),
        "confident": any(cluster.confidence is not None for cluster in report.clusters),
        "config": formats.shorten(report.config, CONFIG_CHARACTERS),
    }
    for kind, name in (("style", "page.css"), ("script", "page.js")):
        text = resources.files("rayclust.report").joinpath("templates", name).read_text(encoding="utf-8")
        context[kind] = Markup(text)  # noqa: S704 - our own file
        context[f"{kind}_hash"] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    template = _environment().get_template("page.html.j2")
    text_bytes = len(template.render(context, shown=fit_pictures(shown, -1)).encode())
    fitted = fit_pictures(shown, limits.bytes - text_bytes)
    html = template.render(context, shown=fitted)
    size = f"{len(html.encode()) / 1e6:.1f} MB"
    pictures = sum(p.thumbnail is not None for card in fitted.cards for p in card.exemplars + card.outliers)
    logger.info(
        "report: %d of %d clusters with %d pictures, %s", len(fitted.cards), len(report.clusters), pictures, size
    )
    return html


def _headline(report: ReportData) -> list[tuple[str, str, str]]:
    """Return (label, value, hint) of the numbers on the first screen."""
    tiles = [("Images", formats.count(report.images), ""), ("Clusters", formats.count(len(report.clusters)), "")]
    measured = columns(report.methods[:1])
    wanted = [score for score in measured if score.key in ("accuracy", "nmi", "ari", "silhouette")]
    tiles += [(s.short, s.write(report.methods[0].metrics.get(s.key)), s.meaning) for s in wanted[:3]]
    if report.rejected or report.images:
        share = report.rejected / max(1, report.rejected + report.images)
        hint = f"{percent(share)} of the inputs could not be used" if report.rejected else ""
        tiles.append(("Rejected", formats.count(report.rejected), hint))
    seconds = sum(stage.seconds for stage in report.stages)
    if seconds:
        tiles.append(("Time", formats.duration(seconds), "all stages together"))
    return tiles


def _charts(report: ReportData) -> dict[str, list[tuple[str, Markup]]]:
    """Return section to (caption, chart)."""
    drawn: dict[str, list[tuple[str, Markup]]] = {"scores": [], "sizes": [], "training": []}
    table = report.contingency
    if table is not None and 0 < len(table.classes) <= CLASSES_DRAWN and 0 < len(table.clusters) <= CLUSTERS_DRAWN:
        titles = {cluster.id: cluster.title for cluster in report.clusters}
        names = [titles.get(cluster, f"Cluster {cluster}") for cluster in table.clusters]
        caption = "True classes (rows) against clusters (columns), in percent of each class"
        drawn["scores"].append((caption, charts.contingency(table.counts, table.classes, names)))
    if report.clusters:
        sizes = [cluster.size for cluster in report.clusters]
        caption = "Images per cluster" if len(sizes) <= charts.LABELLED_BARS else "Clusters by size"
        names = [cluster.title for cluster in report.clusters]
        drawn["sizes"].append((caption, charts.size_histogram(sizes, names)))
    if report.confidence:
        drawn["sizes"].append(("Images by confidence", charts.confidence_histogram(report.confidence)))
    for curve in report.curves:
        chart = charts.curve(curve.series, curve.title, curve.x_label, start=curve.start, step=curve.step)
        drawn["training"].append((curve.title, chart))
    return drawn


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rayclust.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda text: formats.clean(text) if isinstance(text, str) and not isinstance(text, Markup) else text,
    )
    filters = ("count", "percent", "short_percent", "number", "duration", "shorten", "last_part", "flatten")
    environment.filters.update({name: getattr(formats, name) for name in filters})
    environment.globals.update(rate=formats.rate, best=best, image=_image, search_text=_search_text)
    return environment


def _image(picture: Picture) -> Markup | None:
    """Return the picture as an `img` tag; None where there is none, or none that a page may show."""
    header = picture.thumbnail and thumbnails.describe(picture.thumbnail)
    if not picture.thumbnail or not header:
        return None
    media_type, width, height = header
    source = f"data:{media_type};base64,{base64.b64encode(picture.thumbnail).decode('ascii')}"
    tag = '<img src="{}" alt="{}" width="{}" height="{}" decoding="async">'
    return Markup(tag).format(source, formats.clean(formats.shorten(picture.key)), width, height)  # noqa: S704 - a constant


def _search_text(cluster: Cluster) -> str:
    """Return the text that the search box looks in."""
    names = [cluster.title, f"#{cluster.id}", cluster.majority or "", *(name for name, _ in cluster.runners_up)]
    return formats.shorten(" ".join(names).casefold(), 400)
