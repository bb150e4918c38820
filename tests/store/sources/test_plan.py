from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rayclust.errors import ConfigError, DataError
from rayclust.store import filesystem
from rayclust.store.filesystem import FileStat
from rayclust.store.sources import detect_format, folder, plan_shards
from rayclust.store.sources.shard import Shard
from tests.store.inputs import image, npy, parquet, samples, tar, vectors, write

TAR = {"x.tar": tar(samples(1))}
IMAGES = {"a/1.jpg": image()}
TABLE = {"t.parquet": parquet({"image": [image()]})}
VECTORS = {"v.parquet": parquet({"embedding": vectors(2).tolist()})}
ARRAY = {"e.npy": npy(vectors(2))}
OTHER = {"m.parquet": parquet({"caption": ["x"]})}
NOTES = {"readme.md": b"x", "a/stats.json": b"{}"}


@pytest.mark.parametrize(
    ("files", "form"),
    [
        (TAR, "webdataset"), (IMAGES, "folder"), (TABLE, "parquet"), (VECTORS, "embeddings"), (ARRAY, "embeddings"),
        (TAR | OTHER, "webdataset"), (IMAGES | OTHER, "folder"), (ARRAY | OTHER, "embeddings"),
        (TAR | NOTES, "webdataset"), (IMAGES | NOTES, "folder"), (TABLE | NOTES, "parquet"), (IMAGES | ARRAY, "folder"),
        (TABLE | ARRAY, "parquet"), (TAR | ARRAY, "webdataset"), ({"x.pt": b""}, "embeddings"),
        ({"A.TGZ": b""}, "webdataset"),
        (TABLE | {"a.parquet": b"damaged"}, "parquet"), (VECTORS | ARRAY, "embeddings"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)  # fmt: skip
def test_formats_are_recognised(place: str, files: dict[str, bytes], form: str) -> None:
    write(place, files)
    assert detect_format(place) == form


@pytest.mark.parametrize("files", [TAR, IMAGES, TABLE, VECTORS, ARRAY], ids=lambda value: "+".join(value))
def test_single_files_are_inputs(place: str, files: dict[str, bytes]) -> None:
    write(place, files)
    (shard,) = plan_shards(f"{place}/{next(iter(files))}")
    assert shard.index == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (TAR | IMAGES, r"holds webdataset \(x.tar\)|holds folder \(a/1.jpg\)"),
        (TAR | TABLE, "set images.format"), (IMAGES | TABLE, "set images.format"),
        (NOTES, "holds no images"), (OTHER, "neither a column of images nor one of embeddings.*caption"),
        ({"a.parquet": b"x", "b.parquet": b""}, "cannot be read as Parquet"), ({"labels.npy": b"x"}, "holds no images"),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_cannot_be_told_is_refused(place: str, files: dict[str, bytes], words: str) -> None:
    write(place, files)
    with pytest.raises(DataError, match=words) as caught:
        list(plan_shards(place))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["folder", "webdataset", "parquet", "embeddings"])
def test_a_format_that_is_not_there(place: str, form: str) -> None:
    write(place, NOTES)
    with pytest.raises(DataError, match=f"no images there in the format {form}"):
        list(plan_shards(place, form))


def test_wrong_arguments(place: str) -> None:
    write(place, IMAGES)
    with pytest.raises(ConfigError, match=r"images\.format = zip"):
        list(plan_shards(place, "zip"))
    with pytest.raises(ConfigError, match=r"images\.shard_size = 0"):
        list(plan_shards(place, shard_size=0))
    with pytest.raises(DataError, match=r"images\.labels = breed"):
        list(plan_shards(place, labels="breed"))
    with pytest.raises(DataError, match="in the 2 classes asked for"):
        list(plan_shards(place, classes=["n1", "n2"]))


def test_classes_from_a_file(place: str) -> None:
    write(place, {f"{name}/1.jpg": b"x" for name in ("n01440764", "n02102040", "n03000684")})
    write(place, {"list.txt": b"n02102040 English springer\nn03000684 chain saw\n"})
    (shard,) = plan_shards(place, classes=f"{place}/list.txt")
    assert [member.key for member in shard.members] == ["n02102040/1.jpg", "n03000684/1.jpg"]


def test_the_plan_is_the_same_wherever_the_input_lies(s3_bucket: str, tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": image(i) for c in ("b", "a-1", "a") for i in range(5)}
    plans = []
    for base in (f"{s3_bucket}/in", str(tmp_path)):
        shards = plan_shards(write(base, files), shard_size=4)
        plans.append([(s.index, s.first, s.count, s.name, [m.key for m in s.members]) for s in shards])
    assert plans[0] == plans[1]


def endless_listing(count: int):
    for i in range(count):
        yield FileStat(f"c{i // 1000:06d}/{i:09d}.jpg", f"s3://b/c{i // 1000:06d}/{i:09d}.jpg", 1, "stamp")


def test_shards_come_while_the_listing_goes_on() -> None:
    template = Shard(0, "", "s3://b", "", "")
    shards = folder.plan(endless_listing(10**12), template, 100)
    assert [shard.count for shard in itertools.islice(shards, 3)] == [100, 100, 100]


def test_memory_does_not_grow_with_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "walk", lambda _: endless_listing(30_000))
    tracemalloc.start()
    shards = plan_shards("s3://b", "folder", shard_size=500)
    peaks = [tracemalloc.get_traced_memory()[1] for shard in shards if shard.index in (5, 59)]
    tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_a_long_listing_is_not_read_to_its_end_to_know_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "walk", lambda _: endless_listing(10**12))
    assert detect_format("s3://b") == "folder"


def test_vectors_are_widths_apart_are_told(place: str) -> None:
    write(place, {"a.npy": npy(vectors(3, 4)), "b.npy": npy(vectors(3, 5)), "c.npy": npy(np.zeros((0, 4)))})
    assert [shard.count for shard in plan_shards(place)] == [3, 3]
