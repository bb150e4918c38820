from __future__ import annotations

import itertools
import os
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rayclust.errors import DataError
from rayclust.store import storage
from rayclust.store.sources import Shard, fetch_many, folder, plan, plan_shards, read_records, read_rows
from rayclust.store.sources.plan import detect_format, read_classes
from rayclust.store.storage import FileStat
from tests.store.inputs import gz, image, npy, parquet, samples, tar, vectors, write

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
        (OTHER, "neither a column of images nor one of embeddings.*caption"),
        ({"a.parquet": b"x", "b.parquet": b""}, "cannot be read as Parquet"),
        ({"data-00000-of-00001.arrow": b"x", "info.json": b"{}"}, r"data-0.*arrow: .*write them as Parquet"),
        ({"x/photos.zip": b"x", "b.csv": b""}, r"b.csv: lists of images are not followed"),
        ({"a.npz": b"x"}, r"a.npz: write the array .* as .npy"),
    ],
    ids=["mixed", "neither", "damaged", "arrow", "list", "npz"],
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
    monkeypatch.setattr(storage, "walk", lambda _: endless_listing(30_000))
    tracemalloc.start()
    shards = plan_shards("s3://b", "folder", shard_size=500)
    peaks = [tracemalloc.get_traced_memory()[1] for shard in shards if shard.index in (5, 59)]
    tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_a_long_listing_is_not_read_to_its_end_to_know_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "walk", lambda _: endless_listing(10**12))
    assert detect_format("s3://b") == "folder"


def test_vectors_are_widths_apart_are_told(place: str) -> None:
    write(place, {"a.npy": npy(vectors(3, 4)), "b.npy": npy(vectors(2, 5)), "c.npy": npy(np.zeros((0, 4)))})
    assert [shard.count for shard in plan_shards(place)] == [3, 2]


def test_classes_without_an_image_are_named(place: str, caplog: pytest.LogCaptureFixture) -> None:
    write(place, {"cat/1.jpg": image(), "dog/images/2.jpg": image()})
    assert len(list(plan_shards(place, classes=["cat", "dog"]))) == 1
    assert "no image of" not in caplog.text
    assert len(list(plan_shards(place, classes=["cat", "dgo"]))) == 1
    assert "no image of 1 of 2 classes, such as dgo" in caplog.text


def test_read_classes(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# a comment\nn01440764 tench, Tinca tinca\n\nn02102040\ngarbage truck\n")
    assert read_classes(str(tmp_path / "list.txt")) == {"n01440764", "n02102040", "garbage truck"}
    assert read_classes(["a", "b", "a"]) == {"a", "b"}
    assert read_classes(None) is None


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\n \n"])
def test_a_list_without_classes_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match="names no class"):
        read_classes(str(tmp_path / "list.txt"))
    with pytest.raises(DataError):
        read_classes([])


def test_images_and_rows_are_not_mixed_up(place: str) -> None:
    write(place, {"i/a.png": image(), "v/x.npy": npy(vectors(2))})
    (images,) = plan_shards(f"{place}/i")
    (rows,) = plan_shards(f"{place}/v")
    assert (images.has_embeddings, rows.has_embeddings) == (False, True)
    with pytest.raises(DataError, match="ready embeddings"):
        list(read_records(rows))
    with pytest.raises(DataError, match="holds images"):
        read_rows(images)


@pytest.mark.parametrize("form", ["folder", "webdataset", "parquet"])
def test_the_same_images_in_every_format(place: str, form: str) -> None:
    images = {f"n{i % 2}/{i}.png": image(i) for i in range(6)}
    table = parquet({"image": list(images.values()), "path": list(images)})
    files = {"folder": images, "webdataset": {"x.tar": tar(list(images.items()))}, "parquet": {"x.parquet": table}}
    write(place, files[form])
    (shard,) = plan_shards(place, labels="folder")
    found = list(read_records(Shard.from_json(asdict(shard))))
    assert [record.data for record in found] == [images[key] for key in sorted(images)]
    assert [record.label for record in found] == ["n0"] * 3 + ["n1"] * 3
    (shard,) = plan_shards(place, classes=["n1"], labels="none")
    kept = list(read_records(shard))
    assert [record.data for record in kept] == [image(i) for i in (1, 3, 5)]
    assert {record.label for record in kept} == {None}


