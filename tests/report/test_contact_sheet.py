from __future__ import annotations

import dataclasses
import io

import pytest
from PIL import Image

from rayclust.errors import ConfigError
from rayclust.report.contact_sheet import contact_sheet
from rayclust.report.contents import Cluster, Picture
from rayclust.report.thumbnails import placeholder
from tests.report.pages import photo, report


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return image


def test_the_grid_has_a_card_per_cluster() -> None:
    clusters = report().clusters
    one = opened(contact_sheet(clusters[:1]))
    row = opened(contact_sheet(clusters))
    column = opened(contact_sheet(clusters, columns=1))
    assert row.height == one.height
    assert column.width == one.width
    assert row.width - 20 == 3 * (one.width - 20)
    assert column.height - 20 == 3 * (one.height - 20)


def test_pictures_lie_on_their_card() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (200, 10, 20)).save(buffer, "PNG")
    picture = Picture(key="a", thumbnail=buffer.getvalue())
    sheet = opened(contact_sheet([Cluster(id=0, size=1, exemplars=(picture,))], picture=50))
    assert sheet.getpixel((20 + 14 + 25, 20 + 40 + 25)) == (200, 10, 20)
    assert sheet.getpixel((20 + 14 + 54 + 25, 20 + 40 + 25)) == (255, 255, 255)


def test_the_same_clusters_give_the_same_bytes() -> None:
    assert contact_sheet(report().clusters) == contact_sheet(report().clusters)


def test_odd_names_and_missing_pictures_are_drawn() -> None:
    shown = (Picture(key="none"), Picture(key="p", thumbnail=placeholder()), Picture(key="j", thumbnail=photo(1)))
    names = ["x" * 500, "line\nbreak\x00", "שלום 🙂", None]
    clusters = [Cluster(id=i, size=10**9, name=name, exemplars=shown) for i, name in enumerate(names)]
    assert opened(contact_sheet(clusters)).width > 1000
    assert opened(contact_sheet([dataclasses.replace(clusters[0], exemplars=())])).width > 300


@pytest.mark.parametrize(("clusters", "columns", "picture"), [(0, 4, 110), (1, 0, 110), (1, 4, 3)])
def test_impossible_sheets_are_refused(clusters: int, columns: int, picture: int) -> None:
    with pytest.raises(ConfigError, match="needs at least 1, 1 and 16"):
        contact_sheet(report().clusters[:clusters], columns=columns, picture=picture)
