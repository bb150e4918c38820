"""A still picture of the clusters, for a README, a slide or a message."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from rayclust.errors import ConfigError
from rayclust.report.contents import Cluster
from rayclust.report.formats import clean, count
from rayclust.report.thumbnails import placeholder

PICTURES = 6
"""Images per cluster, in two rows of three."""
GROUND, CARD, INK, SOFT = "#f6f6f4", "#ffffff", "#1b1d21", "#5d646d"

_GAP, _INSET, _HEAD = 20, 14, 40


def contact_sheet(clusters: Sequence[Cluster], *, columns: int = 4, picture: int = 110) -> bytes:
    """The first six exemplars of each cluster under its name and size, in a grid.

    Args:
        clusters: in the order of the grid; thumbnails as `thumbnails.thumbnail` makes them.
        columns: cards per row, at least 1.
        picture: pixels on each side of an image, at least 16.

    Returns:
        An encoded PNG, the same bytes for the same clusters. Letters outside Latin script may be missing from its font.

    Raises:
        ConfigError: there is no cluster, or a number is out of its range.
    """
    if not clusters or columns < 1 or picture < 16:
        given = f"{len(clusters)} clusters, columns = {columns}, picture = {picture}"
        raise ConfigError(f"contact_sheet got {given}: needs at least 1, 1 and 16")
    columns = min(columns, len(clusters))
    width, height = 3 * picture + 8 + 2 * _INSET, 2 * picture + 4 + _HEAD + _INSET
    rows = math.ceil(len(clusters) / columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, GROUND)
    for index, cluster in enumerate(clusters):
        row, column = divmod(index, columns)
        left, top = _GAP + column * (width + _GAP), _GAP + row * (height + _GAP)
        ImageDraw.Draw(sheet).rounded_rectangle((left, top, left + width, top + height), radius=12, fill=CARD)
        _head(sheet, cluster, (left + _INSET, top + 9, width - 2 * _INSET))
        _pictures(sheet, cluster, (left + _INSET, top + _HEAD), picture)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _head(sheet: Image.Image, cluster: Cluster, place: tuple[int, int, int]) -> None:
    left, top, width = place
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(18), ImageFont.load_default(14)
    size = count(cluster.size)
    room = width - pen.textlength(size, plain) - 12
    title = " ".join(clean(cluster.title).split())
    while len(title) > 1 and pen.textlength(title, bold) > room:
        title = title.rstrip("…")[:-1] + "…"
    pen.text((left, top), title, INK, bold, stroke_width=0.4, stroke_fill=INK)
    pen.text((left + width, top + 3), size, SOFT, plain, anchor="ra")


def _pictures(sheet: Image.Image, cluster: Cluster, place: tuple[int, int], side: int) -> None:
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), radius=24, fill=255)
    mask = mask.resize((side, side), Image.Resampling.LANCZOS)
    shown = [exemplar for exemplar in cluster.exemplars if exemplar.thumbnail is not None][:PICTURES]
    for index, exemplar in enumerate(shown):
        row, column = divmod(index, 3)
        with Image.open(io.BytesIO(exemplar.thumbnail or placeholder())) as image:
            tile = ImageOps.fit(_on_card(image), (side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (place[0] + column * (side + 4), place[1] + row * (side + 4)), mask)


def _on_card(image: Image.Image) -> Image.Image:
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, CARD), colours).convert("RGB")
