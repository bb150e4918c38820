"""Bad tar shards."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

import numpy as np

from tests.store.bad_inputs import BadInput
from tests.store.inputs import entry, gz, image, special_tar, tar

Members = list[tuple[str, bytes]]


def picture(number: int) -> bytes:
    """A picture of exactly one block, so that places in an archive are easy to name."""
    return image(number).ljust(512, b"\0")


def four() -> bytes:
    """Samples 0 to 3 of an image and a class each: sample i begins at byte 2048 i, its class at 2048 i + 1024."""
    members: Members = []
    for i in range(4):
        members += [(f"{i}.png", picture(i)), (f"{i}.cls", b"7")]
    return tar(members)


def keys(*numbers: int) -> tuple[str, ...]:
    return tuple(f"x/{number}" for number in numbers)


def cases() -> Iterator[BadInput]:
    yield from _cut()
    yield from _damaged()
    yield from _not_tars()
    yield from _odd_samples()
    yield from _odd_members()
    yield from _compressed()


def _cut() -> Iterator[BadInput]:
    for cut in (
        1,
        511,
        512,
        700,
        1023,
        1024,
        1025,
        1536,
        2047,
        2048,
        2400,
        3071,
        3072,
        4096,
        5120,
        6143,
        7168,
        7680,
        8192,
    ):
        whole = keys(*range(sum(cut >= 2048 * i + 1024 for i in range(4))))
        files = {"x.tar": four()[:cut], "y.tar": tar([("good.png", picture(9))])}
        yield BadInput(f"tar/cut_{cut:04d}", lambda files=files: files, (*whole, "y/good"), (("x", "tar_truncated"),))


def _damaged() -> Iterator[BadInput]:
    def flipped(at: int) -> dict[str, bytes]:
        data = bytearray(four())
        data[at] ^= 0xFF
        return {"x.tar": bytes(data)}

    def sized(size: int) -> dict[str, bytes]:
        info = tarfile.TarInfo("1.png")
        info.size = size
        data = bytearray(four())
        data[2048:2560] = info.tobuf(tarfile.GNU_FORMAT)
        return {"x.tar": bytes(data)}

    bad = (("x", "bad_header"),)
    yield BadInput("tar/first_header", lambda: flipped(3), keys(1, 2, 3), (*bad, ("x/0", "no_image")))
    yield BadInput("tar/middle_header", lambda: flipped(4096 + 100), keys(0, 1, 3), (*bad, ("x/2", "no_image")))
    yield BadInput("tar/checksum_field", lambda: flipped(2048 + 150), keys(0, 2, 3), (*bad, ("x/1", "no_image")))
    yield BadInput("tar/header_of_a_class", lambda: flipped(1024 + 3), keys(0, 1, 2, 3), bad)
    yield BadInput("tar/absurd_size", lambda: sized(1 << 62), keys(0, 2, 3), (*bad, ("x/1", "no_image")))
    yield BadInput("tar/size_beyond_the_end", lambda: sized(1 << 20), keys(0, 2, 3), (*bad, ("x/1", "no_image")))


def _not_tars() -> Iterator[BadInput]:
    def beside(data: bytes) -> dict[str, bytes]:
        return {"x.tar": data, "y.tar": tar([("good.png", picture(9))])}

    noise = np.random.default_rng(0).bytes(5000)
    for name, data, reason in [
        ("empty_file", b"", "empty"),
        ("a_page", b"<html>404 not found</html>" * 99, "unreadable_file"),
        ("an_image", image().ljust(2000, b"\1"), "unreadable_file"),
        ("noise", noise, "unreadable_file"),
        ("a_few_bytes", b"PK\3\4", "tar_truncated"),
    ]:
        yield BadInput(f"tar/{name}", lambda data=data: beside(data), ("y/good",), (("x", reason),))
    yield BadInput("tar/no_members", lambda: beside(tar([])), ("y/good",))
    yield BadInput("tar/zeros", lambda: beside(bytes(10240)), ("y/good",))


def _odd_samples() -> Iterator[BadInput]:
    def case(name: str, members: Members, rows: tuple[str, ...], *rejects: tuple[str, str], **more: object) -> BadInput:
        return BadInput(f"tar/{name}", lambda: {"x.tar": tar(members)}, rows, rejects, **more)  # type: ignore[arg-type]

    a, b = ("a.png", picture(1)), ("b.png", picture(2))
    yield case("key_not_contiguous", [a, b, ("a.cls", b"1"), ("b.json", b"{}")], ("x/a", "x/b"))
    yield case("same_name_twice", [a, b, ("a.png", picture(3))], ("x/a", "x/b"), ("x/a", "duplicate_key"))
    yield case("two_images_of_a_key", [("a.webp", picture(3)), a, b], ("x/a", "x/b"), ("x/a", "duplicate_key"))
    yield case(
        "dotted_name_twice",
        [("a.1.png", b"x"), ("a.1.png", b"x")],
        ("x/a.1",),
        ("x/a.1", "duplicate_key"),
        undecodable=("x/a.1",),
    )
    for suffix in ("json", "txt", "cls"):
        yield case(f"{suffix}_without_image", [a, (f"b.{suffix}", b"1")], ("x/a",), ("x/b", "no_image"))
    for suffix in ("tar", "TAR.gz", "zip"):
        inner = (f"x/b.{suffix.lower()}", "nested_archive")
        yield case(f"{suffix.lower()}_inside", [a, (f"b.{suffix}", b"1")], ("x/a",), inner)
    for name, content in [
        ("damaged", b'{"label": '), ("empty", b""), ("binary", b"\xff\xfe\0"), ("list", b"[1, 2]"),
        ("deep", b"[" * 5000),
        ("label_list", b'{"label": [1]}'), ("label_object", b'{"label": {"a": 1}}'), ("label_nan", b'{"label": NaN}'),
    ]:  # fmt: skip
        yield case(f"json_{name}", [a, ("a.json", content), b], ("x/a", "x/b"))
    yield case("class_binary", [a, ("a.cls", b"\xff\0")], ("x/a",))
    yield case("empty_image", [("a.png", b""), b], ("x/a", "x/b"), undecodable=("x/a",))
    yield case("text_as_image", [("a.png", b"no image"), b], ("x/a", "x/b"), undecodable=("x/a",))
    yield case("other_members_only", [b, ("readme.md", b"x"), ("Makefile", b"x"), ("a.npy", b"x")], ("x/b",))


def _odd_members() -> Iterator[BadInput]:
    good = ("good.png", picture(9))

    def named(name: str) -> dict[str, bytes]:
        return {"x.tar": tar([(name, picture(1)), good], tarfile.PAX_FORMAT)}

    for name, member, key in [
        ("absolute_name", "/etc/a.png", "x//etc/a"), ("parent_name", "../../a.png", "x/../../a"),
        ("dot_name", "./a.png", "x/a"), ("inner_parent_name", "d/../a.png", "x/d/../a"),
        ("hash_in_name", "a#b.png", "x/a#b"), ("space_in_name", "a b\n.png", "x/a b\n"),
        ("long_name", "d/" * 200 + "a.png", "x/" + "d/" * 200 + "a"),
        ("unicode_name", "ü日\U0001f600.png", "x/ü日\U0001f600"),
    ]:  # fmt: skip
        rows = tuple(sorted([key, "x/good"]))
        yield BadInput(f"tar/{name}", lambda member=member: named(member), rows)
    raw = tar([("a\u00e9.png", picture(1)), good]).replace("a\u00e9.png".encode(), b"a\xff.png\0", 1)
    yield BadInput("tar/name_not_utf8", lambda: {"x.tar": _resummed(raw)}, ("x/a\\xff", "x/good"))
    for name in (".DS_Store", "._a.png", "__MACOSX/a.png", "dir/.hidden.png"):
        yield BadInput(f"tar/hidden_{name.strip('._').replace('/', '_')}", lambda name=name: named(name), ("x/good",))
    kinds = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "pipe": tarfile.FIFOTYPE,
    }
    for name, kind in {**kinds, "folder": tarfile.DIRTYPE}.items():
        link = entry("a.png", kind, "/etc/passwd" if name.endswith("link") else "")
        yield BadInput(f"tar/{name}", lambda link=link: {"x.tar": special_tar([link], [good])}, ("x/good",))


def _resummed(data: bytes) -> bytes:
    """Mends the checksum of the first header."""
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data[512:]


def _compressed() -> Iterator[BadInput]:
    whole = gz(tar([("a.png", picture(1)), ("b.png", np.random.default_rng(0).bytes(300_000))]))
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    cut = (("x", "tar_truncated"),)
    yield BadInput("targz/cut", lambda: {"x.tar.gz": whole[: len(whole) // 2]}, ("x/a",), cut)
    yield BadInput(
        "targz/header_only",
        lambda: {"x.tgz": whole[:12], "y.tar": four()},
        tuple(f"y/{i}" for i in range(4)),
        (("x", "tar_truncated"),),
    )
    yield BadInput("targz/not_compressed", lambda: {"x.tar.gz": tar([("a.png", picture(1))])}, ("x/a",))
    yield BadInput(
        "targz/no_archive_inside",
        lambda: {"x.tgz": gz(b"text" * 999), "y.tar": four()},
        tuple(f"y/{i}" for i in range(4)),
        (("x", "unreadable_file"),),
    )
