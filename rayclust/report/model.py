"""The content of a report, as plain data: no arrays of N rows, no URIs to open, no torch.

The report stage gathers it from the artefacts of a run; `page.write` makes files of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from rayclust.arrays import FloatArray, IntArray, require_matrix
from rayclust.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the run, by its key."""

    key: str
    thumbnail: bytes | None = None
    """Encoded webp, jpeg or png, as `thumbnails.thumbnail` makes them; None shows the key alone."""
    confidence: float | None = None
    """In [0, 1]; None when the method gives none."""
    uri: str = ""
    """Where the image lies; the page links to local files and to the web, and shows other places as text."""
    label: str | None = None
    """Its true class, None without labels."""
    row: int | None = None
    """Its row in the run's tables."""
    neighbors: tuple[tuple[int, int, float], ...] = ()
    """(row, cluster, cosine) of the images nearest to it, nearest first."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images of one cluster."""

    typical: tuple[Picture, ...] = ()
    """Most typical first."""
    borderline: tuple[Picture, ...] = ()
    """Uncertain ones whose neighbours lie in one other cluster, the least certain first."""
    outliers: tuple[Picture, ...] = ()
    """Uncertain ones that are near to no other cluster, the least certain first."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One cluster: its number in `assignments/`, its name and its measures; its images are a `Gallery`.

    Attributes:
        score: how well the name fits, larger is better, in the naming's own scale.
        runners_up: (name, score) of the next best names, best first.
        blind: (name, score) without the data set's own class names among the candidates; None where that was not asked.
        majority: the true class that most of its images have; None without labels.
        purity: share of its images in that class, in [0, 1]; None without labels.
        confidence: mean over its images, in [0, 1].
        nearest: (cluster, cosine) of the clusters whose typical images are most like its own, nearest first.
        parents: the group that it belongs to in each of the report's `levels`.
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
    nearest: tuple[tuple[int, float], ...] = ()
    parents: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The name; without one the best guess: a name that came close, the commonest class, at last the number."""
        if self.name:
            return self.name
        if self.runners_up:
            return f"{self.runners_up[0][0]}?"
        return f"mostly {self.majority}" if self.majority else f"#{self.id}"


@dataclass(frozen=True, kw_only=True)
class MapPoints:
    """Images on a plane, for the map: neighbours are alike.

    Attributes:
        row: Int[m].
        cluster: Int[m], ids.
        x, y: Float[m], in one scale.
        keys: of the rows, m of them.
        title, text: what the map shows and how to read it.
    """

    row: IntArray
    cluster: IntArray
    x: FloatArray
    y: FloatArray
    keys: Sequence[str]
    title: str = "Map"
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method's config; its scores by the keys of `metrics.json`; and their standard deviations over seeds."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """The wall time of a stage, and how much it worked through; None shows no rate."""

    name: str
    seconds: float
    count: int | None = None
    unit: str = "images"
    workers: int = 0
    """Most workers at once; 0 where they were not counted."""
    busy: float = 0
    """Seconds of work, summed over the workers."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines over epochs (or over K, …) that share one axis, as `charts.curve` takes them."""

    title: str
    series: Mapping[str, Sequence[float]]
    x_label: str = "epoch"
    start: float = 1
    step: float = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure that was drawn before the page is, by a function of `charts`, and how to read it."""

    key: str
    """Name of its file, without an ending."""
    title: str
    text: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One image, and by the title of a space (image, cosine) pairs, nearest first."""

    query: Picture
    found: Mapping[str, tuple[tuple[Picture, float], ...]]


@dataclass(frozen=True, kw_only=True)
class Curation:
    """What the stage curate found."""

    counts: Mapping[str, int]
    """Rows by what became of them, `rows` first."""
    epsilon: float
    policy: str
    recall: float | None
    """Share of the near pairs of a sample that was found."""
    curve: tuple[tuple[float, float], ...]
    """(ε, share of the rows kept)."""
    groups: tuple[tuple[int, tuple[Picture, ...]], ...]
    """The largest groups of duplicates: (rows, some of them, the kept ones first)."""
    pairs: tuple[tuple[float, tuple[tuple[Picture, Picture, float], ...]], ...]
    """For several ε, pairs just within: (ε, (image, image, cosine))."""
    outliers: tuple[Picture, ...]
    """The oddest images, the oddest first."""


@dataclass(frozen=True, kw_only=True)
class Contingency:
    """Int[C K] images of class c in cluster k, C names and K ids; a ShapeError where these don't match."""

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
        images: N, the images that were clustered.
        dimension: D, the width of an embedding.
        methods: the first one made `clusters`; the others stand beside it in the table of scores.
        clusters: all K of them, in any order.
        gallery: the images of a cluster, by its id; asked for once for each, largest first, so that memory holds few.
        title: the page's title, what was clustered; empty takes the last part of `run`.
        levels: number of groups in each coarser level, the finest first.
        points: the map; None draws none.
        classes: number of true classes; None when the run has no labels.
        config: RUN.yaml as it was run.
        confidence: images per equal bin of confidence over [0, 1]; empty draws nothing.
        candidates: of a method that chooses among partitions: `name`, `chosen`, the evidence by title, maybe a `note`.
        retrieval: empty for methods without a space of their own.
        curation: None in runs without the stage curate.
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
    gallery: Callable[[int], Gallery] = lambda _: Gallery()
    title: str = ""
    levels: tuple[int, ...] = ()
    points: MapPoints | None = None
    classes: int | None = None
    stages: tuple[StageTime, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    curves: tuple[Curve, ...] = ()
    confidence: tuple[int, ...] = ()
    contingency: Contingency | None = None
    drawings: tuple[Drawing, ...] = ()
    candidates: tuple[Mapping[str, Any], ...] = ()
    retrieval: tuple[Retrieval, ...] = ()
    curation: Curation | None = None
    rejects: tuple[RejectGroup, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("report.methods is empty: name at least the method that made the clusters")
        seen = set[int]()
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
