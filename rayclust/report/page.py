"""One self-contained HTML page of a run: it loads nothing, runs anywhere, and is the same text for the same report."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rayclust.report import figures, formats, scores, thumbnails
from rayclust.report.budget import CONFIG_CHARACTERS, PageLimits, Selection, fit_pictures, select, without_pictures
from rayclust.report.contents import Cluster, Picture, ReportData

logger = logging.getLogger(__name__)

CLASSES_DRAWN = 60
"""The table of classes against clusters is drawn for at most so many classes …"""
CLUSTERS_DRAWN = 100
"""… and so many clusters: beyond, its cells are too small to read."""

CHOICE = "selection"
"""Key of the drawing that has a section of its own: how the number of clusters was chosen."""

NOTE_BYTES = 300
"""Room for the sentence that counts the pictures left out."""


def render(report: ReportData, limits: PageLimits | None = None) -> str:
    """The page of a run.

    Every string of the report is shown as text and escaped; a key or a name can hold anything. The page forbids itself,
    by its content security policy, to load or send anything.

    Args:
        report: what to show.
        limits: how much of it; None takes the defaults.

    Returns:
        HTML5 text that UTF-8 can encode, within `limits.bytes` unless names, settings and figures alone exceed it.
    """
    limits = limits or PageLimits()
    shown = select(report, limits)
    text_bytes = len(_html(report, without_pictures(shown)).encode())
    fitted = fit_pictures(shown, limits.bytes - text_bytes - NOTE_BYTES)
    html = _html(report, fitted)
    logger.info(
        "report: %d of %d clusters with %d pictures, %.1f MB",
        len(fitted.cards),
        len(report.clusters),
        fitted.pictures,
        len(html.encode()) / 1e6,
    )
    return html


def _html(report: ReportData, shown: Selection) -> str:
    template = _environment().get_template("page.html.j2")
    return template.render(
        report=report,
        shown=shown,
        title=report.title or formats.last_part(report.run) or "run",
        headline=_headline(report),
        columns=scores.columns(report.methods),
        charts=_charts(report),
        choice=[(drawing, _svg(drawing.svg)) for drawing in report.drawings if drawing.key == CHOICE],
        drawings=[(drawing, _svg(drawing.svg)) for drawing in report.drawings if drawing.key != CHOICE],
        empty=sum(cluster.size == 0 for cluster in report.clusters),
        named=any(cluster.name for cluster in report.clusters),
        confident=any(cluster.confidence is not None for cluster in report.clusters),
        config=formats.shorten(report.config, CONFIG_CHARACTERS),
        style=_asset("page.css"),
        script=_asset("page.js"),
        style_hash=_policy_hash("page.css"),
        script_hash=_policy_hash("page.js"),
    )


def _headline(report: ReportData) -> list[tuple[str, str, str]]:
    """(label, value, hint) of the numbers on the first screen."""
    tiles = [
        ("Images", formats.count(report.images), ""),
        ("Clusters", formats.count(len(report.clusters)), ""),
    ]
    measured = scores.columns(report.methods[:1])
    wanted = [score for score in measured if score.key in ("accuracy", "nmi", "ari", "silhouette")]
    tiles += [(s.short, s.write(report.method.metrics.get(s.key)), s.meaning) for s in wanted[:3]]
    if report.rejected or report.images:
        share = report.rejected / max(1, report.rejected + report.images)
        hint = f"{formats.percent(share)} of the inputs could not be used" if report.rejected else ""
        tiles.append(("Rejected", formats.count(report.rejected), hint))
    seconds = sum(stage.seconds for stage in report.stages)
    if seconds:
        tiles.append(("Time", formats.duration(seconds), "all stages together"))
    return tiles


def _charts(report: ReportData) -> dict[str, list[tuple[str, Markup]]]:
    """Section to (caption, drawing)."""
    charts: dict[str, list[tuple[str, Markup]]] = {"scores": [], "sizes": [], "training": []}
    drawn = report.contingency
    if drawn is not None and 0 < len(drawn.classes) <= CLASSES_DRAWN and 0 < len(drawn.clusters) <= CLUSTERS_DRAWN:
        titles = {cluster.id: cluster.title for cluster in report.clusters}
        names = [titles.get(cluster, f"Cluster {cluster}") for cluster in drawn.clusters]
        caption = "True classes (rows) against clusters (columns), in percent of each class"
        charts["scores"].append((caption, _svg(figures.contingency(drawn.counts, drawn.classes, names))))
    if report.clusters:
        sizes = [cluster.size for cluster in report.clusters]
        caption = "Images per cluster" if len(sizes) <= figures.LABELLED_BARS else "Clusters by size"
        names = [cluster.title for cluster in report.clusters]
        charts["sizes"].append((caption, _svg(figures.size_histogram(sizes, names))))
    if report.confidence:
        charts["sizes"].append(("Images by confidence", _svg(figures.confidence_histogram(report.confidence))))
    for curve in report.curves:
        drawing = figures.curve(curve.series, curve.title, curve.x_label, start=curve.start, step=curve.step)
        charts["training"].append((curve.title, _svg(drawing)))
    return charts


def _svg(drawing: str) -> Markup:
    return Markup(drawing)  # noqa: S704 - figures escape every string that they draw


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rayclust.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    filters: Sequence[Callable[..., object]] = (
        formats.count,
        formats.percent,
        formats.short_percent,
        formats.number,
        formats.duration,
        formats.shorten,
        formats.last_part,
        formats.flatten,
    )
    environment.filters.update({function.__name__: function for function in filters})
    environment.globals.update(
        rate=formats.rate, best=scores.best, image=_image, grade=_grade, search_text=_search_text
    )
    return environment


def _printable(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return formats.clean(value)
    return value


def _image(picture: Picture) -> Markup | None:
    """The picture as an `img` tag; None where there is none, or none that a page may show."""
    found = picture.thumbnail and thumbnails.describe(picture.thumbnail)
    if not picture.thumbnail or not found:
        return None
    media_type, width, height = found
    source = thumbnails.data_uri(picture.thumbnail, media_type)
    tag = '<img src="{}" alt="{}" width="{}" height="{}" decoding="async">'
    return Markup(tag).format(source, formats.clean(formats.shorten(picture.key)), width, height)  # noqa: S704 - a constant


def _grade(share: float) -> str:
    """Class name of a share's colour; the number always stands beside it."""
    return "good" if share >= 0.8 else "fair" if share >= 0.5 else "poor"


def _search_text(cluster: Cluster) -> str:
    """What the search box looks in."""
    names = [cluster.title, f"#{cluster.id}", cluster.majority or "", *(name for name, _ in cluster.runners_up)]
    return formats.shorten(" ".join(names).casefold(), 400)


def _asset(name: str) -> Markup:
    text = resources.files("rayclust.report").joinpath("templates", name).read_text(encoding="utf-8")
    return Markup(text)  # noqa: S704 - our own file


def _policy_hash(name: str) -> str:
    return base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode("ascii")
