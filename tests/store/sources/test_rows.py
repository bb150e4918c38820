from __future__ import annotations

import numpy as np

from rayclust.store.sources.rows import RawRows, Vectors, checked, unreadable
from rayclust.store.sources.shard import Shard

SHARD = Shard(0, "embeddings_npy", "u", "n", "s")


def raw(blocks: list[list[list[float] | None]], labels: list[str | None] | None = None) -> RawRows:
    """Rows of a few blocks, keys counting down so that order matters."""
    vectors, count = Vectors(), sum(map(len, blocks))
    for block in blocks:
        widths = np.array([-1 if row is None else len(row) for row in block])
        by_width = {
            int(width): np.array([row for row in block if row is not None and len(row) == width])
            for width in np.unique(widths[widths > 0])
        }
        vectors.add(widths, by_width)
    keys = [f"k{count - i}" for i in range(count)]
    return RawRows(keys, [f"u#{i}" for i in range(count)], labels or [None] * count, vectors)


def test_rows_come_by_key() -> None:
    rows = checked(SHARD, raw([[[1, 2], [3, 4]], [[5, 6]]], ["a", "b", "c"]), None)
    assert rows.keys == ["k1", "k2", "k3"]
    assert rows.embeddings.tolist() == [[5, 6], [3, 4], [1, 2]]
    assert (rows.uris, rows.labels) == (["u#2", "u#1", "u#0"], ["c", "b", "a"])
    assert rows.embeddings.dtype == np.float16


def test_every_bad_row_is_told_and_no_good_one_lost() -> None:
    rows = checked(
        SHARD,
        raw([[[1, 2], None, [1, 2, 3], [np.nan, 1]], [[np.inf, 1], [1e5, 1], [0, 0], [1e-9, 0], [], [7, 8]]]),
        None,
    )
    assert rows.embeddings.tolist() == [[7, 8], [1, 2]]
    assert {reject["key"]: reject["reason"] for reject in rows.rejects} == {
        "k9": "null_embedding", "k8": "wrong_width", "k7": "not_finite", "k6": "not_finite", "k5": "overflow",
        "k4": "zero_vector", "k3": "zero_vector", "k2": "wrong_width",
    }  # fmt: skip
    assert all(reject["uri"] and reject["detail"] for reject in rows.rejects)


def test_the_usual_width_is_that_of_most_rows_unless_one_is_asked_for() -> None:
    blocks: list[list[list[float] | None]] = [[[1, 2, 3], [1, 2], [3, 4]]]
    assert checked(SHARD, raw(blocks), None).embeddings.shape == (2, 2)
    assert checked(SHARD, raw(blocks), 3).keys == ["k3"]
    none = checked(SHARD, raw(blocks), 9)
    assert (none.embeddings.shape, len(none.rejects)) == ((0, 9), 3)
    assert checked(SHARD, raw([[]]), None).embeddings.shape == (0, 0)


def test_whole_numbers_are_taken() -> None:
    vectors = Vectors()
    vectors.add(np.array([2, 2]), {2: np.array([[1, 2], [100_000, 1]])})
    rows = checked(SHARD, RawRows(["a", "b"], ["u", "u"], [None, None], vectors), None)
    assert (rows.keys, rows.rejects[0]["reason"]) == (["a"], "overflow")


def test_classes_and_labels_kept() -> None:
    shard = Shard(0, "embeddings_npy", "u", "n", "s", labels="none", classes=("a",))
    rows = checked(shard, raw([[[1, 2], [3, 4], [0, 0]]], ["a", "b", "b"]), None)
    assert (rows.keys, rows.labels, rows.rejects) == (["k3"], [None], [])


def test_an_unreadable_file() -> None:
    rows = unreadable(SHARD, "cut", 5)
    assert rows.embeddings.shape == (0, 5)
    assert rows.rejects == [{"key": "n", "uri": "u", "reason": "unreadable_file", "detail": "cut"}]
