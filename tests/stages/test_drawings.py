from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from rayclust.config import validate
from rayclust.runtime.pipeline import run_all
from rayclust.stages.drawings import _ceiling, _selection, drawings, export
from rayclust.store.layout import Run
from tests.stages.conftest import Sealed
from tests.stages.runs import tree

SELECTION = {
    "chosen": 3,
    "reason": "least coding length <b>",
    "candidates": [
        {"k": 2, "silhouette": 0.1, "coding_length": 9.0, "smallest": 3},
        {"k": 3, "silhouette": 0.4, "coding_length": 5.0, "smallest": 2},
    ],
    "picks": {"coding_length": 3, "knee": 2},
}


def test_every_figure_of_a_run_is_drawn_and_says_what_it_shows(pictures_run: Sealed) -> None:
    found = drawings(pictures_run.run, SELECTION)
    assert [drawn.key for drawn in found] == ["gram", "membership", "map", "singular-values", "selection"]
    for drawn in found:
        root = ET.fromstring(drawn.svg)  # noqa: S314 - our own text
        assert root.attrib["role"] == "img"
        assert root[0].text == drawn.title
        assert len(drawn.svg) < 200_000
    texts = {drawn.key: drawn.text for drawn in found}
    assert "no space of its own" in texts["gram"]
    assert "for want of codes, by a softmax of cosine / 0.1" in texts["membership"]
    assert "t-SNE of encoder features of 24 images" in texts["map"]
    assert "3 clusters were chosen (dashed): least coding length" in texts["selection"]
    assert "selection" not in {drawn.key for drawn in drawings(pictures_run.run)}


def test_coding_length_is_the_first_criterion_and_sizes_are_left_out() -> None:
    root = ET.fromstring(_selection(SELECTION).svg)  # noqa: S314 - our own text
    titles = [node.text or "" for node in root if node.tag.endswith("text")]
    assert [title for title in titles if title[0].isalpha() and title != "clusters"] == [
        "Coding length, nats per image ↓",
        "Silhouette ↑",
    ]
    assert [node[0].text for node in root if node.tag.endswith("circle")] == [
        "2 clusters: 9, the knee",
        "3 clusters: 5, the best",
        "2 clusters: 0.1",
        "3 clusters: 0.4, the best",
    ]


def test_the_ceiling_is_round_and_leaves_the_diagonal_out() -> None:
    matrix = np.full((50, 50), 0.43)
    np.fill_diagonal(matrix, 99.0)
    assert _ceiling([matrix]) == pytest.approx(0.45)
    assert _ceiling([np.ones((1, 1))]) > 0


def test_files_are_written_with_their_numbers(pictures_run: Sealed, tmp_path: Path, in_process: None) -> None:
    names = {uri.rpartition("/")[2] for uri in export(pictures_run.config, str(tmp_path / "out"))}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert {"gram.svg", "map.svg", "map.csv", "map.parquet", "heat.parquet", "spectra.parquet"} <= names
    for path in (tmp_path / "out").glob("*.svg"):
        root = ET.fromstring(path.read_bytes())  # noqa: S314 - our own text
        assert "prefers-color-scheme:dark" in (root[0].text or "")
    assert (tmp_path / "out" / "map.csv").read_text().splitlines()[0] == '"row","cluster","x","y"'


def test_a_run_of_cpp_has_both_spaces_in_its_figures_its_index_and_its_report(
    pictures_run: Sealed, tmp_path: Path, in_process: None
) -> None:
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    method = {"name": "cpp", "steps": 4, "expansion_steps": 2, "hidden": 32, "width": 8, "batch_size": 24}
    given = tree(str(tmp_path / "run"), pictures_run.config.images.uri, method=method)
    manifests = run_all(validate(given))
    assert set(manifests["index"].extra) == {"kind", "recall", "z"}
    texts = {drawn.key: drawn.text for drawn in drawings(Run(str(tmp_path / "run")))}
    assert "the method's own space z" in texts["gram"]
    assert "optimal transport between the method's codes" in texts["membership"]
    assert "t-SNE of z" in texts["map"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert page.count('<div class="query">') == 4
    assert "Π outside class" in page
    assert "Π wrong edges" in page
    assert len(page) < 1_500_000


def test_a_run_that_chose_its_number_of_clusters_shows_why(
    pictures_run: Sealed, tmp_path: Path, in_process: None
) -> None:
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    config = validate(tree(str(tmp_path / "run"), pictures_run.config.images.uri, method={"clusters": [2, 3, 4]}))
    run_all(config)
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "3 clusters were chosen (dashed)" in page
    files = {uri.rpartition("/")[2] for uri in export(config, str(tmp_path / "out"))}
    assert {"selection.svg", "selection.csv"} <= files
    assert (tmp_path / "out" / "selection.csv").read_text().count("\n") == 4
