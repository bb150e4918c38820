"""How a config is read, where its paths lead, and a run from Python."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

import rayclust
from rayclust.config import parse, validate
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.runtime.api import as_yaml, load_config, load_run, quick, with_absolute_paths
from rayclust.runtime.results import load, run
from rayclust.store import storage
from tests.sealed import Sealed
from tests.stages.runs import tree, write_folder, write_yaml


def paths(**groups: Any) -> dict[str, Any]:
    config = with_absolute_paths(validate(tree("runs/one", "photos", **groups)))
    return {"run": config.run, "images": config.images.uri, "classes": config.images.classes} | {
        "weights": config.encoder.pretrained,
        "words": config.label.vocabulary,
    }


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    found = paths(
        images={"classes": "classes.txt"},
        encoder={"name": "timm/resnet18", "pretrained": "weights/w.safetensors"},
        label={"vocabulary": "words.txt"},
    )
    assert found == {
        "run": f"{here}/runs/one",
        "images": f"{here}/photos",
        "classes": f"{here}/classes.txt",
        "weights": f"{here}/weights/w.safetensors",
        "words": f"{here}/words.txt",
    }


def test_files_in_a_list_of_words_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = paths(label={"vocabulary": ["classes", "words.txt", "s3://b/w.parquet"]})
    assert found["words"] == ("classes", f"{tmp_path}/words.txt", "s3://b/w.parquet")


ROOTS = {
    "/data/x/": "/data/x",
    "/data//x/./y/..": "/data/x",
    "file:///data/x/": "/data/x",
    "s3://bucket/a/": "s3://bucket/a",
    "s3://bucket/a b/ü": "s3://bucket/a b/ü",
    "~/runs": str(Path.home() / "runs"),
}


@pytest.mark.parametrize("given", ROOTS)
def test_a_folder_is_written_one_way_only(given: str):
    config = with_absolute_paths(validate(tree(given, given)))
    assert config.run == config.images.uri == ROOTS[given]
    assert with_absolute_paths(config) == config


@pytest.mark.parametrize("uri", ["dataset:cifar10", "dataset:stl10/test"])
def test_named_data_tags_and_kinds_of_words_are_no_paths(uri: str):
    config = with_absolute_paths(
        validate(
            tree("/run", uri, encoder={"name": "open_clip/ViT-B-32", "pretrained": "openai"})
            | {"label": {"vocabulary": "imagenet"}}
        )
    )
    assert (config.images.uri, config.encoder.pretrained, config.label.vocabulary) == (uri, "openai", "imagenet")


def test_what_was_left_open_stays_open(tmp_path: Path):
    config = validate(tree(str(tmp_path), "/images", method={"name": "temi", "clusters": 3}))
    assert with_absolute_paths(config).method.model_fields_set == config.method.model_fields_set
    assert parse(as_yaml(config)) == config
    assert "beta" not in yaml.safe_load(as_yaml(config))["method"]


@pytest.mark.parametrize("uri", ["hdfs://bucket/x", "http://host/x"])
def test_a_scheme_that_is_not_supported_is_one_line(uri: str):
    with pytest.raises(DataError, match="is not supported"):
        with_absolute_paths(validate(tree(uri, "/images")))


def test_a_file_is_read_with_its_overrides(tmp_path: Path):
    path = tmp_path / "RUN.yaml"
    path.write_bytes("run: /r\nimages: {uri: /ü}\nmethod: {name: kmeans, clusters: 2}\n".encode())
    config = load_config(str(path), ["method.clusters=7", "images.labels=none"])
    assert (config.method.clusters, config.images.uri, config.images.labels) == (7, "/ü", "none")
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is a folder"):
        load_config(str(tmp_path))


def test_a_config_comes_on_standard_input_too(monkeypatch: pytest.MonkeyPatch):
    text = "run: /r\nimages: {uri: /ü}\nmethod: {name: kmeans, clusters: 2}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert load_config("-", ["seed=4"]) == parse(text, ["seed=4"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"run: [")))
    with pytest.raises(ConfigError, match=r"^standard input, line 1"):
        load_config("-")


def test_a_run_is_found_by_its_folder_from_anywhere(pictures_run: Sealed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(pictures_run.folder.parent)
    for uri in ("run", "./run/", str(pictures_run.folder) + "/", f"file://{pictures_run.folder}"):
        assert load_run(uri) == pictures_run.config
    assert load(pictures_run.folder).config == pictures_run.config
    line = pictures_run.folder.parent / "RUN.yaml"
    write_yaml(line, tree("run", "elsewhere"))
    assert load_run(str(line)) == load_run("RUN.yaml") == pictures_run.config
    line.unlink()
    with pytest.raises(ArtefactError, match="no run there"):
        load_run("runs")


def test_a_config_that_is_none_is_named(tmp_path: Path):
    for content in ([1], {"run": "x", "nope": 1}):
        storage.write_json(str(tmp_path / "config.json"), content)
        with pytest.raises(ArtefactError, match=r"config\.json: is no config of a run"):
            load_run(str(tmp_path))


def test_a_run_that_was_moved_lies_where_it_lies_now(pictures_run: Sealed, tmp_path: Path):
    storage.write_json(str(tmp_path / "config.json"), storage.read_json(pictures_run.run.config))
    assert load_run(str(tmp_path)).run == str(tmp_path)


def test_one_line_does_everything_and_leaves_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "rayclust")
    monkeypatch.setattr(logging.getLogger("rayclust"), "propagate", True)
    write_folder(tmp_path / "photos", per_class=5)
    monkeypatch.chdir(tmp_path)
    uri = quick("photos", "out", clusters="3", method="kmeans", encoder="pixels", overrides=["neighbors.k=4"])
    assert uri == str(tmp_path / "out")
    assert "encoder: pixels has no text tower: clusters get no names" in caplog.text
    assert (tmp_path / "out" / "report" / "index.html").exists()
    written = load_config(f"{uri}/RUN.yaml")
    assert (written.images.uri, written.method.clusters, written.neighbors.k) == (str(tmp_path / "photos"), 3, 4)
    assert load_run(uri) == written


@pytest.mark.parametrize("clusters", ["many", "[5", "1", "2.5", "", "{a: b}"])
def test_clusters_that_are_no_number_are_one_line(tmp_path: Path, clusters: str):
    with pytest.raises(ConfigError, match=r"method\.clusters"):
        quick("photos", str(tmp_path / "out"), clusters=clusters, method="kmeans", encoder="pixels")
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(ArtefactError, match="no parts there; the run has"):
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
