from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.runtime.api import load_run
from rayclust.runtime.pipeline import run_all
from rayclust.stages.predict import SCHEMA, _scores, predict
from rayclust.store import storage, tables
from rayclust.store.run import Run
from tests.stages.conftest import Sealed
from tests.stages.runs import picture, tree, write_folder

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def frozen(pictures_run: Sealed, tmp_path: Path) -> RunConfig:
    shutil.copytree(pictures_run.folder, tmp_path / "frozen")
    return validate(tree(str(tmp_path / "frozen"), pictures_run.config.images.uri))


def test_the_runs_own_images_get_the_runs_own_clusters(frozen: RunConfig, tmp_path: Path):
    out = tmp_path / "new" / "t.parquet"
    assert predict(frozen, frozen.images.uri, str(out)) == {"rows": 24, "rejects": 1}
    found = pq.read_table(out)
    assert found.schema.equals(SCHEMA)
    assigned = pa.concat_tables([pq.read_table(Run(frozen.run).assignments(part)) for part in range(3)])
    good = found.slice(0, 24)
    assert good["key"].to_pylist() == assigned["key"].to_pylist()
    assert good["cluster"].to_pylist() == assigned["cluster"].to_pylist()
    np.testing.assert_allclose(good["confidence"].to_numpy(), assigned["confidence"].to_numpy(), rtol=1e-6)
    assert found.slice(24).to_pylist() == [
        {
            "key": "shard-001/broken",
            "uri": f"{frozen.images.uri}/shard-001.tar#broken.png",
            "cluster": None,
            "name": None,
            "confidence": None,
            "reason": "empty",
        }
    ]
    assert not (Path(frozen.run) / "predict").exists() or not any((Path(frozen.run) / "predict").iterdir())


def test_new_images_are_centred_by_the_run_not_by_themselves(
    frozen: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = write_folder(tmp_path / "photos", per_class=2)
    for other in ("blue", "green"):
        shutil.rmtree(images / other)
    monkeypatch.chdir(tmp_path)
    predict(frozen, "photos", "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    amber = pq.read_table(Run(frozen.run).assignments(0))["cluster"][0].as_py()
    assert [row["cluster"] for row in rows] == [str(amber)] * 2
    assert [row["key"] for row in rows] == ["amber/0000.png", "amber/0001.png"]


def test_the_limits_of_the_run_hold_for_new_images(frozen: RunConfig, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for size in (24, 40):
        (tmp_path / "photos" / f"{size}.png").write_bytes(picture((9, 9, 9), 0, size))
    limited = validate(tree(frozen.run, frozen.images.uri, images={"max_pixels": 1000}))
    with pytest.raises(ArtefactError, match="is not trained"):
        predict(limited, str(tmp_path / "photos"), str(tmp_path / "t.csv"))
    assert predict(frozen, str(tmp_path / "photos"), str(tmp_path / "t.csv"))["rejects"] == 0


def test_columns_that_the_run_names_are_those_of_new_tables(tmp_path: Path):
    x = np.random.default_rng(0).normal(size=(2, 20, 4))
    columns = {
        "embedding": x[1].tolist(),
        "vec": x[0].tolist(),
        "id": list(range(20)),
        "photo": list("abcdefghijklmnopqrst"),
    }
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "rows" / "a.parquet")
    named = {"columns": {"embedding": "vec", "key": "photo", "label": "photo"}}
    method = {"name": "kmeans", "clusters": 3}
    config = validate(tree(str(tmp_path / "run"), str(tmp_path / "rows"), images=named, method=method))
    run_all(config, stop_after="assign")
    config = load_run(config.run)
    predict(config, str(tmp_path / "rows"), str(tmp_path / "t.parquet"))
    found, own = pq.read_table(tmp_path / "t.parquet"), pq.read_table(Run(config.run).assignments(0))
    assert found.select(["key", "cluster"]).to_pylist() == own.select(["key", "cluster"]).to_pylist()


def test_nothing_usable_is_one_line_with_the_reasons(frozen: RunConfig, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"none")
    with pytest.raises(DataError, match="no image there can be used: 1 not_an_image"):
        predict(frozen, str(tmp_path / "photos"), str(tmp_path / "t.csv"))
    assert not (tmp_path / "t.csv").exists()


def test_embeddings_of_another_width_are_refused(frozen: RunConfig, tmp_path: Path):
    np.save(tmp_path / "x.npy", np.ones((3, 5), np.float32))
    with pytest.raises(ConfigError, match=r"encoder\.name = pixels: has 192 values an image, .* have 5"):
        predict(frozen, str(tmp_path / "x.npy"), str(tmp_path / "t.csv"))


def test_a_killed_prediction_goes_on(frozen: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    images, out = write_folder(tmp_path / "photos", per_class=4), tmp_path / "t.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("rayclust.stages.predict.assign", killed)
        with pytest.raises(KeyboardInterrupt):
            predict(frozen, str(images), str(out))
    monkeypatch.setattr("rayclust.stages.encode.chunks_in_driver", killed)
    assert predict(frozen, str(images), str(out))["rows"] == 12


def test_a_run_that_is_not_trained_or_out_of_step_is_refused(frozen: RunConfig, tmp_path: Path):
    out = str(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match=r"must end in \.parquet or \.csv"):
        predict(frozen, frozen.images.uri, str(tmp_path / "t.txt"))
    other = validate(tree(frozen.run, frozen.images.uri, features={"center": False}))
    with pytest.raises(ArtefactError, match="is not trained"):
        predict(other, frozen.images.uri, out)
    storage.remove(Run(frozen.run).manifest("train"))
    with pytest.raises(ArtefactError, match="is not trained"):
        predict(frozen, frozen.images.uri, out)


def test_classes_that_the_run_does_not_know_are_not_scored_by_its_own(tmp_path: Path):
    run, clusters = Run(str(tmp_path)), np.array([0, 0, 1])
    tables.write_pieces(
        run.contingency, (own := pa.table({"label": ["a"], "cluster": [0], "count": [3]})).schema, [own]
    )
    for labels, score in ((["x", "x", "y"], None), (["a", "a", "y"], 2 / 3)):
        found = _scores(run, [(pa.chunked_array([labels]), clusters)], None)
        assert found["accuracy"] == 1
        assert found.get("accuracy_held_out") == (score and pytest.approx(score))
