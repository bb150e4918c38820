"""Runs that keep rows aside: what is fitted on the others, and what is scored on these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError, DataError
from rayclust.runtime import tasks
from rayclust.runtime.api import load_run
from rayclust.runtime.pipeline import run_all, run_stage
from rayclust.runtime.rows import transform_of
from rayclust.runtime.shards import Split
from rayclust.runtime.tensors import StoredRows
from rayclust.stages import assign, neighbors
from rayclust.stages.predict import predict
from rayclust.store import tables
from rayclust.store.manifest import Manifest, read_manifest
from rayclust.store.run import Run
from tests.references import nearest_rows
from tests.stages.in_process import without_ray
from tests.stages.runs import embeddings, tree

CENTRES = np.array([[4, 0, 0], [0, 4, 0], [0, 0, 4]], float)


def write_table(path: Path, count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Rows around three centres in turn, with labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.arange(count) % 3
    x = (CENTRES[labels] + np.random.default_rng(seed).normal(size=(count, 3)) + shift).astype(np.float16)
    columns = {
        "embedding": pa.array(list(x.astype(np.float32)), pa.list_(pa.float32())),
        "label": list("abc" * count)[:count],
    }
    pq.write_table(pa.table(columns), path)
    return x


def config_of(folder: Path, **groups: Any) -> RunConfig:
    groups = {"neighbors": {"k": 25}, "evaluate": {"linear_probe_rows": 40}} | groups
    groups["images"] = {"split": "test*"} | groups.get("images", {})
    return validate(tree(str(folder / "run"), str(folder / "table"), **groups))


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, np.ndarray, np.ndarray]:
    """A run over a table of 30 rows that are kept aside and one of 60, and the rows of either."""
    folder = tmp_path_factory.mktemp("split")
    aside, fitted = (
        write_table(folder / "table" / f"{name}.parquet", n, n) for name, n in (("test", 30), ("train", 60))
    )
    config = config_of(folder)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(config)
    return config, aside, fitted


def manifest_of(config: RunConfig, stage: str = "encode") -> Manifest:
    found = read_manifest(Run(config.run), stage)
    assert found is not None
    return found


def test_rows_say_which_split_they_are_of_and_moments_are_of_the_fitted_ones(parted: tuple):
    config, _, fitted = parted
    rows = embeddings(Path(config.run))
    assert rows["split"].to_pylist() == ["test"] * 30 + ["train"] * 60
    encode = manifest_of(config)
    assert (encode.extra["test"], encode.counts["test"]) == ([30, 0], 30)
    transform = transform_of(encode, config.features.model_copy(update={"normalize": False}))
    np.testing.assert_allclose(transform(fitted).mean(axis=0), 0, atol=1e-5)


def test_every_row_has_its_neighbours_among_the_fitted_rows(parted: tuple):
    config, aside, fitted = parted
    table = pa.concat_tables(tables.read_table(Run(config.run).neighbors(part)) for part in range(2))
    found = tables.matrix(table["neighbors"])
    assert found.shape == (90, 25)
    x = np.concatenate([aside, fitted]).astype(float) - fitted.astype(float).mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    others = list(range(30, 90))
    truth = nearest_rows(x, x[30:], 25, list(range(90)), others)
    overlap = [len({row for _, row in own} & set(ids)) / 25 for own, ids in zip(truth, found.tolist(), strict=True)]
    assert min(overlap) >= 0.9
    assert found.min() >= 30


def test_methods_see_fitted_rows_and_their_neighbours_by_their_own_numbers(parted: tuple, tmp_path: Path):
    config, _, _ = parted
    rows = StoredRows(Run(config.run), manifest_of(config), config.features, tmp_path)
    assert (rows.count, rows.dimension) == (60, 3)
    assert rows.tensor().shape == (60, 3)
    near = rows.neighbors().numpy()
    assert near.shape == (60, 25)
    assert (near.min(), near.max() < 60) == (0, True)
    stored = tables.matrix(tables.read_table(Run(config.run).neighbors(1), ["neighbors"])["neighbors"])
    np.testing.assert_array_equal(near, stored - 30)


def test_metrics_say_which_rows_and_are_of_either_split(parted: tuple):
    found = json.loads((Path(parted[0].run) / "metrics.json").read_text())
    assert (found["rows"], found["labelled"]) == (90, 90)
    assert (found["train"]["rows"], found["test"]["rows"], found["test"]["labelled"]) == (60, 30, 30)
    assert "accuracy" not in found, "of all rows it would be of those that were fitted too"
    for name in ("accuracy", "accuracy_held_out", "knn_accuracy", "linear_probe"):
        assert found["test"][name] > 0.8, name
    assert found["test"]["knn_accuracy_top5"] == 1
    assert "knn_accuracy" not in found["train"]
    counts = manifest_of(parted[0], "train").counts
    assert counts["rows"] == 60


@pytest.mark.parametrize("method", [{"name": "kmeans"}, {"name": "temi", "preset": "none", "heads": 2, "steps": 10}])
def test_a_model_does_not_depend_on_the_rows_kept_aside(method: dict[str, Any], tmp_path: Path, in_process: None):
    models = []
    for name, shift in (("one", 0.0), ("other", 3.0)):
        write_table(tmp_path / name / "table" / "test.parquet", 30, 5, shift)
        write_table(tmp_path / name / "table" / "train.parquet", 60, 1)
        run_all(config_of(tmp_path / name, method=method | {"clusters": 3}))
        models.append((tmp_path / name / "run" / "model" / "weights.safetensors").read_bytes())
    assert models[0] == models[1]


def test_a_second_input_is_kept_aside_and_its_keys_differ(tmp_path: Path, in_process: None):
    write_table(tmp_path / "table" / "a.parquet", 30, 1)
    write_table(tmp_path / "other" / "a.parquet", 9, 2)
    config = config_of(tmp_path, images={"split": None, "test": str(tmp_path / "other")})
    run_stage("encode", config)
    rows = embeddings(tmp_path / "run")
    keys = rows["key"].to_pylist()
    assert len(set(keys)) == 39
    assert [key.startswith("test/") for key in keys] == [split == "test" for split in rows["split"].to_pylist()]
    assert rows["row"].to_pylist() == list(range(39))
    run_all(config)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["rows"] == 9


def test_the_number_of_clusters_is_chosen_on_fitted_rows(tmp_path: Path, in_process: None):
    write_table(tmp_path / "table" / "test.parquet", 30, 5)
    write_table(tmp_path / "table" / "train.parquet", 60, 1)
    run_all(config_of(tmp_path, method={"name": "kmeans", "clusters": [2, 3]}))
    assert manifest_of(config_of(tmp_path), "assign").counts["rows"] == 90


def test_a_share_is_drawn_by_key_and_seed():
    keys = [f"k{i}" for i in range(4000)]
    held = [[Split(0.25, "", seed).holds(key, "") for key in keys] for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    assert 0.22 < np.mean(held[0]) < 0.28
    assert [Split(0.25, "", 0).holds(key, "") for key in keys[:9]] == held[0][:9], "other rows play no part"


@pytest.mark.parametrize(
    ("split", "key", "uri", "is_held"),
    [
        (Split(("val/*",), "", 0), "val/dog/1.png", "/x/val/dog/1.png", True),
        (Split(("val/*",), "", 0), "train/val/1.png", "/x/train/val/1.png", False),
        (Split(("*/val-*.tar",), "", 0), "val-0/0", "/x/val-0.tar#0.png", True),
        (Split(("a*", "b*"), "", 0), "b1", "/x", True),
        (Split((), "/x/other", 0), "1", "/x/other/1.png", True),
        (Split((), "/x/other", 0), "1", "/x/others/1.png", False),
        (Split((), "/x/a.tar", 0), "1", "/x/a.tar#1.png", True),
    ],
)
def test_patterns_are_of_keys_and_files(split: Split, key: str, uri: str, is_held: bool):
    assert split.holds(key, uri) is is_held


def test_what_cannot_be_parted_is_refused(tmp_path: Path, in_process: None):
    write_table(tmp_path / "table" / "train.parquet", 30, 1)
    for pattern, share in (("nothing/*", "no row"), ("*", "every row")):
        with pytest.raises(DataError, match=f"images.split = .*keeps {share} of 30 aside"):
            run_stage("encode", config_of(tmp_path, images={"split": pattern}))
    with pytest.raises(ConfigError, match="give one of them"):
        config_of(tmp_path, images={"test": "/other"})
    inside = {"split": None, "test": str(tmp_path / "table" / "more")}
    with pytest.raises(ConfigError, match=r"lies within images.uri.*images.split: more/\*"):
        run_stage("encode", config_of(tmp_path, images=inside))
    with pytest.raises(ConfigError, match=r"set images.split to keep some of its rows aside"):
        run_stage("encode", config_of(tmp_path, images={"split": None, "test": str(tmp_path / "table")}))
    with pytest.raises(DataError, match=r"usable embedding of the classes in images.classes"):
        run_stage("encode", config_of(tmp_path, images={"split": None, "classes": ["nobody"]}))
    with pytest.raises(ConfigError, match=r"^neighbors.method = ivf: .*exact"):
        config_of(tmp_path, images={"split": 0.3}, neighbors={"method": "ivf"})


def test_new_images_are_scored_against_their_labels(parted: tuple, tmp_path: Path, in_process: None):
    write_table(tmp_path / "new.parquet", 30, 8)
    found = predict(load_run(parted[0].run), str(tmp_path / "new.parquet"), str(tmp_path / "out.csv"), evaluate=True)
    assert (found["rows"], found["labelled"]) == (30, 30)
    assert found["accuracy"] == found["accuracy_held_out"] > 0.8
    pq.write_table(pq.read_table(tmp_path / "new.parquet").drop_columns(["label"]), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="none of the images has a label"):
        predict(load_run(parted[0].run), str(tmp_path / "bare.parquet"), str(tmp_path / "out.csv"), evaluate=True)


def test_neighbours_of_the_raw_rows_do_not_depend_on_features(tmp_path: Path, in_process: None):
    found = []
    write_table(tmp_path / "table" / "all.parquet", 40, 1)
    for space in ("raw", "run"):
        config = config_of(tmp_path, images={"split": None}, neighbors={"features": space, "k": 5})
        run_stage("encode", config)
        run_stage("neighbors", config)
        near = tables.matrix(tables.read_table(Run(config.run).neighbors(0))["neighbors"])
        x = tables.matrix(embeddings(tmp_path / "run")["embedding"]).astype(float)
        x = x - x.mean(axis=0) if space == "run" else x
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        truth = nearest_rows(x, x, 5, list(range(40)), list(range(40)))
        found.append(
            np.mean([len({row for _, row in own} & set(ids)) for own, ids in zip(truth, near.tolist(), strict=True)])
        )
    assert min(found) > 4.9


def test_tasks_ask_for_the_gpus_of_a_worker_and_compute_there(
    parted: tuple, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    asked, devices, mapped = [], list[str](), tasks.map_tasks

    def note(function: Any, items: Any, **options: Any) -> Any:
        asked.append(options.get("gpus"))
        return mapped(function, items, **options)

    def device(config: RunConfig) -> str:
        devices.append("cuda" if config.resources.gpus else "cpu")
        return "cpu"

    monkeypatch.setattr(tasks, "map_tasks", note)
    for stage, module in (("neighbors", neighbors), ("assign", assign)):
        monkeypatch.setattr(module, "worker_device", device)
        resources = parted[0].resources.model_copy(update={"gpus_per_worker": 0.5})
        run_stage(stage, parted[0].model_copy(update={"resources": resources}), force=True)
    assert set(asked) == {0.5}
    assert set(devices) == {"cuda"}
