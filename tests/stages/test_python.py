from __future__ import annotations

from pathlib import Path

import pytest

import rayclust
from rayclust.errors import ArtefactError
from rayclust.runtime.api import load, run
from tests.stages.conftest import Sealed
from tests.stages.runs import tree, write_folder, write_yaml


def test_a_run_is_tables_that_are_read_when_asked_for(pictures_run: Sealed):
    found = load(pictures_run.config.run + "/")
    assert found.config == pictures_run.config
    assert found.table("embeddings", ["row"])["row"].to_pylist() == list(range(24))
    assert [part.num_rows for part in found.iter("assignments")] == [12, 0, 12]
    assert found.table("rejects")["key"].to_pylist() == ["shard-001/broken"]
    assert found.clusters["size"].to_pylist() == [8, 8, 8]
    assert found.metrics["accuracy"] == 1
    assert Path(found.report).exists()


def test_what_is_not_there_yet_is_one_line(tmp_path: Path, in_process: None):
    with pytest.raises(ArtefactError, match="no run there"):
        load(str(tmp_path))
    from rayclust.config import validate
    from rayclust.runtime.pipeline import run_all

    write_folder(tmp_path / "images", per_class=3)
    run_all(validate(tree(str(tmp_path / "run"), str(tmp_path / "images"))), stop_after="encode")
    found = load(str(tmp_path / "run"))
    assert found.table("embeddings").num_rows == 9
    with pytest.raises(ArtefactError, match="has not run"):
        found.table("assignments")
    with pytest.raises(ArtefactError, match="run evaluate first"):
        _ = found.metrics
    with pytest.raises(ArtefactError):
        _ = found.clusters


@pytest.mark.usefixtures("in_process")
def test_a_mapping_a_file_and_a_config_run_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "images", per_class=4)
    monkeypatch.chdir(tmp_path)
    content = tree("one", "images", neighbors={"k": 3})
    by_mapping = run(content)
    by_config = run(by_mapping.config)
    by_file = run(str(write_yaml(tmp_path / "RUN.yaml", content)), ["run=two"])
    assert by_mapping.config.run == str(tmp_path / "one")
    assert by_file.config.run == str(tmp_path / "two")
    assert by_mapping.metrics == by_config.metrics == by_file.metrics


def test_the_package_offers_both():
    assert rayclust.run is run
    assert rayclust.load is load
