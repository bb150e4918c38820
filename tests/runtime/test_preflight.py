"""What `check` finds, and estimates worked out by hand."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayclust.config import RunConfig, validate
from rayclust.runtime import preflight
from rayclust.runtime.preflight import Sample, check, cost, traffic, work
from rayclust.store import storage
from tests.stages.runs import picture, tree, write_folder, write_tars
from tests.store.inputs import s3_connection


def config(folder: Path, **groups: Any) -> RunConfig:
    return validate(tree(str(folder / "run"), str(folder / "images"), **groups))


def bad(settings: RunConfig) -> dict[str, str]:
    """Subjects that failed, with what was said."""
    return {finding.subject: finding.text for finding in check(settings) if not finding.good}


def test_a_good_run_passes_and_nothing_is_written(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=10)
    findings = {finding.subject: finding.text for finding in check(config(tmp_path))}
    assert bad(config(tmp_path)) == {}
    assert findings["images"] == "folder: 30 images in 2 shards"
    assert findings["encoder"] == "pixels, 192 values an image"
    assert "0.01 MB of embeddings" in findings["estimate"]
    assert "of CPU time" in findings["work"]
    assert findings["cost"].startswith("not known: give prices")
    assert not (tmp_path / "run").exists()


def test_prices_become_dollars(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=10)
    priced = config(tmp_path, prices={"mine": {"dollars_per_hour": 3600, "cpus": 1, "images_per_second": 30}})
    findings = {finding.subject: finding.text for finding in check(priced)}
    dollars = float(findings["cost"].partition("$")[2])
    assert 1 <= dollars < 2  # a second for 30 images at a dollar a second, and the time to decode them
    assert findings["cost"].startswith("encode on mine: 0.00 node hours")


def test_tars_have_images_that_nobody_has_counted(tmp_path: Path):
    write_tars(tmp_path / "images", shards=2, per_shard=4)
    findings = {finding.subject: finding.text for finding in check(config(tmp_path))}
    assert findings["images"] == "webdataset: images in 2 shards"
    assert findings["estimate"] == "the number of images is not known before they are read"


def test_an_empty_first_tar_is_no_reason_to_stop(tmp_path: Path):
    write_tars(tmp_path / "images", shards=1, per_shard=4)
    tarfile.open(tmp_path / "images" / "a.tar", "w").close()
    assert bad(config(tmp_path)) == {}


def test_a_missing_input_is_said_once_for_each_that_needs_it(tmp_path: Path):
    found = bad(config(tmp_path))
    assert set(found) == {"images", "encoder"}
    assert str(tmp_path / "images") in found["images"]


def test_a_store_that_ignores_conditions_is_refused_by_name(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
):
    write_folder(tmp_path / "images", per_class=1)
    settings = validate(tree(f"{s3_bucket}/run", str(tmp_path / "images")))
    assert "run" not in bad(settings)
    connection = s3_connection()
    real = connection._call_s3

    async def without_conditions(name: str, *arguments: Any, **request: Any) -> Any:
        return await real(name, *arguments, **{key: request[key] for key in request if not key.startswith("If")})

    monkeypatch.setattr(connection, "_call_s3", without_conditions)
    assert f"the store {s3_bucket}" in bad(settings)["run"]
    assert "ignores If-None-Match" in bad(settings)["run"]
    assert list(storage.walk(s3_bucket)) == []


def test_a_run_that_cannot_be_written_is_found(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=1)
    (tmp_path / "run").write_text("a file")
    assert "is a file" in bad(config(tmp_path, method={"clusters": 2}))["run"]


def test_images_of_which_none_can_be_decoded_are_found(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"" if number else b"none")
    assert bad(config(tmp_path))["encoder"] == "none of the first 3 images can be decoded: empty, not_an_image"


def test_some_bad_images_are_counted_not_refused(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture((9, 9, 9), number) if number else b"")
    [finding] = [f for f in check(config(tmp_path)) if f.subject == "encoder"]
    assert finding.good
    assert "1 of the first 4 images rejected" in finding.text


def test_an_encoder_without_weights_is_found(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=1)
    encoder = {"name": "timm/resnet18", "pretrained": "/nowhere/w.safetensors"}
    assert "/nowhere/w.safetensors" in bad(config(tmp_path, encoder=encoder, method={"clusters": 2}))["encoder"]


def test_more_clusters_than_images_are_found(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=1)
    found = bad(config(tmp_path, method={"clusters": 4}))
    assert found == {"method": "method.clusters = 4: must be at most the number of images, 3"}


def test_words_that_will_be_missing_at_the_end_are_found_at_the_start(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=1)
    (tmp_path / "words.parquet").write_bytes(b"words")
    words = {"vocabulary": str(tmp_path / "words.parquet")}
    assert "is not a readable parquet file" in bad(config(tmp_path, label=words))["label"]


def test_ready_embeddings_need_no_encoder(tmp_path: Path):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.ones((30, 6), np.float32))
    findings = {finding.subject: finding for finding in check(config(tmp_path))}
    assert findings["encoder"].text == "unknown, ready embeddings of 6 values: no names, no search by text or image"
    assert all(finding.good for finding in findings.values())
    wrong = {"name": "timm/resnet18", "pretrained": "/nowhere/w.safetensors"}
    said = bad(config(tmp_path, encoder=wrong))["encoder"]
    assert "encoder.name = timm/resnet18: has 512 values an image" in said
    assert "have 6" in said


@pytest.mark.parametrize("x", [np.full((4, 3), np.nan, np.float32), np.zeros((4, 3), np.float32)], ids=["nan", "zero"])
def test_embeddings_of_which_none_can_be_used_are_found(tmp_path: Path, x: np.ndarray):
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", x)
    assert "none of the first 4 embeddings can be used" in bad(config(tmp_path))["encoder"]


def test_the_plan_of_a_training_is_told_and_one_that_cannot_be_is_found(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=10)
    method = {"name": "temi", "clusters": 3, "preset": "none", "heads": 4, "batch_size": 8}
    resources = {"workers": 2}
    [told] = [f for f in check(config(tmp_path, method=method, resources=resources)) if f.subject == "method"]
    assert told.text.startswith("temi on 192 values a row, rows of a batch over 2 workers: ")
    wrong = bad(config(tmp_path, method=method | {"parallel": "2x3"}, resources=resources))
    assert "method.parallel = 2x3: is for 6 workers, there are 2" in wrong["method"]


def method_line(settings: RunConfig) -> str:
    return next(finding.text for finding in check(settings) if finding.subject == "method")


def test_the_fits_of_a_choice_are_counted(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=10)
    listed = config(tmp_path, method={"clusters": [2, 5, 9]}, select_k={"seeds": 3})
    expected = "3 candidates × 3 seeds = 9 fits up to 9 clusters; each of kmeans on 192 values a row"
    assert method_line(listed).startswith(expected)
    findings = {finding.subject: finding.text for finding in check(listed)}
    assert findings["config"] == "method kmeans, one of 2, 5, 9 clusters"
    auto = config(tmp_path, method={"clusters": "auto"})
    assert "candidates × 2 seeds" in method_line(auto)
    assert "up to 11 clusters, and up to 8 candidates more" in method_line(auto)


def test_candidates_above_the_images_are_found(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=1)
    found = bad(config(tmp_path, method={"clusters": [2, 4]}))
    assert found == {"method": "method.clusters = [2, 4]: 4 is above the number of rows, 3"}


IMAGES = 7_200_000
GPU = Sample(file_bytes=100_000, decode_seconds=1e-3, encode_seconds=0.5e-3, on_gpu=True)
CPU = Sample(file_bytes=100_000, decode_seconds=1e-3, encode_seconds=9e-3, on_gpu=False)


def priced(gpus: float, **prices: Any) -> RunConfig:
    return validate(
        tree("s3://b/r", "s3://b/i", neighbors={"k": 50}, resources={"gpus_per_worker": gpus}, prices=prices)
    )


def test_bytes():
    assert traffic(priced(1), IMAGES, 768, GPU) == (
        "reads 720.00 GB of images; 11.06 GB of embeddings and 3.60 GB of neighbours in storage, 22.12 GB of rows per "
        "training node"
    )
    assert traffic(priced(0), 1000, 768, None).startswith("1.54 MB of embeddings and 0.50 MB of neighbours")


def test_two_hours_of_a_cpu_to_one_of_a_gpu():
    assert work(priced(1), IMAGES, GPU) == (
        "decode 2 h 00 min of CPU time and encode 1 h 00 min of GPU time at this machine's speed: "
        "2.0 CPUs keep one GPU busy"
    )
    assert work(priced(0), IMAGES, CPU).startswith("decode 2 h 00 min and encode 18 h 00 min of CPU time")
    assert "cannot be seen" in work(priced(1), IMAGES, CPU)


def test_the_slower_of_cpus_and_gpus_bounds_a_node():
    prices = {
        "wide": {"dollars_per_hour": 3, "cpus": 16, "gpus": 1},
        "narrow": {"dollars_per_hour": 2, "cpus": 1, "gpus": 1},
        "fast": {"dollars_per_hour": 8, "cpus": 16, "gpus": 4, "images_per_second": 8000},
        "plain": {"dollars_per_hour": 1, "cpus": 32},
    }
    assert cost(priced(1, **prices), IMAGES, GPU) == (
        "encode on wide: 1.00 node hours, $3.00, 1.00 GPU hours; its GPUs bound it, 2.0 of 16.0 CPUs a GPU are busy; "
        "on narrow: 2.00 node hours, $4.00, 1.00 GPU hours; its CPUs bound it, 2.0 a GPU are needed and 1.0 are there: "
        "add CPU nodes; on fast: 0.12 node hours, $1.00, 0.25 GPU hours; its CPUs bound it, 8.0 a GPU are needed and "
        "4.0 are there: add CPU nodes; on plain: decoding alone takes 0.06 node hours, $0.06"
    )


def test_without_gpus_the_cpus_do_both():
    prices = {
        "plain": {"dollars_per_hour": 1.5, "cpus": 10},
        "known": {"dollars_per_hour": 1, "cpus": 10, "images_per_second": 1000},
    }
    text = cost(priced(0, **prices), IMAGES, CPU)
    assert text == "encode on plain: 2.00 node hours, $3.00; on known: 0.40 node hours, $0.40"
    assert cost(priced(0, **prices), 0, CPU).startswith("encode, each 1,000 images on plain: ")
    assert cost(priced(0, **prices), IMAGES, None) == "nothing is encoded"


def test_a_gpu_that_is_not_here_is_not_guessed():
    prices = {"far": {"dollars_per_hour": 1, "cpus": 16, "gpus": 1}}
    line = cost(priced(1, **prices), IMAGES, CPU)
    assert line.startswith("encode on far: not known, set prices.far.images_per_second")
    assert "$" not in line


@pytest.mark.parametrize(
    ("resources", "sees", "said"),
    [
        ({}, True, "1 × NVIDIA H100"),
        (
            {"gpus_per_worker": 0},
            True,
            "1 × NVIDIA H100 lies idle: set resources.gpus_per_worker to 1, or leave it out",
        ),
        ({}, False, "CPU only"),
    ],
)
def test_a_gpu_that_would_lie_idle_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], sees: bool, said: str
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: sees)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    checks = preflight._Checks(config(tmp_path, resources=resources))
    assert checks.gpus() == said
    assert (checks.config.resources.gpus > 0) == (sees and not resources)
    monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/nvidia0")]))
    assert ("lies idle" in checks.gpus()) == (not sees or bool(resources))


def test_a_second_input_is_looked_at_as_the_first_is(tmp_path: Path):
    write_folder(tmp_path / "images", per_class=10)
    write_folder(tmp_path / "test", per_class=2)
    findings = {
        finding.subject: finding.text for finding in check(config(tmp_path, images={"test": f"{tmp_path}/test"}))
    }
    assert findings["images"] == "folder: 30 images in 2 shards; kept aside, folder: 6 images in 1 shards"
    for file in (tmp_path / "test").rglob("*.png"):
        file.write_bytes(b"x")
    said = bad(config(tmp_path, images={"test": f"{tmp_path}/test"}))
    assert "test: none of the first 6 images can be decoded: not_an_image" in said["encoder"]
    np.save(tmp_path / "rows.npy", np.ones((4, 6), np.float32))
    mixed = bad(config(tmp_path, images={"test": f"{tmp_path}/rows.npy"}))
    assert "one input holds images and the other embeddings" in mixed["encoder"]
    gone = bad(config(tmp_path, images={"test": f"{tmp_path}/gone"}))
    assert "gone: no such file or folder" in gone["images"]
    twice = bad(config(tmp_path, images={"test": f"{tmp_path}/images/amber"}))
    assert "would be read twice" in twice["images"]


def test_a_second_input_of_another_width_is_found(tmp_path: Path):
    for name, width in (("images", 6), ("test", 7)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", np.ones((30, width), np.float32))
    said = bad(config(tmp_path, images={"test": f"{tmp_path}/test"}))
    assert "test: embeddings of 7 values; those of images.uri have 6" in said["encoder"]
