"""A run of a method that learns from pixels, and its network as the encoder of another run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest

from rayclust.config import EvaluateConfig, RunConfig, validate
from rayclust.errors import ConfigError
from rayclust.export import export
from rayclust.metrics.internal import silhouette
from rayclust.runtime.encoder import load_run_encoder
from rayclust.runtime.pipeline import run_all
from rayclust.runtime.rows import features_at, row_starts, table_at, transform_of
from rayclust.runtime.tensors import read_method, transform_rows
from rayclust.stages import evaluate
from rayclust.stages.figures import numbers
from rayclust.stages.predict import predict
from rayclust.stages.search import search
from rayclust.store import storage, tables
from rayclust.store.manifest import EncodeOutputs, read_manifest
from rayclust.store.run import Run
from rayclust.web.explorer import Explorer
from tests.docs.notebooks import NOTEBOOKS, execute
from tests.stages.runs import tree, write_folder

pytestmark = pytest.mark.usefixtures("in_process")
LEARNT_SPACE = NOTEBOOKS / "learnt_space.ipynb"
LEARNING = {
    "name": "simclr", "clusters": 3, "backbone": "small", "features": 8, "batch_size": 16, "epochs": 4,
    "warmup_epochs": 0, "restarts": 2,
}  # fmt: skip


def _learning(run: Path, images: Path, **groups: object) -> RunConfig:
    content = tree(str(run), str(images), method=LEARNING, **groups)
    return validate({key: value for key, value in content.items() if key not in ("encoder", "features")})


def test_a_run_learns_from_pixels_and_its_network_encodes_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = write_folder(tmp_path / "photos", per_class=12)
    config = _learning(tmp_path / "run", images, evaluate={"linear_epochs": 5})
    assert (config.encoder.name, config.encoder.normalize, config.features.normalize) == ("pixels", False, False)
    run_all(config)
    metrics = storage.read_json(Run(config.run).metrics)
    assert metrics["rows"] == 36
    assert metrics["nmi"] > 0.5
    # What was learnt is measured and not the pixels, it has a map, and the table of the training tells a collapse.
    assert metrics["knn_accuracy"] > 0.8
    assert metrics["knn_accuracy_top5"] == 1
    assert 0 < metrics["linear_probe"] <= 1
    assert 0.5 < metrics["linear_evaluation"] <= metrics["linear_evaluation_top5"] == 1
    run, manifest = Run(config.run), read_manifest(Run(config.run), "encode")
    assert manifest is not None
    transform, method = transform_of(manifest, config.features), read_method(run.model_folder, "train")
    starts = row_starts(manifest)
    x = features_at(run, starts, transform, np.arange(36))
    clusters = table_at(run.assignments, starts, np.arange(36), ["cluster"])["cluster"].to_numpy()
    assert metrics["silhouette"] == pytest.approx(silhouette(transform_rows(method, x), clusters), abs=1e-5)
    assert metrics["silhouette_rows"] == 36
    assert 0.1 < metrics["space_std"] <= 1
    assert 1 <= metrics["space_rank"] <= 8
    trained = pq.read_table(Run(config.run).at("model", "metrics.parquet"))
    assert trained["feature_std"].to_pylist()[-1] == pytest.approx(metrics["space_std"], abs=0.05)
    assert len(tables.read_table(numbers(Run(config.run), "map.parquet"))) == 36
    # Search, explorer, exports and the report look there for what is near.
    z = transform_rows(method, x)
    nearest = (z[5] @ z.T).argsort()[::-1]
    [found] = search(config, like=Explorer(config).image(5)["key"], top=3).items()
    assert (found[0], {hit.row for hit in found[1]}) == ("z", set(nearest[:4].tolist()) - {5})
    assert {each["row"] for each in Explorer(config).image(5)["neighbors"]} == set(nearest[:25].tolist()) - {5}
    export(config, "atlas", str(tmp_path / "atlas.parquet"))
    near = pq.read_table(tmp_path / "atlas.parquet")["neighbors"][5]["ids"].as_py()
    assert set(near) == set(nearest[: len(near) + 1].tolist()) - {5}
    # With a split, rows aside are asked and have no vote.
    codes, aside = np.repeat([0, 1, 2, -1], 9), np.arange(36) % 3 == 0
    plain = config.model_copy(update={"evaluate": EvaluateConfig()})
    scoring = evaluate._Scoring(run, manifest.outputs_of(EncodeOutputs), transform, plain, (), None)
    measured, probes = scoring._learnt_space(method, clusters, np.where(aside, codes, 7), aside)
    assert probes == {"knn_accuracy": 0, "knn_accuracy_top5": 0, "linear_probe": 0}, "no row of class 7 is asked"
    assert measured["silhouette_rows"] == np.sum(~aside | (codes >= 0))
    # New images go the same way.
    assert predict(config, str(images), str(tmp_path / "t.parquet"))["rows"] == 36
    assigned = pq.read_table(Run(config.run).assignments(0))["cluster"].to_pylist()
    assert pq.read_table(tmp_path / "t.parquet")["cluster"].to_pylist()[: len(assigned)] == assigned
    # The notebook shows it; it is kept without pictures, which would be of one run.
    drawn, shown = execute(LEARNT_SPACE, monkeypatch, RUN=config.run)
    assert len(drawn) == 4
    assert drawn[1].axes[0].get_title() == "cluster"
    assert [len(axis.get_legend().get_texts()) for axis in drawn[1].axes] == [3, 3]
    *_, probes, table = shown
    assert probes["knn_accuracy"] == round(metrics["knn_accuracy"], 3)
    assert probes["nmi of k-means of pixels"] > 0.5
    assert int(table.to_numpy().sum()) == 36
    assert not any(cell.get("outputs") for cell in nbformat.read(LEARNT_SPACE, as_version=4).cells)
    # The network is an encoder.
    other = tree(str(tmp_path / "other"), str(images), encoder={"name": "run", "pretrained": config.run})
    other["encoder"] = {"name": "run", "pretrained": config.run}
    encoder = load_run_encoder(validate(other))
    assert (encoder.dimension, encoder.preprocess.shape) == (128, (32, 32, 3))
    rows = encoder.encode_images(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3)).astype(np.uint8))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    run_all(validate(other))
    assert storage.read_json(Run(other["run"]).metrics)["nmi"] > 0.5


def test_such_a_method_refuses_any_other_input(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"method.name = simclr: learns from pixels"):
        validate(tree(str(tmp_path / "run"), str(tmp_path), method=LEARNING))


def test_a_run_as_an_encoder_must_be_one_that_learnt_from_pixels(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"set encoder.pretrained to the run"):
        validate(tree(str(tmp_path / "run"), str(tmp_path), encoder={"name": "run"}) | {"encoder": {"name": "run"}})
