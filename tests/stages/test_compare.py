"""k-means of one input under several encoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayclust.cli import run_command
from rayclust.errors import ConfigError
from rayclust.stages.compare import as_lines, compare
from tests.stages.runs import tree, write_folder, write_yaml


@pytest.fixture
def config(tmp_path: Path) -> Path:
    images = write_folder(tmp_path / "images", per_class=6)
    method = {"name": "temi", "clusters": 3}
    return write_yaml(tmp_path / "run.yaml", tree(str(tmp_path / "run"), str(images), method=method))


def test_a_table_has_a_line_for_each_encoder_and_is_made_once(
    config: Path, in_process: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments = ["compare", str(config), "encoder.image_size=[4,8]", "encoder.batch_size=[4,4]", "seed=3"]
    assert run_command(arguments) == 0
    first = capsys.readouterr().out.splitlines()
    assert first[0].split()[:3] == ["image_size", "batch_size", "accuracy"]
    assert [line.split()[0] for line in first[1:]] == ["4", "8"]
    runs = sorted((config.parent / "run" / "compare").iterdir())
    assert len(runs) == 2
    settings = [json.loads((run / "config.json").read_text()) for run in runs]
    assert {s["encoder"]["image_size"] for s in settings} == {4, 8}
    assert {(s["method"]["name"], s["seed"]) for s in settings} == {("kmeans", 3)}
    monkeypatch.setattr("rayclust.stages.encode.chunks_in_driver", None)
    assert run_command(arguments) == 0
    assert capsys.readouterr().out.splitlines() == first


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=3"],
        ["method.clusters=[2,3]"],
        ["encoder.name=pixels"],
        ["encoder.image_size=[4,8]", "encoder.batch_size=[4]"],
    ],
)
def test_what_does_not_vary_encoders_is_refused(overrides: list[str], config: Path):
    with pytest.raises(ConfigError, match="compare: give lists of one length"):
        compare(str(config), overrides)


def test_an_open_number_of_clusters_is_refused(config: Path):
    with pytest.raises(ConfigError, match=r"compare: .*set method\.clusters"):
        compare(str(config), ["encoder.image_size=[4,8]", "method.clusters=auto"])


def test_columns_are_as_wide_as_their_widest_cell():
    found = [{"name": "a", "nmi": 0.5}, {"name": "longer", "ari": 1.0}]
    assert list(as_lines(found)) == ["name    nmi     ari", "a       0.5000", "longer          1.0000"]


def test_a_broken_list_is_one_line(config: Path):
    with pytest.raises(ConfigError, match=r"override encoder\.name: '\[a, b' is not a YAML value"):
        compare(str(config), ["encoder.name=[a, b"])
