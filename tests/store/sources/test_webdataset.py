from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from typing import Any

import pytest

from rayclust.store import storage
from rayclust.store.sources import Record, plan_shards, read_records, webdataset
from rayclust.store.sources.webdataset import Damage, TarMember, decompress, scan_tar
from tests.store.inputs import entry, gz, image, special_tar, tar, write

FILES = [("a.jpg", b"a" * 700), ("dir/b.jpg", b"b" * 512), ("c.cls", b"")]


def records(place: str, members: list[tuple[str, bytes]], **settings: Any) -> list[Record]:
    write(place, {"x.tar": tar(members)})
    (shard,) = plan_shards(place, **settings)
    return list(read_records(shard))


def reasons(found: list[Record]) -> list[tuple[str, str | None]]:
    return [(record.key, record.reason) for record in found]


def test_samples_come_in_order_of_key_with_their_labels(place: str) -> None:
    members = [
        ("b.cls", b"1"), ("sub/a.jpeg", image(1)), ("b.JPG", image(2)), ("sub/a.json", b'{"label": "cat"}'),
        ("c.webp", image(3)), ("c.txt", b"a caption"), ("readme.md", b"x"),
    ]  # fmt: skip
    found = records(place, members)
    assert [(record.key, record.label) for record in found] == [("x/b", "1"), ("x/c", None), ("x/sub/a", "cat")]
    assert [record.data for record in found] == [image(2), image(3), image(1)]
    assert found[0].uri == f"{place}/x.tar#b.JPG"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("auto", "cls"), ("cls", "cls"), ("txt", "txt"), ("json", "json"), ("breed", "pug"), ("deep.er", "yes"),
        ("none", None), ("folder", "dir"), ("nothing", None),
    ],
)  # fmt: skip
def test_labels_come_from_where_they_are_asked_for(place: str, labels: str, expected: str | None) -> None:
    content = b'{"label": "json", "breed": "pug", "deep": {"er": "yes"}}'
    members = [("dir/a.png", image()), ("dir/a.cls", b"cls"), ("dir/a.txt", b"txt"), ("dir/a.json", content)]
    (record,) = records(place, members, labels=labels)
    assert record.label == expected


def test_images_with_dots_in_their_suffix(place: str) -> None:
    masks = [("a.jpg", image(1)), ("a.mask.png", image(2))]
    assert reasons(records(place, masks)) == [("x/a", None)]
    scans = [("s.v1.jpg", image(1)), ("s.v2.jpg", image(2)), ("t.v1.jpg", image(3))]
    assert reasons(records(place, scans)) == [("x/s.v1", None), ("x/s.v2", None), ("x/t", None)]


def test_classes_are_picked_by_label_even_when_labels_are_not_kept(place: str) -> None:
    members = [
        (f"{i}.{suffix}", data) for i in range(4) for suffix, data in (("png", image(i)), ("cls", b"%d" % (i % 2)))
    ]
    found = records(place, members, classes=["1"], labels="none")
    assert [(record.key, record.label) for record in found] == [("x/1", None), ("x/3", None)]


def test_large_members_are_rejected_unread(place: str) -> None:
    write(place, {"x.tar": tar([("a.png", image()), ("b.png", bytes(3000))])})
    (shard,) = plan_shards(place)
    assert reasons(list(read_records(shard, max_bytes=2000))) == [("x/a", None), ("x/b", "too_large")]


def test_a_gzipped_archive_whatever_its_name(place: str) -> None:
    data = gz(tar([("a.png", image())]))
    write(place, {"1.tar.gz": data, "2.tgz": data, "3.tar": data})
    shards = list(plan_shards(place))
    assert [shard.name for shard in shards] == ["1", "2", "3"]
    assert [record.key for shard in shards for record in read_records(shard)] == ["1/a", "2/a", "3/a"]


