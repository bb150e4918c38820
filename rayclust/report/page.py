"""The page of a run: it asks nobody for anything, runs anywhere, and is the same text for the same report.

`write` puts `index.html` and, where its pictures and map are large, files of data beside it (`payload.py`); `SCORES`
lists the metrics with their names and formats.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rayclust.report import charts, formats, payload, thumbnails
from rayclust.report.formats import number, percent
from rayclust.report.model import MethodResult, ReportData

logger = logging.getLogger(__name__)

CLASSES_DRAWN = 60
"""The table of classes against clusters is drawn for at most so many classes …"""
CLUSTERS_DRAWN = 100
"""… and so many clusters: beyond, its cells are too small to read."""
CHOICE = "selection"
"""Key of the drawing that has a section of its own: how the number of clusters was chosen."""
CONFIG_CHARACTERS = 100_000
REJECTS, REASONS = 10, 50
"""Most examples for each reason, and reasons, the most frequent ones, in the table of rejects."""
SCRIPTS = ("map.js", "page.js")


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
    Score("fmi", "FMI", "Precision and recall over pairs of images, their geometric mean. Above 0% by chance."),
    Score("purity", "Purity", "Images that belong to their cluster's most common class. Rises with more clusters."),
    Score(
        "linear_probe", "Linear probe", "Images whose class a linear layer tells after seeing others with their labels."
    ),
    Score("linear_evaluation", "Linear evaluation", "The same of the network, learnt from views of all images."),
    Score("linear_evaluation_top5", "Linear evaluation, top 5", "Images whose class is among its first five guesses."),
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
        "zero_shot_accuracy",
        "Zero-shot",
        "Images to which their own class's name is the nearest of all class names. Needs these names, no clusters.",
    ),
    Score(
        "silhouette",
        "Silhouette",
        "How much closer images lie to their own cluster than to the next one, on a sample. -1 to 1. Needs no labels.",
        is_share=False,
    ),
    Score("space_std", "Spread", "Of the learnt features: 1 fills all directions, 0 has collapsed.", is_share=False),
    Score("space_rank", "Directions", "That the learnt features use, of their width.", is_share=False),
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


def write(report: ReportData, put: Callable[[str, bytes], None]) -> None:
    """Write the page of a run: `index.html` last, before it files below `data/` where there is too much for one page.

    Every string of the report is shown as text and escaped; a key or a name can hold anything. The page forbids itself,
    by its content security policy, all but its own script, what that script loads from beside it, and pictures of this
    machine.

    Args:
        report: what to show; `report.gallery` is asked for each cluster once.
        put: writes a file, given its path below the page's folder and its content.
    """
    # 1. Clusters that have images, the largest first, and the map.
    files, ranked = payload.DataFiles(put), sorted(report.clusters, key=lambda cluster: (-cluster.size, cluster.id))
    ranked = [cluster for cluster in ranked if cluster.size > 0]
    packs = payload.add_clusters(report, ranked, files)
    points = payload.add_points(report.points, ranked, files) if report.points and len(report.points.row) else None
    # 2. The numbers on the first screen: label, value, hint.
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
    # 3. All that the page itself says.
    groups = sorted(report.rejects, key=lambda group: (-group.count, group.reason))
    context: dict[str, Any] = {
        "report": report,
        "title": report.title or formats.last_part(report.run) or "run",
        "headline": tiles,
        "columns": columns(report.methods),
        "charts": _charts(report),
        "choice": [drawing for drawing in report.drawings if drawing.key == CHOICE],
        "drawings": [drawing for drawing in report.drawings if drawing.key != CHOICE],
        "empty": len(report.clusters) - len(ranked),
        "points": points,
        "rejects": [replace(group, examples=group.examples[:REJECTS]) for group in groups[:REASONS]],
        "other_reasons": max(0, len(groups) - REASONS),
        "config": formats.shorten(report.config, CONFIG_CHARACTERS),
        # Both are JSON without "<", from `payload.encode`.
        "index": Markup(payload.index(report, ranked, packs, points)),  # noqa: S704
        "inline": {name: Markup(text) for name, text in files.inline.items()},  # noqa: S704
    }
    for kind, names in (("style", ("page.css",)), ("script", SCRIPTS)):
        folder = resources.files("rayclust.report").joinpath("templates")
        text = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)
        context[kind] = Markup(text)  # noqa: S704 - our own files
        context[f"{kind}_hash"] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    html = _environment().get_template("page.html.j2").render(context).encode()
    put("index.html", html)
    logger.info("report: %d clusters in %d packs, first page %.1f MB", len(ranked), len(packs), len(html) / 1e6)


def _charts(report: ReportData) -> dict[str, list[tuple[str, Markup]]]:
    """Return section to (caption, chart)."""
    drawn: dict[str, list[tuple[str, Markup]]] = {"scores": [], "sizes": [], "training": []}
    table = report.contingency
    if table is not None and 0 < len(table.classes) <= CLASSES_DRAWN and 0 < len(table.clusters) <= CLUSTERS_DRAWN:
        titles = {cluster.id: cluster.name for cluster in report.clusters}
        names = [titles.get(cluster) or f"#{cluster}" for cluster in table.clusters]
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
    environment.globals.update(rate=formats.rate, best=best, data_url=thumbnails.data_url)
    return environment
