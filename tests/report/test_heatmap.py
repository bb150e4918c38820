from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from rayclust.errors import ShapeError
from rayclust.report import svg
from rayclust.report.heatmap import LEVELS, Group, Panel, heatmap, picture
from tests.report.test_figures import HOSTILE, SVG, drawn, words

GROUPS = [Group("cat", 3, 0), Group("dog", 1, 1)]


def test_black_is_zero_white_is_the_ceiling_and_all_above() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(picture(np.array([[0.0, 0.5], [1.0, np.nan]]), 0.5))).convert("L"))
    assert pixels.tolist() == [[0, 255], [255, 0]]
    ramp = np.asarray(Image.open(io.BytesIO(picture(np.linspace(0, 1, 1000)[None].repeat(2, 0), 1.0))).convert("L"))
    assert len(np.unique(ramp)) == LEVELS
    np.testing.assert_allclose(ramp[0] / 255, np.linspace(0, 1, 1000), atol=0.51 / (LEVELS - 1) + 0.002)


def test_rows_are_sorted_under_their_names_and_strips() -> None:
    root = drawn(heatmap([Panel("|ZᵀZ|", np.eye(4))], GROUPS, ceiling=0.7, title="Cosines", key="gram"))
    assert words(root) == ["cat", "dog", "|ZᵀZ|", "0", "≥ 0.7"]
    strips = [node for node in root.iter(f"{SVG}rect") if node.attrib.get("class") in ("hue-0", "hue-1")]
    heights = [float(node.attrib["height"]) for node in strips[1::2]]
    assert heights == pytest.approx([300, 100])
    assert [node[0].text for node in strips[::2]] == ["cat: 3 rows", "dog: 1 rows"]


def test_two_matrices_share_names_and_scale_and_have_ids_of_their_own() -> None:
    panels = [Panel("left", np.eye(4)), Panel("right", np.ones((4, 4)))]
    text = heatmap(panels, GROUPS, ceiling=1, title="t", key="a")
    root = drawn(text)
    assert words(root) == ["cat", "dog", "left", "right", "0", "≥ 1"]
    ids = re.findall(r' id="([^"]+)"', text)
    assert ids == ["a-0", "a-1", "a-scale"]
    assert all(f"url(#{name})" in text for name in ids)
    sources = [node.attrib["href"] for node in root.iter(f"{SVG}image")]
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2]))).size == (4, 4)


def test_names_that_would_touch_are_left_to_tooltips() -> None:
    groups = [Group(f"c{i}", 1, 0) for i in range(100)]
    shown = words(drawn(heatmap([Panel("p", np.eye(100))], groups, ceiling=1, title="t", key="k")))
    assert 25 <= len(shown) - 3 <= 31


def test_noise_of_four_hundred_rows_stays_a_small_file() -> None:
    noise = np.random.default_rng(0).random((400, 400))
    assert len(heatmap([Panel("p", noise)], [Group("g", 400)], ceiling=1, title="t", key="k")) < 120_000


def test_matrices_of_other_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="width 3: 4 is needed"):
        heatmap([Panel("p", np.eye(3))], GROUPS, ceiling=1, title="t", key="k")
    with pytest.raises(ShapeError, match="3 rows: 4 are needed"):
        heatmap([Panel("p", np.ones((3, 4)))], GROUPS, ceiling=1, title="t", key="k")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text_also_in_a_file_of_its_own(text: str) -> None:
    figure = heatmap([Panel(text, np.eye(1))], [Group(text, 1)], ceiling=1, title=text, key="k")
    drawn(figure)
    root = ET.fromstring(svg.standalone(figure).encode())  # noqa: S314 - our own text
    assert "script" not in {node.tag.removeprefix(SVG) for node in root.iter()}
    assert "prefers-color-scheme" in (root[0].text or "")