def test_a_file_that_is_gone_is_one_reject(place: str) -> None:
    write(place, {"x.tar": tar([])})
    (shard,) = plan_shards(place, "webdataset")
    storage.remove(shard.uri)
    assert reasons(list(read_records(shard))) == [("x", "unreadable_file")]


@pytest.mark.parametrize(
    ("text", "field", "label"),
    [
        (b'{"label": "cat"}', None, "cat"), (b'{"x": 1, "cls": 2}', None, "2"), (b'{"Label": "cat"}', None, "cat"),
        (b'{"class": "b", "label": "a"}', None, "a"), (b'{"label": [1, 2]}', None, None), (b'{"a": 1}', None, None),
        (b'{"meta": {"breed": "pug"}}', "meta.breed", "pug"), (b'{"meta": 3}', "meta.breed", None),
        (b"7", None, "7"), (b"[]", None, None), (b"{", None, None), (b"", None, None), (b"\xff\xfe", None, None),
        (b"[" * 100_000, None, None), (b'{"label": "\\ud800"}', None, "\\ud800"), (b'{"label": null}', None, None),
    ],
)  # fmt: skip
def test_labels_in_json(text: bytes, field: str | None, label: str | None, place: str) -> None:
    (found,) = records(place, [("a.jpg", b"a"), ("a.json", text)], labels=field or "auto")
    assert (found.key, found.label) == ("x/a", label)


