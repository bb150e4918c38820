from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rayclust.errors import DataError
from rayclust.runtime import datasets, demo
from rayclust.runtime.datasets import DATASETS, export, local_folder
from rayclust.store import storage
from rayclust.store.sources import plan_shards, read_records
from tests.stages.runs import files

NAMES = [f"class{i}" for i in range(100)]


def pixels(count: int, side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def cifar_records(images: np.ndarray, *labels: list[int]) -> bytes:
    heads = np.array(labels, np.uint8).T
    return np.concatenate([heads, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1).tobytes()


def members(name: str) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list[int]]]]:
    """Members of a small archive as the authors lay theirs out, and what is in it by split."""
    if name == "cifar10":
        train = [(pixels(2, 32, i), [i, 9 - i]) for i in range(5)]
        files = {f"cifar-10-batches-bin/data_batch_{i + 1}.bin": cifar_records(x, y) for i, (x, y) in enumerate(train)}
        test = (pixels(3, 32, 9), [3, 1, 2])
        files["cifar-10-batches-bin/test_batch.bin"] = cifar_records(*test)
        joined = np.concatenate([x for x, _ in train]), [label for _, y in train for label in y]
        return files, {"train": joined, "test": test}
    if name == "stl10":
        splits = {split: (pixels(3, 96, seed), [0, 9, seed]) for seed, split in enumerate(("train", "test"))}
        files = {"stl10_binary/class_names.txt": "\n".join(NAMES[:10]).encode()}
        for split, (x, y) in splits.items():
            files[f"stl10_binary/{split}_X.bin"] = x.transpose(0, 3, 2, 1).tobytes()
            files[f"stl10_binary/{split}_y.bin"] = (np.array(y, np.uint8) + 1).tobytes()
        return files, splits
    files, splits = {}, {}
    for seed, split in enumerate(("train", "test")):
        x, coarse, fine = pixels(4, 32, seed), [0, 19, 5, 5], [99, 0, 50, seed]
        files[f"cifar-100-binary/{split}.bin"] = cifar_records(x, coarse, fine)
        splits[split] = x, coarse if name == "cifar20" else fine
    for kind in ("coarse", "fine"):
        files[f"cifar-100-binary/{kind}_label_names.txt"] = "\n".join(NAMES).encode() + b"\n\n"
    return files, splits


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYCLUST_CACHE", str(tmp_path))
    return tmp_path


