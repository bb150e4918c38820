from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rayclust.config import RunConfig, validate
from rayclust.methods import METHODS
from rayclust.methods.kmeans import KMeans
from rayclust.methods.settings import KMeansConfig
from rayclust.runtime.pipeline import content_digest, run_all, run_stage
from rayclust.stages import figures
from rayclust.stages.figures import (
    CLUSTER_ROWS,
    CLUSTERS,
    MAP_ROWS,
    drawings,
    export,
    numbers,
    sample,
)
from rayclust.store import storage, tables
from rayclust.store.run import Run
from tests.report.pages import chart, tips, words
from tests.stages.conftest import VECTORS, Sealed
from tests.stages.runs import tree


def test_few_rows_are_all_drawn() -> None:
    drawn = sample(np.array([0, 0, 2, 2, 2]), seed=0)
    assert drawn.spread.tolist() == [0, 1, 2, 3, 4]
    assert {k: own.tolist() for k, own in drawn.members.items()} == {0: [0, 1], 2: [2, 3, 4]}
    assert drawn.rows.tolist() == [0, 1, 2, 3, 4]


def test_of_many_rows_and_clusters_a_seeded_drawn_is_drawn() -> None:
    clusters = np.random.default_rng(0).integers(0, 100, 50_000)
    drawn = sample(clusters, seed=1)
    assert len(drawn.spread) == MAP_ROWS
    assert len(drawn.members) == CLUSTERS
    for cluster, own in drawn.members.items():
        assert (clusters[own] == cluster).all()
        assert len(own) == CLUSTER_ROWS == len(np.unique(own))
    assert (np.diff(drawn.rows) > 0).all()
    np.testing.assert_array_equal(drawn.rows, sample(clusters, seed=1).rows)
    assert not np.array_equal(drawn.rows, sample(clusters, seed=2).rows)


def test_the_numbers_of_a_method_without_a_space_of_its_own(vectors_run: Sealed) -> None:
    summary = storage.read_json(numbers(vectors_run.run, "summary.json"))
    assert summary["spaces"] == ["features"]
    assert summary["membership"] == "kernel"
    assert (summary["rows"], summary["clusters"]) == (7, 2)
    heat = pq.read_table(vectors_run.folder / "figures" / "heat.parquet")
    x = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    rows = heat["row"].to_numpy()
    assert sorted(rows) == list(range(7))
    np.testing.assert_allclose(tables.matrix(heat["features"]), np.abs(x @ x.T)[np.ix_(rows, rows)], atol=2e-3)
    clusters = heat["cluster"].to_numpy()
    assert (np.diff(clusters) != 0).sum() == 1, "sorted by cluster"
    np.testing.assert_allclose(tables.matrix(heat["membership"]).astype(float).sum(1), 1, atol=2e-3)
    dots = pq.read_table(vectors_run.folder / "figures" / "map.parquet")
    assert dots["row"].to_pylist() == list(range(7))
    own = pa.concat_tables(tables.read_table(vectors_run.run.map(part)) for part in (0, 1))
    assert dots.select(["row", "x", "y"]).to_pydict() == own.to_pydict()


def test_spectra_are_of_all_rows_and_of_each_cluster(vectors_run: Sealed) -> None:
    lines = pq.read_table(vectors_run.folder / "figures" / "spectra.parquet").to_pylist()
    x = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    wanted = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(lines[0]["values"], wanted / wanted[0], atol=1e-3)
    assert [(line["space"], line["membership"], line["cluster"]) for line in lines] == [
        ("features", None, None),
        ("features", "own", 0),
        ("features", "own", 1),
    ]


class OneDirection(KMeans):
    """k-means that sees one direction only, and says which rows belong together."""

    width = 1

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sign(x[:, :1] - x[:, 1:2])

    def membership(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), len(x)), 1 / len(x))


@pytest.fixture
def own_space(vectors_run: Sealed, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of the run by a method that has a space of its own."""
    monkeypatch.setitem(METHODS, "kmeans", f"{__name__}:OneDirection")
    monkeypatch.setattr(KMeansConfig, "has_own_space", True)
    shutil.copytree(vectors_run.folder, tmp_path / "run")
    groups = {"method": {"clusters": 2}, "features": {"center": False}, "neighbors": {"k": 2}}
    return validate(tree(str(tmp_path / "run"), vectors_run.config.images.uri, **groups))


def test_a_space_of_its_own_stands_beside_the_features(own_space: RunConfig) -> None:
    run_stage("map", own_space)
    run_stage("figures", own_space, force=True)
    folder = Path(own_space.run) / "figures"
    summary = storage.read_json(numbers(Run(own_space.run), "summary.json"))
    assert summary["spaces"] == ["features", "z"]
    assert summary["membership"] == "codes"
    assert set(summary["precision"]) == {"features", "z"}
    assert summary["directions"]["z"] == 1
    heat = pq.read_table(folder / "heat.parquet")
    np.testing.assert_array_equal(tables.matrix(heat["z"]), np.ones((7, 7)))
    np.testing.assert_allclose(tables.matrix(heat["membership"]), 1 / 7, atol=1e-3)
    spaces = [(line["space"], line["membership"]) for line in pq.read_table(folder / "spectra.parquet").to_pylist()]
    assert ("z", "own") in spaces


def test_k_means_of_the_features_is_compared_where_there_are_rows_enough() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    spread, members = np.arange(60), {0: np.arange(30), 1: np.arange(30, 60)}
    spaces = {figures.FEATURES: x, figures.OWN: x}
    for count, wanted in ((3, True), (4, False)):
        found = set(figures._spectra(spaces, spread, members, count, 0)["membership"].to_pylist())
        assert ("kmeans" in found) is wanted


def test_the_same_run_gives_the_same_numbers(own_space: RunConfig) -> None:
    run_stage("map", own_space)
    first = content_digest(run_stage("figures", own_space, force=True))
    assert content_digest(run_stage("figures", own_space, force=True)) == first


# Drawings

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
        assert chart(drawn.svg)[0].text == drawn.title
        assert len(drawn.svg) < 200_000
    texts = {drawn.key: drawn.text for drawn in found}
    assert "no space of its own" in texts["gram"]
    assert "here by a softmax of cosine / 0.1" in texts["membership"]
    assert "PaCMAP of encoder features of 24 images" in texts["map"]
    assert "3 clusters were chosen (dashed): least coding length" in texts["selection"]
    assert "selection" not in {drawn.key for drawn in drawings(pictures_run.run)}


def test_coding_length_is_the_first_criterion_and_sizes_are_left_out() -> None:
    root = chart(figures._selection(SELECTION).svg)
    assert [word for word in words(root) if word[0].isalpha() and word != "clusters"] == [
        "Coding length, nats per image ↓",
        "Silhouette ↑",
    ]
    assert [tip for tip in tips(root) if "clusters:" in tip] == [
        "2 clusters: 9, the knee",
        "3 clusters: 5, the best",
        "2 clusters: 0.1",
        "3 clusters: 0.4, the best",
    ]


def test_the_ceiling_is_round_and_leaves_the_diagonal_out() -> None:
    matrix = np.full((50, 50), 0.43)
    np.fill_diagonal(matrix, 99.0)
    assert figures._ceiling([matrix]) == pytest.approx(0.45)
    assert figures._ceiling([np.ones((1, 1))]) > 0


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
    assert "optimal transport between the codes" in texts["membership"]
    assert "PaCMAP of z" in texts["map"]
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
