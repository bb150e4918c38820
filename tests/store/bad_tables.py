"""Bad Parquet files of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tests.store.bad_inputs import BadInput
from tests.store.inputs import image, parquet

IMAGES = [image(i) for i in range(3)]


def rows(name: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{name}/{number:08d}" for number in numbers)


def cases() -> Iterator[BadInput]:
    yield from _columns()
    yield from _values()
    yield from _damaged()
    yield from _labels()
    yield from _keys()


def _columns() -> Iterator[BadInput]:
    for name, columns, error in [
        ("no_image", {"text": ["a"], "label": [1]}, r"text \(string\), label \(int64\)"),
        ("paths_only", {"image": ["a.jpg"]}, r"image \(string\)"),
        ("lists_of_bytes", {"image": pa.array([[1, 2]], pa.list_(pa.uint8()))}, "image"),
        ("two_nameless", {"a": [b"x"], "b": [b"y"]}, r"a \(binary\), b \(binary\)"),
        ("struct_of_paths", {"image": [{"path": "a.jpg"}]}, "struct"),
        ("numbers", {"image": [1.5]}, r"image \(double\)"),
    ]:
        yield BadInput(f"table/columns_{name}", lambda columns=columns: {"x.parquet": parquet(columns)}, error=error)
    yield BadInput("table/no_columns", lambda: {"x.parquet": parquet({})}, error="no columns")
    both = {"a.parquet": parquet({"image": IMAGES}), "b.parquet": parquet({"text": ["x"]})}
    yield BadInput("table/one_without_images", lambda: both, error=r"b\.parquet: no column holds images")
    yield BadInput(
        "table/labels_column_missing",
        lambda: {"x.parquet": parquet({"image": IMAGES})},
        error=r"images\.labels = breed",
        settings={"labels": "breed"},
    )


def _values() -> Iterator[BadInput]:
    def case(name: str, column: Any, *reasons: str | None, undecodable: tuple[int, ...] = ()) -> BadInput:
        good = rows("x", *[i for i, reason in enumerate(reasons) if reason is None])
        lost = [(rows("x", i)[0], reason) for i, reason in enumerate(reasons) if reason is not None]
        files = {"x.parquet": parquet({"image": column})}
        return BadInput(f"table/{name}", lambda: files, good, tuple(lost), undecodable=rows("x", *undecodable))

    yield case("null_images", pa.array([None, *IMAGES[:2], None], pa.binary()), "null_image", None, None, "null_image")
    structs = [{"bytes": IMAGES[0], "path": None}, {"bytes": None, "path": "a.jpg"}, None]
    yield case("null_structs", pa.array(structs), None, "null_image", "null_image")
    yield case("empty_images", [b"", IMAGES[0]], None, None, undecodable=(0,))
    yield case("text_as_images", [b"text", IMAGES[0]], None, None, undecodable=(0,))
    yield case("large_binary", pa.array(IMAGES, pa.large_binary()), None, None, None)
    yield case("all_null", pa.array([None, None], pa.binary()), "null_image", "null_image")
    empty = {"x.parquet": parquet({"image": pa.array([], pa.binary())}), "y.parquet": parquet({"image": IMAGES})}
    yield BadInput("table/no_rows", lambda: empty, rows("y", 0, 1, 2))


def _damaged() -> Iterator[BadInput]:
    whole = parquet({"image": IMAGES})
    contents: Mapping[str, bytes] = {
        "empty_file": b"",
        "magic_only": b"PAR1",
        "text": b"image,label\n1,2\n" * 50,
        "noise": np.random.default_rng(0).bytes(999),
        **{f"cut_{share}": whole[: len(whole) * share // 100] for share in (1, 25, 50, 75, 99)},
        "footer_length": whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        "footer_zeroed": whole[:-60] + bytes(52) + whole[-8:],
        "without_start": whole[100:],
    }
    for name, data in contents.items():
        if name == "without_start":
            continue
        files = {"x.parquet": data, "y.parquet": whole}
        lost = (("x", "unreadable_file"),)
        yield BadInput(f"table/damaged_{name}", lambda files=files: files, rows("y", 0, 1, 2), lost)


def _labels() -> Iterator[BadInput]:
    for name, column in [
        ("lists", [[1], [2], []]), ("objects", [{"a": 1}] * 3), ("fractions", [0.5, float("nan"), float("inf")]),
        ("nulls", pa.nulls(3, pa.int64())), ("beyond_the_names", [0, 99, -7]),
        ("dates", pa.array([0, 1, 2], pa.date32())),
        ("bytes", [b"\xff", b"a", b""]), ("booleans", [True, False, None]), ("typeless", pa.nulls(3)),
    ]:  # fmt: skip
        files = {"x.parquet": parquet({"image": IMAGES, "label": column}, metadata={"class_names": ["cat"]})}
        yield BadInput(f"table/labels_{name}", lambda files=files: files, rows("x", 0, 1, 2))
    for name, names in [("object", {"0": "a"}), ("numbers", [1, 2]), ("text", "cat")]:
        files = {"x.parquet": parquet({"image": IMAGES, "label": [0, 1, 2]}, metadata={"class_names": names})}
        yield BadInput(f"table/class_names_{name}", lambda files=files: files, rows("x", 0, 1, 2))


def _keys() -> Iterator[BadInput]:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"\xff", b"\xfe", b"a"]).buffers())
    for name, column, keys in [
        ("doubled", ["a", "a", "b"], None), ("with_gaps", ["a", None, "b"], None), ("empty", ["", "", ""], None),
        ("not_utf8", broken, ("\\xfe", "\\xff", "a")), ("numbers", [30, 1, 2], ("1", "2", "30")),
        ("odd", ["../x", "a\nb", "#"], ("#", "../x", "a\nb")), ("fractions", [0.5, 1.5, 2.5], None),
    ]:  # fmt: skip
        files = {"x.parquet": parquet({"image": IMAGES, "key": column})}
        yield BadInput(f"table/keys_{name}", lambda files=files: files, keys or rows("x", 0, 1, 2))
