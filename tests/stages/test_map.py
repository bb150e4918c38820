from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayclust.config import RunConfig, validate
from rayclust.runtime.pipeline import content_digest, run_stage
from rayclust.runtime.rows import table_at
from rayclust.store import tables
from rayclust.store.run import Run
from tests.sealed import Sealed
from tests.stages.own_space import OneDirection, use
from tests.stages.runs import tree

STARTS = [0, 12, 12, 24]
"""First row of each part of the run, and N."""


def _places(run: Run, rows: np.ndarray) -> np.ndarray:
    """The places on the map of some rows, sorted: Float32[n 2]."""
    table = table_at(run.map, STARTS, rows, ["x", "y"])
    return np.stack([table["x"], table["y"]], axis=1)


@pytest.fixture
def config(pictures_run: Sealed, tmp_path: Path, in_process: None) -> RunConfig:
    """A copy of the run of which ten rows are laid out together."""
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    return validate(tree(str(tmp_path / "run"), pictures_run.config.images.uri, map={"rows": 10}))


def test_every_row_has_a_place_part_by_part(pictures_run: Sealed):
    parts = [tables.read_table(pictures_run.run.map(part)) for part in range(3)]
    assert all(part.schema.equals(tables.MAP) for part in parts)
    whole = pa.concat_tables(parts)
    assert whole["row"].to_pylist() == list(range(24))
    assert np.abs(np.stack([whole["x"], whole["y"]])).max() == 1
    assert pictures_run.manifest("map").extra["rows"] == 24
    some = _places(pictures_run.run, np.array([3, 20]))
    np.testing.assert_array_equal(some[1], [whole["x"][20].as_py(), whole["y"][20].as_py()])


def test_rows_beyond_the_bound_lie_among_those_that_were_drawn(config: RunConfig):
    manifest = run_stage("map", config)
    assert (manifest.extra["rows"], manifest.counts["rows"]) == (10, 24)
    run = Run(config.run)
    assert not list(Path(config.run).glob("map/scratch*"))
    places = _places(run, np.arange(24))
    drawn = np.sort(np.random.default_rng(config.seed).choice(24, 10, replace=False, shuffle=False))
    low, high = places[drawn].min(0), places[drawn].max(0)
    assert (places >= low - 1e-6).all()
    assert (places <= high + 1e-6).all()
    # Three colours, by turns: each row lies nearest to the drawn ones of its own colour.
    centers = np.stack([places[drawn[drawn % 3 == colour]].mean(0) for colour in range(3)])
    nearest = np.linalg.norm(places[:, None] - centers, axis=2).argmin(1)
    assert (nearest == np.arange(24) % 3).all()


def test_an_interrupted_map_goes_on_and_is_the_same(config: RunConfig):
    first = content_digest(run_stage("map", config))
    run = Run(config.run)
    for left in (run.manifest("map"), run.map(2)):
        Path(left).unlink()
    assert content_digest(run_stage("map", config)) == first
    assert content_digest(run_stage("map", config, force=True)) == first


def test_a_space_of_the_methods_own_is_what_is_mapped(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    use(OneDirection, monkeypatch)
    run_stage("map", config)
    places = _places(Run(config.run), np.arange(24))
    sides = places[:, 0] > 0
    assert np.unique(places[:, 1]).size == 1
    assert (sides == sides[0]).sum() in (8, 16)
