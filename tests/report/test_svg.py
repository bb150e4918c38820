from __future__ import annotations

import math
from importlib import resources
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from rayclust.report import svg


def test_text_and_attributes_are_escaped() -> None:
    drawn = svg.element("text", "</text><script>", class_='"><img onerror=x>', fill_opacity=0.5, missing=None)
    assert drawn == (
        '<text class="&#34;&gt;&lt;img onerror=x&gt;" fill-opacity="0.5">&lt;/text&gt;&lt;script&gt;</text>'
    )


def test_elements_nest_without_being_escaped_twice() -> None:
    inner = svg.element("title", "a & b")
    assert svg.element("g", inner) == "<g><title>a &amp; b</title></g>"


def test_a_figure_is_xml_with_a_title_and_a_view_box() -> None:
    root = ET.fromstring(svg.figure(20, 10.5, "sizes < 3\x00", svg.rule(0, 0, 1, 1)))  # noqa: S314 - our own text
    assert root.attrib["viewBox"] == "0 0 20 10.5"
    assert root[0].text == "sizes < 3\ufffd"


@pytest.mark.parametrize(
    ("value", "written"), [(0.0, "0"), (-0.001, "0"), (1.005, "1"), (2.5, "2.5"), (100.0, "100"), (1e6, "1000000")]
)
def test_coordinates_are_short(value: float, written: str) -> None:
    assert svg.coordinate(value) == written


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 346), (-2.2, 1.1), (3.0, 3.0), (0, 0), (1e-9, 2e-9), (-5, -5), (1, 25_000), (0, 1e90)]
)
def test_ticks_are_round_evenly_spaced_and_cover_the_range(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    steps = [b - a for a, b in pairwise(found)]
    assert 3 <= len(found) <= 8
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert max(steps) == pytest.approx(min(steps))
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)) in (1, 2, 5)


def test_a_file_of_its_own_has_a_ground_and_both_themes() -> None:
    text = svg.standalone(svg.figure(10, 20, "t", svg.text(1, 2, "<b>")), "How to read it: a < b & c.")
    root = ET.fromstring(text.encode())  # noqa: S314 - our own text
    style, caption, ground, title, label = root
    assert caption.text == "How to read it: a < b & c."
    assert "prefers-color-scheme:dark" in (style.text or "")
    assert all(hue in (style.text or "") for hue in svg.DARK_HUES)
    assert ground.attrib["class"] == "ground"
    assert (title.text, label.text) == ("t", "<b>")


def test_the_page_and_files_agree_on_colours() -> None:
    """A figure looks the same on the page and in a file, in either theme."""
    page = resources.files("rayclust.report").joinpath("templates", "page.css").read_text(encoding="utf-8")
    light, dark = page.split("prefers-color-scheme: dark")[:2]
    for place, (hue, on_dark) in enumerate(zip(svg.HUES, svg.DARK_HUES, strict=True)):
        assert f"--h{place}: {hue};" in light
        assert f"--h{place}: {on_dark};" in dark
