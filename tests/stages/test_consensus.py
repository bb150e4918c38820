"""A run whose members are other runs of the same rows, their heads, and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import validate
from rayclust.errors import ConfigError, DataError
from rayclust.runtime.api import load_run, with_absolute_paths
from rayclust.runtime.members import plan_members
from rayclust.runtime.pipeline import Manifests, run_all, run_stage
from tests.stages.runs import tree

TEMI = {"name": "temi", "preset": "none", "heads": 3, "steps": 4, "epochs": 1, "batch_size": 16, "layers": 1}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows around three directions, in two files, with these as labels."""
    folder = tmp_path_factory.mktemp("rows") / "rows"
    folder.mkdir()
    rng = np.random.default_rng(0)
    x = np.eye(8)[np.arange(60) % 3] + 0.1 * rng.normal(size=(60, 8))
    for part in range(2):
        np.save(folder / f"rows-{part}.npy", x[30 * part : 30 * part + 30].astype(np.float32))
        np.save(folder / f"rows-{part}_labels.npy", np.arange(30) % 3)
    return folder


def settings(folder: Path, rows: Path, run: str, **method: Any) -> Any:
    return validate(tree(str(folder / run), str(rows), method={"clusters": 3, **method}))


def keys_of(run: Path) -> list[str]:
    parts = sorted((run / "embeddings").glob("*.parquet"))
    return [key for part in parts for key in pq.read_table(part)["key"].to_pylist()]


def test_members_are_runs_heads_and_tables(tmp_path: Path, rows: Path, in_process: None):
    run_all(settings(tmp_path, rows, "kmeans", name="kmeans"), stop_after="assign")
    run_all(settings(tmp_path, rows, "temi", keep_heads=True, **TEMI), stop_after="train")
    keys = keys_of(tmp_path / "kmeans")
    given = [None if place == 7 else place % 3 for place in range(60)]
    order = np.random.default_rng(0).permutation(60)
    table = pa.table({"key": [keys[i] for i in order], "cluster": [given[i] for i in order]})
    pq.write_table(table, tmp_path / "by_hand.parquet")
    members = [str(tmp_path / name) for name in ("kmeans", "temi#heads", "by_hand.parquet")]
    config = settings(tmp_path, rows, "consensus", name="consensus", members=members)
    done = run_all(config, stop_after="assign")
    # 1. The clusters are those of the members, and the table of members has all of them.
    parts = sorted((tmp_path / "consensus" / "assignments").glob("*.parquet"))
    clusters = [cluster for part in parts for cluster in pq.read_table(part)["cluster"].to_pylist()]
    assert len(set(zip(clusters, np.arange(60) % 3, strict=True))) == 3
    report = pq.read_table(tmp_path / "consensus" / "model" / "metrics.parquet")
    assert report.num_rows == 1 + 3 + 1 + 2
    assert sum(report["chosen"].to_pylist()) == 1
    said = pq.read_table(tmp_path / "consensus" / "model" / "rows.parquet")
    assert said["key"].to_pylist() == keys
    assert said["row"].to_pylist() == list(range(60))
    assert said["vote"].to_pylist() == clusters
    assert [said[name][0].as_py() for name in ("confidence", "margin", "votes_against")] == [1.0, 1.0, 0.0]
    run_all(config, stop_after="report")
    scores = json.loads((tmp_path / "consensus" / "metrics.json").read_text())
    assert [scores["members"][place] for place in (0, -1)] == [1.0, 1.0]
    assert len(scores["members"]) == 5
    assert "ACC, by labels" in (tmp_path / "consensus" / "report" / "index.html").read_text()
    # 2. Nothing is done again, unless a member has changed.
    again = run_all(config, stop_after="assign")
    assert again["train"].digest == done["train"].digest
    saved = load_run(config.run)
    assert Manifests(saved).of("assign") is not None
    pq.write_table(table.set_column(1, "cluster", pa.array([0] * 60)), tmp_path / "by_hand.parquet")
    assert run_stage("train", config).digest != done["train"].digest
    # 3. The place of a member is not its content.
    (tmp_path / "by_hand.parquet").rename(tmp_path / "moved.parquet")
    method = saved.method.model_copy(update={"members": (*members[:2], str(tmp_path / "moved.parquet"))})
    assert Manifests(saved.model_copy(update={"method": method})).of("train") is not None


def test_members_that_cannot_vote_are_refused(tmp_path: Path, rows: Path, in_process: None):
    def refused(error: type[Exception], match: str, *members: str) -> None:
        with pytest.raises(error, match=match):
            run_all(settings(tmp_path, rows, "out", name="consensus", members=members), stop_after="train")

    refused(DataError, "is missing", str(tmp_path / "none.parquet"))
    refused(DataError, "has finished its stage assign", str(tmp_path / "none"))
    refused(ConfigError, "is this run itself", f"{tmp_path}/out#heads")
    run_all(settings(tmp_path, rows, "temi", **TEMI), stop_after="train")
    refused(ConfigError, "keep_heads: true", f"{tmp_path}/temi#heads")
    keys = keys_of(tmp_path / "temi")
    for name, columns in {
        "fewer": {"key": keys[1:], "cluster": [0] * 59},
        "others": {"key": ["?", *keys[1:]], "cluster": [0] * 60},
        "words": {"key": keys, "cluster": ["cat"] * 60},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    refused(DataError, "59 rows, of which 59", f"{tmp_path}/fewer.parquet")
    refused(DataError, "60 rows, of which 59", f"{tmp_path}/others.parquet")
    refused(DataError, "a whole number|of whole numbers", f"{tmp_path}/words.parquet")


def test_an_open_number_of_clusters_is_refused_with_members(rows: Path, tmp_path: Path):
    config = settings(tmp_path, rows, "out", name="consensus", clusters=[2, 3], members=["a.parquet"])
    with pytest.raises(ConfigError, match="needs one number of clusters"):
        plan_members(config)
    assert plan_members(settings(tmp_path, rows, "out", name="consensus")) is None


def test_places_of_members_become_absolute(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, rows, "out", name="consensus", members=["a#heads", "b.parquet", "s3://c/d"])
    found = json.loads(with_absolute_paths(config).model_dump_json())["method"]["members"]
    assert found == [f"{tmp_path}/a#heads", f"{tmp_path}/b.parquet", "s3://c/d"]
