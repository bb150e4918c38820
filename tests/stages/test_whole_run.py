"""Every stage on small real files: local and on S3, skipped when done, run again when something changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.cli import run_command
from rayclust.runtime.pipeline import STAGES as ALL
from rayclust.store import storage, tables
from tests.stages.runs import embeddings, files, tree, write_folder, write_tars, write_yaml

STAGES = [name for name in ALL if name not in ("counterparts", "select-k", "curate")]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

ONE = {"workers": 1, "decode_workers": 1}
"""An actor of each kind: each is a process that imports torch. With `auto` a run has two encoders here."""


def copy_tree(source: str, target: str) -> None:
    """Copies the visible files below one folder or URI to another."""
    for found in storage.walk(source):
        storage.write_bytes(storage.join(target, found.key), storage.read_bytes(found.uri))


def run(path: Path, *overrides: str) -> None:
    assert run_command(["run", str(path), *overrides]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A run over tar shards."""
    folder = tmp_path_factory.mktemp("whole")
    images = write_tars(folder / "images", shards=3, per_shard=20)
    run(write_yaml(folder / "RUN.yaml", tree(str(folder / "run"), str(images))))
    return folder


def test_artefacts_have_the_promised_columns(finished: Path):
    run_folder = finished / "run"
    table = embeddings(run_folder)
    assert table.schema.equals(tables.EMBEDDINGS(192))
    assert table["row"].to_pylist() == list(range(60))
    assert table["key"][0].as_py() == "shard-000/00000"
    assert set(table["label"].to_pylist()) == {"amber", "blue", "green"}
    neighbors = pq.read_table(run_folder / "neighbors" / "part-00001.parquet")
    assert neighbors.schema.equals(tables.NEIGHBORS(5))
    assert neighbors["row"].to_pylist() == list(range(20, 40))
    assert all(row not in found for row, found in zip(range(20, 40), neighbors["neighbors"].to_pylist(), strict=True))
    assert pq.read_table(run_folder / "assignments" / "part-00002.parquet").schema.equals(tables.ASSIGNMENTS)
    clusters = pq.read_table(run_folder / "clusters.parquet")
    assert clusters.schema.equals(tables.CLUSTERS)
    assert sum(clusters["size"].to_pylist()) == 60
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["accuracy"] == metrics["knn_accuracy"] == 1.0
    page = (run_folder / "report" / "index.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert page.count("data:image/webp") >= 12


def test_exemplars_are_nearest_to_the_mean_and_outliers_least_certain(finished: Path):
    assigned = pa.concat_tables(pq.read_table(p) for p in sorted((finished / "run" / "assignments").glob("*.parquet")))
    cluster_of = dict(zip(assigned["row"].to_pylist(), assigned["cluster"].to_pylist(), strict=True))
    confidence = dict(zip(assigned["row"].to_pylist(), assigned["confidence"].to_pylist(), strict=True))
    x = np.stack(embeddings(finished / "run")["embedding"].to_numpy(zero_copy_only=False)).astype(np.float64)
    features = x - x.mean(0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for cluster in pq.read_table(finished / "run" / "clusters.parquet").to_pylist():
        own = [row for row, number in cluster_of.items() if number == cluster["cluster"]]
        assert {cluster_of[row] for row in cluster["exemplars"] + cluster["outliers"]} == {cluster["cluster"]}
        mean = features[own].mean(0)
        assert cluster["exemplars"][0] == own[int((features[own] @ mean).argmax())]
        assert confidence[cluster["outliers"][0]] == min(
            confidence[row] for row in own if row not in cluster["exemplars"]
        )


def test_a_second_run_skips_every_stage(finished: Path, caplog: pytest.LogCaptureFixture):
    before = files(finished / "run", "**/*.*")
    caplog.set_level("INFO", logger="rayclust")
    import logging

    logging.getLogger("rayclust").propagate = True
    assert run_command(["run", str(finished / "RUN.yaml")]) == 0
    assert files(finished / "run", "**/*.*") == before


def test_a_changed_setting_runs_only_what_depends_on_it(finished: Path):
    manifests = finished / "run" / "manifests"
    stamp = {name: (manifests / f"{name}.json").stat().st_mtime_ns for name in STAGES}
    run(finished / "RUN.yaml", "label.exemplars=3")
    changed = {name for name in STAGES if (manifests / f"{name}.json").stat().st_mtime_ns != stamp[name]}
    assert changed == {"label", "report"}
    run(finished / "RUN.yaml")


def test_a_lost_artefact_is_made_again(finished: Path):
    part = finished / "run" / "assignments" / "part-00001.parquet"
    before = part.read_bytes()
    part.unlink()
    run(finished / "RUN.yaml")
    assert part.read_bytes() == before


def test_s3_gives_the_bytes_that_local_gives(
    finished: Path, s3_bucket: str, tmp_path: Path, request: pytest.FixtureRequest
):
    copy_tree(str(finished / "images"), f"{s3_bucket}/photos")
    config = write_yaml(tmp_path / "RUN.yaml", tree(f"{s3_bucket}/runs/one", f"{s3_bucket}/photos", resources=ONE))
    assert [run_command([stage, str(config)]) for stage in ("encode", "neighbors")] == [0, 0]
    request.getfixturevalue("in_process")  # workers have read and written there by now
    run(config)
    copy_tree(f"{s3_bucket}/runs/one", str(tmp_path / "copy"))
    local, remote = embeddings(finished / "run"), embeddings(tmp_path / "copy")
    for column in ("row", "key", "label", "embedding"):
        assert local[column].equals(remote[column]), column
    for pattern in ("neighbors/*.parquet", "assignments/*.parquet", "model/weights.safetensors", "metrics.json"):
        assert files(finished / "run", pattern) == files(tmp_path / "copy", pattern), pattern
    assert all(uri.startswith(s3_bucket) for uri in remote["uri"].to_pylist())
    assert run_command(["status", f"{s3_bucket}/runs/one"]) == 0
    assert run_command(["search", f"{s3_bucket}/runs/one", "--image", f"{s3_bucket}/runs/one/none.png"]) == 2


def test_temi_trains_through_ray_with_its_heads_on_two_workers(
    finished: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    content = tree(
        str(tmp_path / "run"),
        str(finished / "images"),
        method={"name": "temi", "clusters": 3, "heads": 3, "steps": 150, "batch_size": 32, "parallel": "heads"},
        resources={"workers": 2},
    )
    shutil.copytree(finished / "run", tmp_path / "run")
    path = str(write_yaml(tmp_path / "RUN.yaml", content))
    assert run_command(["train", path]) == 0
    request.getfixturevalue("in_process")
    assert [run_command([stage, path]) for stage in ("assign", "evaluate")] == [0, 0]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.9
    history = pq.read_table(tmp_path / "run" / "model" / "metrics.parquet")
    assert history["loss"][-1].as_py() < history["loss"][0].as_py()
    assert len(history["head_losses"][-1].as_py()) == 3


def test_rejects_leave_rows_dense_and_above_the_share_the_stage_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    images = write_folder(tmp_path / "images", 20)
    for number in (0, 1, 5):
        (images / "amber" / f"{number:04d}.png").write_bytes(b"not an image")
    config = write_yaml(tmp_path / "RUN.yaml", tree(str(tmp_path / "run"), str(images), resources=ONE))
    assert run_command(["encode", str(config), "images.max_reject_share=0.04"]) == 2
    assert "images.max_reject_share = 0.04" in capsys.readouterr().err
    assert not (tmp_path / "run" / "manifests" / "encode.json").exists()
    request.getfixturevalue("in_process")
    assert run_command(["encode", str(config)]) == 0
    table = embeddings(tmp_path / "run")
    assert table["row"].to_pylist() == list(range(57))
    assert "amber/0000.png" not in table["key"].to_pylist()
    rejects = pq.read_table(tmp_path / "run" / "rejects" / "part-00000.parquet")
    assert rejects["key"].to_pylist() == ["amber/0000.png", "amber/0001.png", "amber/0005.png"]
    assert set(rejects["reason"].to_pylist()) == {"not_an_image"}


def test_ready_embeddings_run_through(in_process: None, tmp_path: Path):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 16))
    labels = np.repeat(np.arange(3), 40)
    x = (centers[labels] + 0.1 * rng.normal(size=(120, 16))).astype(np.float32)
    (tmp_path / "table").mkdir()
    for part in range(2):
        some = slice(60 * part, 60 * part + 60)
        table = {"embedding": list(x[some]), "label": labels[some], "url": [f"https://x/{i}.jpg" for i in range(60)]}
        pq.write_table(pa.table(table), tmp_path / "table" / f"{part}.parquet")
    config = write_yaml(tmp_path / "RUN.yaml", tree(str(tmp_path / "run"), str(tmp_path / "table")))
    run(config)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"] == 1.0


def test_predict_gives_the_assignments_of_the_run_for_its_own_images(finished: Path, tmp_path: Path, in_process: None):
    out = tmp_path / "table.parquet"
    assert run_command(["predict", str(finished / "run"), str(finished / "images"), "--out", str(out)]) == 0
    predicted = pq.read_table(out)
    assigned = pa.concat_tables(pq.read_table(p) for p in sorted((finished / "run" / "assignments").glob("*.parquet")))
    assert predicted["key"].to_pylist() == assigned["key"].to_pylist()
    assert predicted["cluster"].to_pylist() == assigned["cluster"].to_pylist()
    assert not (finished / "run" / "predict").exists() or not any((finished / "run" / "predict").rglob("*.parquet"))
    assert (
        run_command(["predict", str(finished / "run"), str(finished / "images"), "--out", str(tmp_path / "t.csv")]) == 0
    )
    assert (tmp_path / "t.csv").read_text().count("\n") == 61


def test_search_finds_the_image_itself_first(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rayclust.store.sources import fetch_many

    query = tmp_path / "query.png"
    [(_, data)] = fetch_many([f"{finished / 'images' / 'shard-001.tar'}#00007.png"])
    query.write_bytes(data or b"")
    assert run_command(["search", str(finished / "run"), "--image", str(query), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "shard-001.tar#00007.png" in lines[1]
    assert lines[1].split()[0] == "1.0000"


def test_curation_of_a_finished_run(finished: Path, tmp_path: Path):
    shutil.copytree(finished / "run", tmp_path / "run")
    content = tree(str(tmp_path / "run"), str(finished / "images"), curate={"preset": "semdedup"})
    assert run_command(["curate", str(write_yaml(tmp_path / "RUN.yaml", content))]) == 0
    counts = json.loads((tmp_path / "run" / "curation" / "curation.json").read_text())["counts"]
    assert counts["rows"] == 60 == counts["kept"] + counts["identical"] + counts["near"]
    assert len((tmp_path / "run" / "curation" / "kept.txt").read_text().splitlines()) == counts["kept"]


def test_status_and_check_say_what_is(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["status", str(finished / "run")]) == 0
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in STAGES)
    assert run_command(["check", str(finished / "RUN.yaml")]) == 0
    assert "FAIL" not in capsys.readouterr().out