def place(cache: Path, name: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an archive where a user would, under the MD5 that it has."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    known = DATASETS[name]
    published = dataclasses.replace(known, md5=hashlib.md5(buffer.getvalue()).hexdigest())  # noqa: S324
    monkeypatch.setitem(DATASETS, name, published)
    path = cache / "archives" / published.url.rpartition("/")[2]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_image_comes_with_its_label(cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "PART_IMAGES", 2)
    files, splits = members(name)
    place(cache, name, files, monkeypatch)
    names = DATASETS[name].names if name == "cifar10" else NAMES
    for split, (images, labels) in splits.items():
        shards = plan_shards(local_folder(f"dataset:{name}/{split}"))
        found = [record for shard in shards for record in read_records(shard)]
        assert [record.key for record in found] == [f"{split}/{i:06d}" for i in range(len(images))]
        assert [record.label for record in found] == [names[label] for label in labels]
        assert all(
            np.array_equal(Image.open(io.BytesIO(record.data or b"")), image)
            for record, image in zip(found, images, strict=True)
        )
    both = [r for shard in plan_shards(local_folder(f"dataset:{name}")) for r in read_records(shard)]
    assert len(both) == sum(len(images) for images, _ in splits.values())


def test_pixels_are_those_that_torchvision_reads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import STL10

    files, _ = members("stl10")
    place(cache, "stl10", files, monkeypatch)
    for member, data in files.items():
        (cache / member).parent.mkdir(exist_ok=True)
        (cache / member).write_bytes(data)
    monkeypatch.setattr(STL10, "_check_integrity", lambda _: True)
    theirs = STL10(str(cache), "test")
    ours = [r for shard in plan_shards(local_folder("dataset:stl10/test")) for r in read_records(shard)]
    assert len(ours) == len(theirs)
    for record, (image, label) in zip(ours, theirs, strict=True):
        assert np.array_equal(Image.open(io.BytesIO(record.data or b"")), image)
        assert record.label == NAMES[label]


def test_an_export_is_made_once_and_always_alike(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(cache, "cifar10", members("cifar10")[0], monkeypatch)
    folder = export("cifar10")
    first = {found.key: (storage.read_bytes(found.uri), found.stamp) for found in storage.walk(folder)}
    archive = path.read_bytes()
    path.unlink()
    assert export("cifar10") == folder
    assert {found.key: found.stamp for found in storage.walk(folder)} == {key: s for key, (_, s) in first.items()}
    path.write_bytes(archive)
    storage.remove(f"{folder}/dataset.json")  # as if killed before the end
    export("cifar10")
    assert {found.key: storage.read_bytes(found.uri) for found in storage.walk(folder)} == {
        key: data for key, (data, _) in first.items()
    }


def test_without_network_a_line_says_what_to_fetch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import utils

    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(utils, "download_url", offline)
    with pytest.raises(DataError) as caught:
        local_folder("dataset:cifar20")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", str(cache / "archives")):
        assert part in message


def test_an_archive_of_something_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(cache, "stl10", {"other.txt": b"x"}, monkeypatch)
    with pytest.raises(DataError, match=r"does not hold stl10.*remove it"):
        local_folder("dataset:stl10")
    files, _ = members("cifar10")
    files["cifar-10-batches-bin/test_batch.bin"] += b"x"
    place(cache, "cifar10", files, monkeypatch)
    with pytest.raises(DataError, match="within a record"):
        local_folder("dataset:cifar10")
    assert path.exists()


@pytest.mark.parametrize("uri", ["dataset:mnist", "dataset:", "dataset:cifar10/val", "dataset:stl10/unlabeled"])
def test_unknown_data_sets_are_refused(cache: Path, uri: str) -> None:
    with pytest.raises(DataError, match="dataset:cifar10"):
        local_folder(uri)


def test_other_inputs_stay_where_they_are() -> None:
    assert local_folder("s3://bucket/photos") == "s3://bucket/photos"


def test_digits_need_no_archive_and_are_written_once(cache: Path):
    folder = Path(local_folder("dataset:digits"))
    assert folder == cache / "digits"
    [shard, *others] = plan_shards(str(folder), "auto", "auto", shard_size=512, classes=None)
    assert len(others) == 5
    first = next(iter(read_records(shard, 1 << 20)))
    assert (first.label, first.data is not None) == ("0", True)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert local_folder("dataset:digits") == str(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(DataError, match="no such data set"):
        local_folder("dataset:digits/train")


def test_the_digits_are_written_the_same_every_time_and_as_they_are(tmp_path: Path):
    datasets.write_digits(str(tmp_path))
    before = files(tmp_path, "*.tar")
    datasets.write_digits(str(tmp_path))
    assert files(tmp_path, "*.tar") == before
    assert len(before) == datasets.SHARDS
    scans, seen = load_digits(), 0
    for data in before.values():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in [name for name in members if name.endswith(".png")]:
            number = int(name[:6])
            assert members[f"{number:06d}.cls"] == str(scans.target[number]).encode()
            pixels = np.asarray(Image.open(io.BytesIO(members[name])))
            assert pixels.shape == (8 * datasets.SCALE, 8 * datasets.SCALE)
            np.testing.assert_allclose(
                pixels[:: datasets.SCALE, :: datasets.SCALE] / 255 * 16, scans.images[number], atol=0.04
            )
            seen += 1
    assert seen == len(scans.target) == 1797


def test_the_table_shows_mean_and_deviation_in_percent():
    scores = {"kmeans": [{"accuracy": 0.5, "nmi": 0.5, "ari": 0.5}, {"accuracy": 0.7, "nmi": 0.5, "ari": 0.5}]}
    head, line = demo.table(scores).splitlines()
    assert head.split() == ["method", "ACC", "NMI", "ARI"]
    assert line.split() == ["kmeans", "60.0", "±", "10.0", "50.0", "±", "0.0", "50.0", "±", "0.0"]


def test_a_killed_demo_goes_on_and_a_finished_one_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "write_digits", lambda folder: None)
    done = list[tuple[str, int]]()

    def run_all(config: Any, *, stop_after: str | None = None) -> None:
        assert Path(config.run).is_absolute()
        if stop_after is None and (config.method.name, config.seed) in done:
            return
        done.append((config.method.name, config.seed))
        if len(done) == 2:
            raise KeyboardInterrupt
        metrics = {"accuracy": len(done) / 10, "nmi": 0.5, "ari": 0.5, "silhouette": None}
        storage.write_json(f"{config.run}/metrics.json", metrics)

    monkeypatch.setattr(demo, "run_all", run_all)
    with pytest.raises(KeyboardInterrupt):
        demo.demo("demo")
    uri, scores = demo.demo("demo")
    plan = [(method, seed) for method in ("kmeans", "auto") for seed in demo.SEEDS]
    assert done == [plan[0], plan[1], *plan[1:]]
    assert uri == str(tmp_path / "demo" / "run")
    assert [score["accuracy"] for score in scores["kmeans"]] == [0.1, 0.3, 0.4]
    assert set(scores) == {"kmeans", "auto"}
    beside = storage.read_json(f"{uri}/beside.json")
    assert len(beside["kmeans"]) == 3
    assert len(done) == 7
    assert demo.demo("demo") == (uri, scores)
    assert len(done) == 7