def test_reading_stops_where_the_reader_does(place: str) -> None:
    write(place, {f"{i}.png": image(i) for i in range(100)})
    (shard,) = plan_shards(place)
    records = read_records(shard)
    assert next(iter(records)).key == "0.png"
    records.close()  # type: ignore[attr-defined]


FETCHED = {
    "folder": {"a#1/b%20 c.png": image(1), "x.tar#2.png": image(2)},
    "tar": {"d.v1/x.tar": tar([*samples(3), ("a#b.png", image(9))]), "y.tgz": gz(tar(samples(2)))},
    "parquet": {
        "x.parquet": parquet({"image": [image(i) for i in range(5)]}, groups=2),
        "y.parquet": parquet({"image": [{"bytes": image(7), "path": "p"}]}),
    },
}


@pytest.mark.parametrize("kind", FETCHED)
def test_every_record_is_found_again_by_its_uri(place: str, kind: str) -> None:
    write(place, FETCHED[kind])
    found = {r.uri: r.data for shard in plan_shards(place) for r in read_records(shard)}
    assert len(found) >= 2
    assert all(dict(fetch_many([uri])) == {uri: data} for uri, data in found.items())
    assert dict(fetch_many([*found, *found])) == found


def test_what_is_not_there(place: str) -> None:
    write(place, FETCHED["tar"] | FETCHED["parquet"] | {"e.npy": npy(vectors(2)), "bad.parquet": b"x"})
    missing = ["none.png", "d.v1/x.tar#none.png", "none.tar#a.png", "x.parquet#99", "x.parquet#x", "e.npy#0"]
    missing += ["bad.parquet#0", "d.v1/x.tar#", "x.parquet#-1"]
    uris = [storage.join(place, name) for name in missing]
    assert dict(fetch_many(uris)) == dict.fromkeys(uris)


def test_each_file_is_opened_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, FETCHED["tar"])
    uris = [r.uri for shard in plan_shards(place) for r in read_records(shard)]
    opened = []
    open_input = storage.open_input
    monkeypatch.setattr(storage, "open_input", lambda uri, **how: (opened.append(uri), open_input(uri, **how))[1])
    assert all(data is not None for _, data in fetch_many(reversed(uris)))
    assert len(opened) == 2


def test_names_of_no_known_kind_do_not_count_when_the_format_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_SAMPLE", 3)
    write(str(tmp_path), {f"Annotations/{i}.xml": b"" for i in range(9)} | {"JPEGImages/0.jpg": image()})
    assert detect_format(str(tmp_path)) == "folder"
    assert len(list(plan_shards(str(tmp_path)))) == 1


@pytest.mark.parametrize("name", ["x.pq", "x.arrow", "x", "x.parq"])
def test_a_table_that_is_named_is_read_whatever_it_is_called(place: str, name: str) -> None:
    write(place, {name: parquet({"image": [image(), image(1)]})})
    found = [record for shard in plan_shards(f"{place}/{name}", "parquet") for record in read_records(shard)]
    assert [record.key for record in found] == [
        f"{name.removesuffix('.pq').removesuffix('.parq')}/0000000{i}" for i in (0, 1)
    ]
    assert dict(fetch_many([record.uri for record in found])) == {record.uri: record.data for record in found}


def test_columns_are_named_where_they_are_called_otherwise(place: str) -> None:
    data = {"blob_a": [image()], "blob_b": [image(1)], "v": [[1]], "w": [[2.0, 3.0]], "n": ["k"], "breed": ["cat"]}
    write(place, {"x.parquet": parquet(data)})
    (shard,) = plan_shards(place, columns={"image": "blob_b", "key": "n", "label": "breed"})
    (record,) = read_records(shard)
    assert (record.key, record.data, record.label) == ("k", image(1), "cat")
    assert dict(fetch_many([record.uri], {"image": "blob_b"})) == {record.uri: image(1)}
    (shard,) = plan_shards(place, columns={"embedding": "v"})
    assert read_rows(shard).embeddings.tolist() == [[1]]
    with pytest.raises(DataError, match=r"images\.columns\.image = other: .* has no such column of bytes; it has the"):
        list(plan_shards(place, columns={"image": "other"}))


