"""Bad Parquet files of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from tests.store.bad_inputs import BadInput
from tests.store.bad_tables import rows
from tests.store.inputs import parquet, vectors

NAN, INF = float("nan"), float("inf")
GOOD = [1.0, 2.0, 3.0]


def cases() -> Iterator[BadInput]:
    yield from _rows()
    yield from _types()
    yield from _files()


def _case(name: str, column: Any, *reasons: str | None) -> BadInput:
    kept = rows("x", *[i for i, reason in enumerate(reasons) if reason is None])
    lost = tuple((rows("x", i)[0], reason) for i, reason in enumerate(reasons) if reason is not None)
    return BadInput(f"vectors/{name}", lambda: {"x.parquet": parquet({"embedding": column})}, kept, lost)


def _rows() -> Iterator[BadInput]:
    yield _case("nan", [GOOD, [NAN, 1, 1], GOOD], None, "not_finite", None)
    yield _case("infinite", [GOOD, [INF, 1, 1], [-INF, 1, 1]], None, "not_finite", "not_finite")
    yield _case("null", [None, GOOD, GOOD], "null_embedding", None, None)
    yield _case("null_in_fixed", pa.array([None, GOOD], pa.list_(pa.float32(), 3)), "null_embedding", None)
    yield _case("null_inside", [GOOD, [1.0, None, 2.0]], None, "not_finite")
    yield _case("null_inside_whole_numbers", [[1, 2], [1, None]], None, "not_finite")
    yield _case("zero", [[0.0, 0, 0], GOOD], "zero_vector", None)
    yield _case("minus_zero", [[-0.0, 0, 0], GOOD], "zero_vector", None)
    yield _case("too_small_for_halves", [[1e-9, 0, 0], GOOD], None, None)
    yield _case("too_large_for_halves", [[7e4, 0, 0], GOOD], None, None)
    yield _case("too_large_for_float32", [[1e300, 0, 0], GOOD], "overflow", None)
    yield _case("ragged", [GOOD, [1.0], GOOD, [1.0] * 9, []], None, "wrong_width", None, "wrong_width", "wrong_width")
    yield _case("first_is_the_odd_one", [[1.0], GOOD, GOOD], "wrong_width", None, None)
    yield _case("all_bad", [[NAN] * 3, None, [0.0] * 3], "not_finite", "null_embedding", "zero_vector")


def _types() -> Iterator[BadInput]:
    for name, column in [
        ("text", [["a", "b"]]), ("nested", [[[1.0]]]), ("booleans", [[True]]), ("numbers", [1.0]),
        ("objects", [{"a": 1.0}]),
        ("bytes_beside_none", pa.nulls(1)),
    ]:  # fmt: skip
        files = {"x.parquet": parquet({"embedding": column})}
        yield BadInput(
            f"vectors/column_of_{name}",
            lambda files=files: files,
            error=r"embedding|column",
            settings={"format": "embeddings"},
        )
    yield BadInput(
        "vectors/column_missing",
        lambda: {"x.parquet": parquet({"vectors_": [GOOD], "others_": [GOOD]})},
        error=r"vectors_ \(list",
        settings={"format": "embeddings"},
    )
    for name, column in [
        ("whole_numbers", [[1, 2], [3, 4]]), ("float16", pa.array([GOOD] * 2, pa.list_(pa.float16()))),
        ("large_lists", pa.array([GOOD] * 2, pa.large_list(pa.float64()))),
    ]:  # fmt: skip
        yield _case(f"type_{name}", column, None, None)


def _files() -> Iterator[BadInput]:
    def table(count: int, width: int) -> bytes:
        return parquet({"embedding": vectors(count, width).tolist()})

    good = table(3, 4)
    other = {"x.parquet": good, "y.parquet": table(2, 5)}
    lost = tuple((key, "wrong_width") for key in rows("y", 0, 1))
    yield BadInput("vectors/another_width", lambda: other, rows("x", 0, 1, 2), lost)
    damaged = {"x.parquet": good[:-9], "y.parquet": good}
    yield BadInput("vectors/damaged", lambda: damaged, rows("y", 0, 1, 2), (("x", "unreadable_file"),))
    empty = {"x.parquet": parquet({"embedding": pa.array([], pa.list_(pa.float32()))}), "y.parquet": good}
    yield BadInput("vectors/no_rows", lambda: empty, rows("y", 0, 1, 2))
    noise = {"x.parquet": np.random.default_rng(0).bytes(500), "y.parquet": good}
    yield BadInput("vectors/noise", lambda: noise, rows("y", 0, 1, 2), (("x", "unreadable_file"),))
