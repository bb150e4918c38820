"""What the page's script reads: the list of clusters, their images in packs of about a megabyte, and the map.

All are JSON. What fits into the first page stands in it; the rest are scripts beside it, since a page that was opened
from a disk may load scripts and pictures but no data. Each calls `rayclust(name, value)` and does nothing else.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayclust.report import formats, thumbnails
from rayclust.report.model import Cluster, MapPoints, Picture, ReportData

PACK_BYTES = 1_000_000
"""A pack of clusters is full when it has so many characters."""
INLINE_BYTES = 2_000_000
"""Characters of data that the first page holds; the largest clusters come first."""
KEYS_EACH = 20_000
"""Points whose keys lie in one file."""
SEARCHED_RUNNERS_UP = 3
"""Next best names by which a cluster is found."""
KEY_LENGTH, URI_LENGTH, NAME_LENGTH = 300, 1000, 120
"""Characters; longer ones are cut in the middle."""


@dataclass
class DataFiles:
    """Values by name: in the page while there is room, then each in a file of its own."""

    put: Callable[[str, bytes], None]
    """Writes a file beside the page, given its name and content."""
    room: int = INLINE_BYTES
    """Characters that the page still takes."""
    inline: dict[str, str] = field(default_factory=dict, init=False)
    """JSON that goes into the page, safe inside of a script element."""

    def add(self, name: str, text: str) -> None:
        """Keep or write one value, given as `encode` makes it; once one is too long, all later ones are files."""
        if len(text) <= self.room:
            self.room -= len(text)
            self.inline[name] = text
        else:
            self.room = -1
            self.put(f"data/{name}.js", f'rayclust("{name}",{text});\n'.encode("ascii"))


def encode(value: Any) -> str:
    """Return JSON in ASCII that ends no script element, whatever strings it holds."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def add_clusters(report: ReportData, ranked: Sequence[Cluster], files: DataFiles) -> list[int]:
    """Add the clusters' images and what only their own pages show; return the place of each pack's first cluster."""
    firsts, texts, length = list[int](), list[str](), 0
    for place, cluster in enumerate(ranked):
        gallery = report.gallery(cluster.id)
        text = encode(
            {
                "typical": [_picture(each) for each in gallery.typical],
                "borderline": [_picture(each) for each in gallery.borderline],
                "outliers": [_picture(each) for each in gallery.outliers],
                "score": _number(cluster.score),
                "runners": [[_text(name), _number(score)] for name, score in cluster.runners_up],
                "blind": cluster.blind and [_text(cluster.blind[0]), _number(cluster.blind[1])],
                "nearest": [[other, _number(cosine)] for other, cosine in cluster.nearest],
            }
        )
        if not texts:
            firsts.append(place)
        texts.append(text)
        length += len(text)
        if length >= PACK_BYTES or place == len(ranked) - 1:
            files.add(f"clusters-{len(firsts) - 1:05d}", f"[{','.join(texts)}]")
            texts, length = [], 0
    return firsts


def add_points(points: MapPoints, ranked: Sequence[Cluster], files: DataFiles) -> dict[str, Any]:
    """Add the map: places as whole numbers of 16 bits, clusters as places in the list, and keys in files of their own.

    Returns:
        What the list says of the map: number of points, keys in each file, title, text.
    """
    place_of = {cluster.id: place for place, cluster in enumerate(ranked)}
    places = np.array([place_of[cluster] for cluster in points.cluster.tolist()], "<u4")
    files.add(
        "points", encode(map_columns(np.asarray(points.x), np.asarray(points.y)) | {"cluster": base64_of(places)})
    )
    rows = points.row.tolist()
    for start in range(0, len(rows), KEYS_EACH):
        some = slice(start, start + KEYS_EACH)
        keys = [formats.clean(key) for key in points.keys[some]]  # whole: people take them away
        files.add(f"keys-{start // KEYS_EACH:05d}", encode({"key": keys, "row": rows[some]}))
    return {
        "count": len(rows),
        "each": KEYS_EACH,
        "title": _text(points.title),
        "text": formats.shorten(formats.clean(points.text), 900),
    }


def map_columns(x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> dict[str, str]:
    """Return places on the plane, Float[n] each, as the map's script reads them: little-endian UInt16[n] in base64."""
    span = max([1e-12, *(float(np.ptp(values)) for values in (x, y) if len(values))])
    columns = dict[str, str]()
    for name, values in (("x", x.astype(np.float64)), ("y", y.astype(np.float64))):
        middle = (values.min() + values.max()) / 2 if len(values) else 0.0
        columns[name] = base64_of((65_535 * (0.5 + (values - middle) / span)).round().astype("<u2"))
    return columns


def base64_of(column: NDArray[Any]) -> str:
    """Return the bytes of an array in base64."""
    return base64.b64encode(column.tobytes()).decode()


def index(report: ReportData, ranked: Sequence[Cluster], packs: list[int], points: dict[str, Any] | None) -> str:
    """Return the list of all clusters, by column and in order of size, as the page's script reads it."""
    words, classes = dict[str, int](), dict[str, int]()

    def place(text: str | None, known: dict[str, int]) -> int:
        """Return the number of a string among those that were seen, −1 for None."""
        return -1 if text is None else known.setdefault(_text(text), len(known))

    return encode(
        {
            "images": report.images,
            "id": [c.id for c in ranked],
            "size": [c.size for c in ranked],
            "name": [place(c.name or None, words) for c in ranked],
            "runners": [[place(name, words) for name, _ in c.runners_up[:SEARCHED_RUNNERS_UP]] for c in ranked],
            "confidence": [_permille(c.confidence) for c in ranked],
            "purity": [_permille(c.purity) for c in ranked],
            "label": [place(c.majority, classes) for c in ranked],
            "levels": [
                {"clusters": count, "parent": [c.parents[level] for c in ranked]}
                for level, count in enumerate(report.levels)
            ],
            "words": list(words),
            "classes": list(classes),
            "packs": packs,
            "points": points,
        }
    )


def _picture(picture: Picture) -> list[Any]:
    """Return key, row, confidence, label, URI, neighbours, and the thumbnail's data URL, width and height."""
    shown = thumbnails.data_url(picture.thumbnail) or (None, 0, 0)
    near = [[row, cluster, _number(cosine)] for row, cluster, cosine in picture.neighbors]
    key, uri = formats.shorten(formats.clean(picture.key), KEY_LENGTH), formats.clean(picture.uri)
    uri = uri if len(uri) <= URI_LENGTH else ""  # a link that was cut leads nowhere
    label = None if picture.label is None else _text(picture.label)
    return [key, picture.row, _permille(picture.confidence), label, uri, near, *shown]


def _text(text: str) -> str:
    return formats.shorten(formats.clean(text), NAME_LENGTH)


def _permille(share: float | None) -> int:
    """Return a share in thousandths, rounded down; −1 where there is none."""
    return -1 if share is None or not math.isfinite(share) else math.floor(1000 * share + 1e-6)


def _number(value: float | None) -> float | None:
    """Return a number to four digits; None where JSON has none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
