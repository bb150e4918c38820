"""The content of a report, as plain data: no arrays of N rows, no URIs to open, no torch.

The report stage gathers it from the artefacts of a run; `page.render` turns it into text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from rayclust.arrays import IntArray, require_matrix
from rayclust.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of a cluster.

    Attributes:
        key: the image's key in its run.
        thumbnail: encoded webp, jpeg or png, as `thumbnails.thumbnail` makes them; None shows the key alone.
        confidence: in [0, 1]; None when the method gives none.
        uri: where the image lies, shown as text and never as a link.
        label: its true class, None without labels.
    """

    key: str
    thumbnail: bytes | None = None
    confidence: float | None = None
    uri: str = ""
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster: its name, its numbers and a few of its images.

    Attributes:
        id: the cluster's number in `assignments/`.
        size: images in it.
        name: None shows "Cluster 7".
        score: how well the name fits, larger is better, in the naming's own scale.
        runners_up: (name, score) of the next best names, best first.
        blind: (name, score) without the data set's own class names among the candidates; None where that was not asked.
        majority: the true class that most of its images have; None without labels.
        purity: share of its images in that class, in [0, 1]; None without labels.
        confidence: mean over its images, in [0, 1].
        exemplars: its most typical images, most typical first.
        outliers: its least typical images, least typical first.
    """

    id: int
    size: int
    name: str | None = None
    score: float | None = None
    runners_up: tuple[tuple[str, float], ...] = ()
    blind: tuple[str, float] | None = None
    majority: str | None = None
    purity: float | None = None
    confidence: float | None = None
    exemplars: tuple[Picture, ...] = ()
    outliers: tuple[Picture, ...] = ()

    @property
    def title(self) -> str:
        """The name, or "Cluster 7" where there is none."""
        return self.name or f"Cluster {self.id}"


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method's settings and scores.

    Attributes:
        name: the method, e.g. `temi`.
        settings: its config; nested groups are shown with dotted keys.
        metrics: metric name to value, the keys of `metrics.json` (`accuracy`, `nmi`, …); others are shown as they are.
        spread: metric name to standard deviation over seeds, where several were run.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """How long a stage took.

    Attributes:
        name: the stage's command.
        seconds: wall time.
        count: what it worked through; None shows no rate.
        unit: what `count` counts.
    """

    name: str
    seconds: float
    count: int | None = None
    unit: str = "images"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines over epochs (or over K, …) that share one axis.

    Attributes:
        title: what is drawn.
        series: name to values; values that are not finite leave a gap.
        x_label: what the horizontal axis counts.
        start: the first value's place on that axis.
        step: distance between two values on that axis; above 0.
    """

    title: str
    series: Mapping[str, Sequence[float]]
    x_label: str = "epoch"
    start: float = 1
    step: float = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure that was drawn before the page is.

    Attributes:
        key: what its file is called, without an ending.
        title: what it shows.
        text: how to read it, in a sentence or two.
        svg: by a function of `charts`, every string in it escaped.
        is_wide: whether it needs the width of the page.
    """

    key: str
    title: str
    text: str
    svg: Markup
    is_wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One image with those nearest to it in each space.

    Attributes:
        query: the image.
        found: title of the space to (image, cosine) pairs, nearest first.
    """

    query: Picture
    found: Mapping[str, tuple[tuple[Picture, float], ...]]


@dataclass(frozen=True, kw_only=True)
class Contingency:
    """How the true classes fall into the clusters.

    Attributes:
        counts: Int[C K], images of class c in cluster k.
        classes: C names.
        clusters: K cluster ids.

    Raises:
        ShapeError: `counts` does not match `classes` and `clusters`.
    """

    counts: IntArray
    classes: tuple[str, ...]
    clusters: tuple[int, ...]

    def __post_init__(self) -> None:
        require_matrix(self.counts, "contingency.counts", len(self.clusters))
        if self.counts.shape[0] != len(self.classes):
            raise ShapeError(f"contingency.counts has {self.counts.shape[0]} rows for {len(self.classes)} classes")


@dataclass(frozen=True, kw_only=True)
class RejectGroup:
    """The inputs set aside for one reason: how many, and `key`, `uri` and `detail` of some of them."""

    reason: str
    count: int
    examples: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that one page shows.

    Attributes:
        run: the run's folder or URI.
        images: N, the images that were clustered.
        encoder: its name, e.g. `open_clip/ViT-L-14`.
        dimension: D, the width of an embedding.
        methods: the first one made `clusters`; the others stand beside it in the table of scores.
        clusters: all K of them, in any order.
        title: the page's title; empty takes the last part of `run`.
        classes: number of true classes; None when the run has no labels.
        stages: in the order they ran.
        versions: package to version.
        config: RUN.yaml as it was run.
        curves: training curves.
        confidence: images per equal bin of confidence over [0, 1]; empty draws nothing.
        contingency: classes against clusters; None draws nothing.
        drawings: the method's own figures.
        retrieval: a few images with their nearest in each space; empty for methods without a space of their own.
        rejects: grouped by reason.
        notes: sentences that the reader should see first, e.g. a health warning.

    Raises:
        ConfigError: two clusters share an id, a size is negative, or there is no method.
    """

    run: str
    images: int
    encoder: str
    dimension: int
    methods: tuple[MethodResult, ...]
    clusters: tuple[Cluster, ...]
    title: str = ""
    classes: int | None = None
    stages: tuple[StageTime, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    curves: tuple[Curve, ...] = ()
    confidence: tuple[int, ...] = ()
    contingency: Contingency | None = None
    drawings: tuple[Drawing, ...] = ()
    retrieval: tuple[Retrieval, ...] = ()
    rejects: tuple[RejectGroup, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("report.methods is empty: name at least the method that made the clusters")
        seen: set[int] = set()
        for cluster in self.clusters:
            if cluster.size < 0:
                raise ConfigError(f"report.clusters: cluster {cluster.id} has size {cluster.size}: must be at least 0")
            if cluster.id in seen:
                raise ConfigError(f"report.clusters: id {cluster.id} is given twice: ids must be unique")
            seen.add(cluster.id)

    @property
    def rejected(self) -> int:
        """Inputs that were set aside, over all reasons."""
        return sum(group.count for group in self.rejects)
