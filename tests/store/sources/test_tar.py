from __future__ import annotations

import gzip
import io
import tarfile

import pytest

from rayclust.store.sources import tar
from rayclust.store.sources.tar import Damage, TarMember, members
from tests.store.inputs import entry, gz, special_tar
from tests.store.inputs import tar as make

FILES = [("a.jpg", b"a" * 700), ("dir/b.jpg", b"b" * 512), ("c.cls", b"")]


def contents(data: bytes) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Names with content, and reasons of damages."""
    found = list(members(io.BytesIO(data)))
    files = [(m.name, data[m.offset : m.offset + m.size]) for m in found if isinstance(m, TarMember)]
    return files, [m.reason for m in found if isinstance(m, Damage)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_reader(form: int) -> None:
    names = ["a.jpg", "deep/" * 12 + "b.jpg", "ü ñ/日本.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names.append("long/" * 60 + "c" * 80 + ".jpg")
    data = make([(name, name.encode() * 99) for name in names], form)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    assert contents(data) == (expected, [])


def test_links_devices_and_folders_are_no_members() -> None:
    kinds = [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "a.jpg"), (tarfile.DIRTYPE, ""), (tarfile.CHRTYPE, "")]
    kinds += [(tarfile.FIFOTYPE, ""), (tarfile.BLKTYPE, "")]
    infos = [entry(f"x{i}.jpg", kind, link) for i, (kind, link) in enumerate(kinds)]
    assert contents(special_tar(infos, FILES)) == (FILES, [])


def test_an_archive_cut_anywhere_keeps_its_whole_members() -> None:
    data = make(FILES)
    ends = [512 + 1024, 512 + 1024 + 512 + 512, 512 + 1024 + 512 + 512 + 512]
    starts_of_padding = [512 + 700, ends[1], ends[2]]
    for cut in range(1, ends[2], 77):
        files, damages = contents(data[:cut])
        whole = sum(cut >= end for end in starts_of_padding)
        assert files == FILES[:whole], cut
        assert damages == ["tar_truncated"], cut


def test_an_archive_without_its_end_mark_is_said_to_be_cut() -> None:
    end = 512 + 1024 + 512 + 512 + 512
    assert contents(make(FILES)[:end]) == (FILES, ["tar_truncated"])
    assert contents(make(FILES)[: end + 512]) == (FILES, [])


def test_after_a_damaged_header_reading_goes_on() -> None:
    for first, lost in ((0, 0), (1536, 1)):
        data = bytearray(make(FILES))
        data[first + 10] ^= 0xFF
        assert contents(bytes(data)) == (FILES[:lost] + FILES[lost + 1 :], ["bad_header"])


def test_an_absurd_size_costs_one_member() -> None:
    data = bytearray(make(FILES))
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 60
    data[:512] = info.tobuf(tarfile.GNU_FORMAT)
    assert contents(bytes(data)) == (FILES[1:], ["bad_header"])


def test_archives_one_after_the_other_and_garbage_behind_the_end() -> None:
    assert contents(make(FILES[:1]) + make(FILES[1:])) == (FILES, [])
    assert contents(make(FILES) + b"garbage" * 200) == (FILES, [])


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
    assert contents(make([])) == ([], [])


@pytest.mark.parametrize(
    "records", [b"x", b"9999999 path=a\n", b"12 path=\xff.jpg\n", b"5 a=\n" * 3, b"-1 a=b\n", b" "]
)
def test_a_damaged_extended_header_does_not_stop_the_reader(records: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + make(FILES)
    files, damages = contents(data)
    assert [content for _, content in files] == [content for _, content in FILES]
    assert damages == []
    for name, _ in files:
        name.encode()


def test_compressed_archives_are_unpacked() -> None:
    data = make(FILES)
    plain, damage = tar.unpacked(io.BytesIO(gz(data)))
    with plain:
        assert damage is None
        assert plain.seek(0, 2) == len(data)
    archive = io.BytesIO(data)
    assert tar.unpacked(archive) == (archive, None)


def test_a_cut_compressed_archive_keeps_what_can_be_unpacked() -> None:
    packed = gzip.compress(make(FILES), compresslevel=0, mtime=0)
    plain, damage = tar.unpacked(io.BytesIO(packed[: len(packed) // 2]))
    with plain:
        assert damage is not None
        assert damage.reason == "tar_truncated"
        assert plain.seek(0, 2) > 512


def test_a_decompression_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_UNPACK_FLOOR", 1 << 20)
    plain, damage = tar.unpacked(io.BytesIO(gz(bytes(40 << 20))))
    with plain:
        assert damage is not None
        assert damage.reason == "too_large"
        assert plain.seek(0, 2) <= 11 << 20
