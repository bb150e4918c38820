"""A run of a method that learns from pixels, and its network as the encoder of another run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ConfigError
from rayclust.runtime.encoder import load_run_encoder
from rayclust.runtime.pipeline import run_all
from rayclust.stages.figures import numbers
from rayclust.stages.predict import predict
from rayclust.store import storage, tables
from rayclust.store.run import Run
from tests.stages.runs import tree, write_folder

pytestmark = pytest.mark.usefixtures("in_process")
LEARNING = {
    "name": "simclr", "clusters": 3, "backbone": "small", "features": 8, "batch_size": 16, "epochs": 4,
    "warmup_epochs": 0, "restarts": 2,
}  # fmt: skip


def _learning(run: Path, images: Path, **groups: object) -> RunConfig:
    content = tree(str(run), str(images), method=LEARNING, **groups)
    return validate({key: value for key, value in content.items() if key not in ("encoder", "features")})


def test_a_run_learns_from_pixels_and_its_network_encodes_for_another(tmp_path: Path):
    images = write_folder(tmp_path / "photos", per_class=12)
    config = _learning(tmp_path / "run", images)
    assert (config.encoder.name, config.encoder.normalize, config.features.normalize) == ("pixels", False, False)
    run_all(config)
    metrics = storage.read_json(Run(config.run).metrics)
    assert metrics["rows"] == 36
    assert metrics["nmi"] > 0.5
    # Its space is probed, it has a map, and the table of the training tells a collapse.
    assert metrics["space_knn"] > 0.8
    assert 0 < metrics["space_linear_probe"] <= 1
    assert 0.1 < metrics["space_std"] <= 1
    assert 1 <= metrics["space_rank"] <= 8
    trained = pq.read_table(Run(config.run).at("model", "metrics.parquet"))
    assert trained["feature_std"].to_pylist()[-1] == pytest.approx(metrics["space_std"], abs=0.05)
    assert len(tables.read_table(numbers(Run(config.run), "map.parquet"))) == 36
    # New images go the same way.
    assert predict(config, str(images), str(tmp_path / "t.parquet"))["rows"] == 36
    assigned = pq.read_table(Run(config.run).assignments(0))["cluster"].to_pylist()
    assert pq.read_table(tmp_path / "t.parquet")["cluster"].to_pylist()[: len(assigned)] == assigned
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
