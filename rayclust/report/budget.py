"""What a page can hold: how many cards, rows and pictures, so that it opens quickly whatever the run's size."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from rayclust.options import Config
from rayclust.report.contents import Cluster, Picture, RejectGroup, ReportData

ROW_BYTES = 400
"""What a row of the table takes at least to leave room for: the longest shown name and class, and the numbers."""
CONFIG_CHARACTERS = 100_000


class PageLimits(Config):
    """How much one page shows; what does not fit is counted on the page."""

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
    """The part of a report that its page shows.

    Attributes:
        cards: clusters with pictures, largest first.
        rows: clusters in the table, largest first.
        rejects: most frequent reason first, each with a few examples.
        other_reasons: reasons that are not in `rejects`.
        dropped_pictures: pictures left out to keep the page small.
    """

    cards: tuple[Cluster, ...]
    rows: tuple[Cluster, ...]
    rejects: tuple[RejectGroup, ...]
    other_reasons: int = 0
    dropped_pictures: int = 0

    @property
    def pictures(self) -> int:
        """Pictures that are shown."""
        return sum(picture.thumbnail is not None for card in self.cards for picture in _pictures(card))


def featured(sizes: Sequence[int], limits: PageLimits | None = None) -> list[int]:
    """The clusters that get pictures: whoever gathers a report fetches images for these alone.

    Args:
        sizes: K numbers of images; the place is the cluster.
        limits: None takes the defaults.

    Returns:
        Cluster numbers, largest first, the smaller number first among equals; empty clusters get no pictures.
    """
    cards = (limits or PageLimits()).cards
    filled = (cluster for cluster, size in enumerate(sizes) if size > 0)
    return sorted(filled, key=lambda cluster: (-sizes[cluster], cluster))[:cards]


def select(data: ReportData, limits: PageLimits) -> Selection:
    """Takes the largest clusters, the commonest rejects and no more pictures per cluster than allowed."""
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


def without_pictures(selection: Selection) -> Selection:
    """The same selection with keys alone."""
    return replace(selection, cards=tuple(_keep(card, ()) for card in selection.cards))


def fit_pictures(selection: Selection, room: int) -> Selection:
    """Keeps the pictures that fit, every cluster's first ones before any cluster's later ones.

    Args:
        selection: what the page shows.
        room: bytes for pictures, base64 and all.

    Returns:
        The selection with the thumbnails that do not fit taken out, and their number.
    """
    queue = sorted(
        (_rank(card, place), number, place)
        for number, card in enumerate(selection.cards)
        for place, picture in enumerate(_pictures(card))
        if picture.thumbnail is not None
    )
    kept: list[set[int]] = [set() for _ in selection.cards]
    dropped = 0
    for _, number, place in queue:
        cost = _encoded_size(_pictures(selection.cards[number])[place])
        if cost > room or dropped:
            dropped += 1
            continue
        kept[number].add(place)
        room -= cost
    cards = tuple(_keep(card, places) for card, places in zip(selection.cards, kept, strict=True))
    return replace(selection, cards=cards, dropped_pictures=dropped)


def _pictures(card: Cluster) -> tuple[Picture, ...]:
    return card.exemplars + card.outliers


def _rank(card: Cluster, place: int) -> int:
    """Exemplar 0, 1, 2, then outlier 0 beside exemplar 3, and so on."""
    return place if place < len(card.exemplars) else place - len(card.exemplars) + 3


def _keep(card: Cluster, places: Iterable[int]) -> Cluster:
    wanted = set(places)
    pictures = [
        picture if place in wanted else replace(picture, thumbnail=None)
        for place, picture in enumerate(_pictures(card))
    ]
    first = len(card.exemplars)
    return replace(card, exemplars=tuple(pictures[:first]), outliers=tuple(pictures[first:]))


def _encoded_size(picture: Picture) -> int:
    # the tag around the data takes about 120 bytes
    return 120 + len(base64.b64encode(picture.thumbnail or b""))
