from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rayclust.config import RunConfig, validate
from rayclust.methods.kmeans import KMeans
from rayclust.runtime.pipeline import content_digest, run_stage
from rayclust.stages import figures
from rayclust.stages.figures import CLUSTER_ROWS, CLUSTERS, MAP_ROWS, draw, numbers
from rayclust.store import filesystem, tables
from rayclust.store.layout import Run
from tests.stages.conftest import VECTORS, Sealed
from tests.stages.runs import tree


def test_few_rows_are_all_drawn() -> None:
    lot = draw(np.array([0, 0, 2, 2, 2]), seed=0)
    assert lot.spread.tolist() == [0, 1, 2, 3, 4]
    assert {k: own.tolist() for k, own in lot.members.items()} == {0: [0, 1], 2: [2, 3, 4]}
    assert lot.rows.tolist() == [0, 1, 2, 3, 4]


def test_of_many_rows_and_clusters_a_seeded_lot_is_drawn() -> None:
    clusters = np.random.default_rng(0).integers(0, 100, 50_000)
    lot = draw(clusters, seed=1)
    assert len(lot.spread) == MAP_ROWS
    assert len(lot.members) == CLUSTERS
    for cluster, own in lot.members.items():
        assert (clusters[own] == cluster).all()
        assert len(own) == CLUSTER_ROWS == len(np.unique(own))
    assert (np.diff(lot.rows) > 0).all()
    np.testing.assert_array_equal(lot.rows, draw(clusters, seed=1).rows)
    assert not np.array_equal(lot.rows, draw(clusters, seed=2).rows)


def test_the_numbers_of_a_method_without_a_space_of_its_own(vectors_run: Sealed) -> None:
    summary = filesystem.read_json(numbers(vectors_run.run, "summary.json"))
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


@pytest.fixture
def own_space(vectors_run: Sealed, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of the run by a method that sees one direction only, and says which rows belong together."""
    monkeypatch.setattr(KMeans, "own_space", 1)
    monkeypatch.setattr(KMeans, "represent", lambda self, x: torch.sign(x[:, :1] - x[:, 1:2]))
    monkeypatch.setattr(KMeans, "membership", lambda self, x: torch.full((len(x), len(x)), 1 / len(x)))
    shutil.copytree(vectors_run.folder, tmp_path / "run")
    groups = {"method": {"clusters": 2}, "features": {"center": False}, "neighbors": {"k": 2}}
    return validate(tree(str(tmp_path / "run"), vectors_run.config.images.uri, **groups))


def test_a_space_of_its_own_stands_beside_the_features(own_space: RunConfig) -> None:
    run_stage("figures", own_space, force=True)
    folder = Path(own_space.run) / "figures"
    summary = filesystem.read_json(numbers(Run(own_space.run), "summary.json"))
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
    first = content_digest(run_stage("figures", own_space, force=True))
    assert content_digest(run_stage("figures", own_space, force=True)) == first