def contents(data: bytes) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Names with content, and reasons of damages."""
    found = list(scan_tar(io.BytesIO(data)))
    files = [(m.name, data[m.offset : m.offset + m.size]) for m in found if isinstance(m, TarMember)]
    return files, [m.reason for m in found if isinstance(m, Damage)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_reader(form: int) -> None:
    names = ["a.jpg", "deep/" * 12 + "b.jpg", "ü ñ/日本.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names.append("long/" * 60 + "c" * 80 + ".jpg")
    data = tar([(name, name.encode() * 99) for name in names], form)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    assert contents(data) == (expected, [])


def test_links_devices_and_folders_are_no_members() -> None:
    kinds = [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "a.jpg"), (tarfile.DIRTYPE, ""), (tarfile.CHRTYPE, "")]
    kinds += [(tarfile.FIFOTYPE, ""), (tarfile.BLKTYPE, "")]
    infos = [entry(f"x{i}.jpg", kind, link) for i, (kind, link) in enumerate(kinds)]
    assert contents(special_tar(infos, FILES)) == (FILES, [])


def test_an_archive_cut_anywhere_keeps_its_whole_members() -> None:
    data = tar(FILES)
    ends = [512 + 1024, 512 + 1024 + 512 + 512, 512 + 1024 + 512 + 512 + 512]
    starts_of_padding = [512 + 700, ends[1], ends[2]]
    for cut in range(1, ends[2], 77):
        files, damages = contents(data[:cut])
        whole = sum(cut >= end for end in starts_of_padding)
        assert files == FILES[:whole], cut
        assert damages == ["tar_truncated"], cut


def test_an_archive_without_its_end_mark_is_said_to_be_cut() -> None:
    end = 512 + 1024 + 512 + 512 + 512
    assert contents(tar(FILES)[:end]) == (FILES, ["tar_truncated"])
    assert contents(tar(FILES)[: end + 512]) == (FILES, [])


def test_after_a_damaged_header_reading_goes_on() -> None:
    for first, lost in ((0, 0), (1536, 1)):
        data = bytearray(tar(FILES))
        data[first + 10] ^= 0xFF
        assert contents(bytes(data)) == (FILES[:lost] + FILES[lost + 1 :], ["bad_header"])


def test_an_absurd_size_costs_one_member() -> None:
    data = bytearray(tar(FILES))
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 60
    data[:512] = info.tobuf(tarfile.GNU_FORMAT)
    assert contents(bytes(data)) == (FILES[1:], ["bad_header"])


def test_archives_one_after_the_other_and_garbage_behind_the_end() -> None:
    assert contents(tar(FILES[:1]) + tar(FILES[1:])) == (FILES, [])
    assert contents(tar(FILES) + b"garbage" * 200) == (FILES, [])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>" * 60, "unreadable_file"),
        (b"x", "tar_truncated"),
        (b"\x89PNG\r\n" + bytes(range(256)) * 8, "unreadable_file"),
    ],
)
def test_what_is_no_archive(data: bytes, reason: str) -> None:
    assert contents(data) == ([], [reason])


def test_an_empty_archive_is_whole() -> None:
    assert contents(tar([])) == ([], [])


@pytest.mark.parametrize(
    "records", [b"x", b"9999999 path=a\n", b"12 path=\xff.jpg\n", b"5 a=\n" * 3, b"-1 a=b\n", b" "]
)
def test_a_damaged_extended_header_does_not_stop_the_reader(records: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + tar(FILES)
    files, damages = contents(data)
    assert [content for _, content in files] == [content for _, content in FILES]
    assert damages == []
    for name, _ in files:
        name.encode()


def test_compressed_archives_are_unpacked() -> None:
    data = tar(FILES)
    plain, damage = decompress(io.BytesIO(gz(data)))
    with plain:
        assert damage is None
        assert plain.seek(0, 2) == len(data)
    archive = io.BytesIO(data)
    assert decompress(archive) == (archive, None)


def test_a_cut_compressed_archive_keeps_what_can_be_unpacked() -> None:
    packed = gzip.compress(tar(FILES), compresslevel=0, mtime=0)
    plain, damage = decompress(io.BytesIO(packed[: len(packed) // 2]))
    with plain:
        assert damage is not None
        assert damage.reason == "tar_truncated"
        assert plain.seek(0, 2) > 512


def test_a_decompression_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_UNPACK_FLOOR", 1 << 20)
    plain, damage = decompress(io.BytesIO(gz(bytes(40 << 20))))
    with plain:
        assert damage is not None
        assert damage.reason == "too_large"
        assert plain.seek(0, 2) <= 11 << 20


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".tar.bz2", bz2.compress), (".tar.xz", lzma.compress), (".txz", lzma.compress)]
)
def test_tars_of_other_compressions(place: str, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    data = tar([(f"{i}.png", image(i)) for i in range(9)])
    write(place, {f"x{suffix}": compress(data[:1024]) + compress(data[1024:]), "y.tar": compress(data)})
    found = [record for shard in plan_shards(place) for record in read_records(shard)]
    assert [record.key for record in found] == [f"{name}/{i}" for name in "xy" for i in range(9)]
    whole = compress(data)
    write(place, {f"x{suffix}": whole[: len(whole) // 2], "y.tar": data})
    found = [record for shard in plan_shards(place) for record in read_records(shard)]
    assert {record.reason for record in found if record.key.startswith("x") and record.data is None} == {
        "tar_truncated"
    }


def test_tars_of_compressions_that_are_not_read_are_rejects(place: str) -> None:
    write(place, {"x.tar.zst": b"\x28\xb5\x2f\xfd" + bytes(99), "y.tar.lz4": b"\x04\x22\x4d\x18" + bytes(99)})
    found = [record for shard in plan_shards(place) for record in read_records(shard)]
    assert [(record.key, record.reason) for record in found] == [("x", "unsupported"), ("y", "unsupported")]
    assert "compressed with zstd" in found[0].detail


def test_labels_of_tars_in_folders_of_classes(place: str) -> None:
    write(
        place,
        {"cat/0.tar": tar([("a.png", image())]), "dog/0.tar": tar([("b/images/a.png", image()), ("c.png", image())])},
    )
    found = {r.key: r.label for shard in plan_shards(place, labels="folder") for r in read_records(shard)}
    assert found == {"cat/0/a": "cat", "dog/0/b/images/a": "b", "dog/0/c": "dog"}
