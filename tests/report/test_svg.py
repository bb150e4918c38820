from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from math import floor, log10
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from rayclust.report import charts, svg
from tests.report.pages import HOSTILE, SVG, chart, shapes, tips, words


@lru_cache
def everything(text: str) -> list[str]:
    """One chart of each kind that says `text` wherever it can say anything."""
    panels = {text: np.eye(3), f"{text} ": np.ones((3, 3))}
    spectrum = charts.Spectrum(text, 0, np.array([1.0, 0.5]), np.ones((3, 2)))
    return [
        charts.size_histogram([1, 2], [text, "b"]),
        charts.curve({text: [1.0, 2.0], "b": [1.0]}, text, text),
        charts.contingency(np.eye(2, dtype=int), [text, "b"], [text, "b"]),
        charts.heatmap(panels, [charts.Group(text, 3)], ceiling=1, title=text),
        charts.scatter(np.eye(2), np.arange(2), {0: text, 1: "b"}, title=text),
        charts.spectra([spectrum], text),
        charts.criteria([charts.Criterion(text, {2: 0.0, 900: 1.0}, spread={2: 0.1})], 2, text),
        charts.sankey([charts.Flow(0, 0, 3, url="#/flow/0/0"), charts.Flow(0, 1, 1)], [text], [text, "b"], text),
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_strings_stay_text(text: str) -> None:
    for drawn, plain in zip(everything(text), everything("plain"), strict=True):
        nodes = list(chart(drawn).iter())
        assert {node.tag.removeprefix(SVG) for node in nodes} <= {"svg", "title", "text", "path", "image", "a"}
        assert len(nodes) == len(list(chart(plain).iter()))


def test_a_page_can_inline_every_chart() -> None:
    for drawn in everything("a"):
        root = chart(drawn)
        assert root.attrib["role"] == ("group" if "<a " in drawn else "img")
        assert root[0].tag == f"{SVG}title"
        assert root.attrib["viewBox"] == f"0 0 {root.attrib['width']} {root.attrib['height']}"
        for node in root.iter():
            assert {"id", "style", "clip-path"}.isdisjoint(node.attrib)
            assert node.attrib.get("href", "#").startswith(("data:image/png;base64,", "#"))
        assert "url(" not in drawn


def test_equal_numbers_give_equal_text_whatever_the_settings_of_the_process() -> None:
    import matplotlib as mpl

    everything.cache_clear()
    first = everything("a")
    everything.cache_clear()
    with mpl.rc_context({"font.size": 30, "axes.spines.top": True, "svg.hashsalt": None, "text.usetex": True}):
        assert everything("a") == first
        assert mpl.rcParams["font.size"] == 30


def test_colours_are_set_as_attributes_and_as_classes() -> None:
    root = chart(charts.size_histogram([3], ["cat"]))
    [bar] = shapes(root, "path")
    assert (bar.attrib["fill"], bar.attrib["class"]) == (svg.HUES[0], "hue-0")
    assert [(node.attrib["fill"], node.attrib["class"]) for node in shapes(root, "text")] == [
        (svg.INK, "fg"),
        (svg.GREY, "muted"),
    ]


def test_tooltips_belong_to_their_shape_and_are_cut() -> None:
    root = chart(charts.size_histogram([3], ["x" * 1000]))
    [tip] = tips(root)
    assert tip.startswith("xxx")
    assert tip.endswith(": 3")
    assert len(tip) == 300
    assert len(words(root)[0]) == 22


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("1.005", "1"),
        ("-0.001", "0"),
        ("100.0", "100"),
        ("rotate(-0 1.239 2)", "rotate(0 1.24 2)"),
        ("rotate(-45 1.5 2)", "rotate(-45 1.5 2)"),
        ("M 1.500000 2 \nL 3 4.25 \nz\n", "M1.5 2L3 4.25z"),
        ("M 1 2 \nL 1 2 \nM 3 4 \nL 5 6", "M1 2h0M3 4L5 6"),
        ("M 1 2 \nL 1 2 \nL 5 6", "M1 2L1 2L5 6"),
    ],
)
def test_coordinates_are_short(text: str, written: str) -> None:
    assert svg._short(text) == written


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
    assert round(steps[0] / 10 ** floor(log10(steps[0]) + 1e-9)) in (1, 2, 5)


def test_a_file_of_its_own_has_a_ground_and_both_themes() -> None:
    text = svg.standalone(charts.size_histogram([1], ["<b>"]), "How to read it: a < b & c.")
    style, caption, ground, title, *rest = ET.fromstring(text.encode())  # noqa: S314 - our own text
    assert caption.text == "How to read it: a < b & c."
    assert "prefers-color-scheme:dark" in (style.text or "")
    assert all(hue in (style.text or "") for hue in svg.DARK_HUES)
    assert ground.attrib["class"] == "ground"
    assert (title.text, rest[0].text) == ("Images per cluster", "<b>")


def test_the_page_and_files_agree_on_colours() -> None:
    """A figure looks the same on the page, in the explorer and in a file, in either theme."""
    for package, *place in (("rayclust.report", "templates", "page.css"), ("rayclust.web", "static", "style.css")):
        page = resources.files(package).joinpath(*place).read_text(encoding="utf-8")
        light, dark = page.split("prefers-color-scheme: dark")[:2]
        for number, (hue, on_dark) in enumerate(zip(svg.HUES, svg.DARK_HUES, strict=True)):
            assert f"--h{number}: {hue};" in light
            assert f"--h{number}: {on_dark};" in dark


def test_what_is_imported_when() -> None:
    """matplotlib takes half a second, and only charts need it; torch and Ray are never needed, nor pyplot's state."""
    code = (
        "import sys, rayclust.report.page as page;"
        "print(sorted({'torch', 'ray', 'matplotlib'} & set(sys.modules)));"
        "page.charts.size_histogram([1]);"
        "print(sorted({'torch', 'ray', 'matplotlib', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["[]", "['matplotlib']"]
