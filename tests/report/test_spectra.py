from __future__ import annotations

import numpy as np

from rayclust.report.spectra import Spectrum, spectra
from tests.report.test_figures import HOSTILE, SVG, drawn, words

FALLING = np.array([1.0, 0.5, 0.25])


def test_all_rows_at_the_left_and_clusters_with_a_band_at_the_right() -> None:
    series = [
        Spectrum("features", 0, FALLING, np.stack([0.5 * FALLING, FALLING, FALLING])),
        Spectrum("z", 1, FALLING**2, np.stack([FALLING] * 3)),
        Spectrum("k-means", 2, None, np.stack([FALLING] * 3), is_dashed=True),
    ]
    root = drawn(spectra(series, "t"))
    lines = [(node[0].text, "stroke-dasharray" in node.attrib) for node in root.iter(f"{SVG}polyline")]
    assert lines == [
        ("features", False),
        ("z", False),
        ("features: median", False),
        ("z: median", False),
        ("k-means: median", True),
    ]
    assert len(list(root.iter(f"{SVG}polygon"))) == 3
    assert words(root)[-3:] == ["features", "z", "k-means"]
    assert {"all rows", "cluster by cluster"} <= set(words(root))


def test_nothing_and_hostile_names_are_drawn() -> None:
    drawn(spectra([], "t"))
    drawn(spectra([Spectrum(name, 0, np.zeros(0), np.zeros((3, 0))) for name in HOSTILE], HOSTILE[0]))