def test_files_whose_names_differ_in_the_ending_alone_have_keys_of_their_own(place: str) -> None:
    data = tar([("a.png", image())])
    write(place, {"x.tar": data, "x.tgz": gz(data), "y.tar": data})
    assert [r.key for shard in plan_shards(place) for r in read_records(shard)] == ["x/a", "x.tgz/a", "y/a"]
    write(place, {"v/x.npy": npy(vectors(1)), "v/x.parquet": parquet({"embedding": vectors(1).tolist()})})
    keys = [key for shard in plan_shards(f"{place}/v") for key in read_rows(shard).keys]
    assert keys == ["x/00000000", "x.parquet/00000000"]


def test_a_folder_whose_own_name_is_no_utf8(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/f\xf6to")
    write(folder, {"a.jpg": image()})
    for uri in (folder, storage.absolute(folder)):
        (shard,) = plan_shards(uri)
        shard.uri.encode()
        assert [record.data for record in read_records(shard)] == [image()]


def test_what_is_left_out_is_counted(place: str, caplog: pytest.LogCaptureFixture) -> None:
    write(place, TAR | {"notes.txt": b"", "y.tar.part": b""})
    with caplog.at_level("INFO"):
        assert [len(list(plan_shards(place))) for _ in range(2)] == [1, 1]
    assert caplog.text.count("files left out that are no tars by name: 2, such as notes.txt") == 1


def test_labels_that_are_read_are_not_said_to_be_left_out(place: str, caplog: pytest.LogCaptureFixture) -> None:
    write(place, {"x.npy": npy(vectors(5)), "x_labels.npy": npy(np.arange(5))})
    with caplog.at_level("INFO"):
        assert len(list(plan_shards(place))) == 1
    assert "left out" not in caplog.text


def test_raw_files_of_cameras_are_rejects(place: str) -> None:
    write(place, {"a.jpg": image(), "b.CR2": b"II*\0", "c.tar": b""})
    found = [(r.key, r.reason) for shard in plan_shards(place, "folder") for r in read_records(shard)]
    assert found == [("a.jpg", None), ("b.CR2", "unsupported")]


PICTURES = [image(number) + bytes(200) for number in range(20)]
LOST = {
    "tar": ({f"{i}.tar": tar([(f"{j}.png", image(j)) for j in range(20)]) for i in range(2)}, "webdataset"),
    "table": (
        {f"{i}.parquet": parquet({"image": PICTURES}) for i in range(2)},
        "parquet",
    ),
    "vectors": ({f"{i}.parquet": parquet({"embedding": vectors(20, 200).tolist()}) for i in range(2)}, "embeddings"),
    "array": ({f"{i}.npy": npy(vectors(20, 200)) for i in range(2)}, "embeddings"),
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.mark.parametrize("content", [POINTER, b"", b"<html>"])
@pytest.mark.parametrize("kind", LOST)
def test_a_lost_file_weighs_what_those_beside_it_hold(place: str, kind: str, content: bytes) -> None:
    files, form = LOST[kind]
    write(place, files | {f"{i + 3}{Path(name).suffix}": content for name in list(files)[:1] for i in range(3)})
    rejects = []
    for shard in plan_shards(place, form):
        if shard.has_embeddings:
            rejects += [reject["key"] for reject in read_rows(shard).rejects]
        else:
            rejects += [record.key for record in read_records(shard) if record.reason]
    assert len(rejects) == len(set(rejects)) == 60


def test_a_small_tar_without_its_end_mark_has_lost_nothing(place: str) -> None:
    files, _ = LOST["tar"]
    write(place, files | {"z.tar": tar([("a.png", image())])[: -10_240 + 1024 + len(image()) // 512 * 512]})
    rejects = [r for shard in plan_shards(place) for r in read_records(shard) if r.reason]
    assert len(rejects) <= 1


@pytest.mark.parametrize("form", ["parquet", "embeddings"])
def test_an_arrow_table_is_refused_by_its_name_whatever_format_is_said(place: str, form: str) -> None:
    write(place, {"x.feather": b"ARROW1"})
    with pytest.raises(DataError, match=r"x\.feather: Arrow tables are not read; write them as Parquet"):
        list(plan_shards(f"{place}/x.feather", form))
