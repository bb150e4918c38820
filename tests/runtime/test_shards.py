from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayclust.errors import ArtefactError
from rayclust.runtime.shards import MomentsInOrder, pack_moments, renumber, write_shard
from rayclust.runtime.tasks import Task, TaskResult, read_mark, write_mark
from rayclust.store import storage, tables
from rayclust.store.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


def records(*keys: str) -> list[dict[str, str | None]]:
    return [{"key": key, "uri": f"/images/{key}", "label": None if key.startswith("?") else "x"} for key in keys]


def reject(key: str, reason: str = "empty") -> dict[str, str]:
    return {"key": key, "uri": f"/images/{key}", "reason": reason, "detail": "no bytes"}


def test_a_shard_is_a_part_its_rejects_and_their_counts(run: Run):
    embeddings = np.array([[1, 2], [3, 4]], np.float16)
    result = write_shard(run, Task(3, "d"), 40, records("ä/1.png", "?2"), embeddings, [reject("z"), reject("b", "bad")])
    part = tables.read_table(run.embeddings(3))
    assert part.schema.equals(tables.EMBEDDINGS(2))
    assert part["row"].to_pylist() == [40, 41]
    assert part["key"].to_pylist() == ["ä/1.png", "?2"]
    assert part["label"].to_pylist() == ["x", None]
    np.testing.assert_array_equal(tables.matrix(part["embedding"]), embeddings)
    assert [row["key"] for row in tables.read_table(run.rejects(3)).to_pylist()] == ["b", "z"]
    assert result.counts == {"rows": 2, "rejects": 2, "labelled": 1}
    assert result.extra["reasons"] == {"bad": 1, "empty": 1}
    assert set(result.outputs) == {"embeddings/part-00003.parquet", "rejects/part-00003.parquet"}


def test_rows_that_are_not_finite_become_rejects_and_the_others_stay_dense(run: Run):
    embeddings = np.array([[np.nan, 0], [1, 2], [0, np.inf], [3, 4]], np.float16)
    result = write_shard(run, Task(0, "d"), 7, records("a", "b", "c", "d"), embeddings, [])
    part = tables.read_table(run.embeddings(0))
    assert part["row"].to_pylist() == [7, 8]
    assert part["key"].to_pylist() == ["b", "d"]
    assert result.extra["reasons"] == {"not_finite": 2}
    assert unpacked(result.extra["moments"])[1].tolist() == [4, 6]


def test_an_empty_shard_is_an_empty_part(run: Run):
    result = write_shard(run, Task(0, "d"), 5, [], np.zeros((0, 4), np.float16), [])
    assert tables.read_table(run.embeddings(0)).num_rows == 0
    assert tables.read_table(run.embeddings(0)).schema.equals(tables.EMBEDDINGS(4))
    assert not storage.exists(run.rejects(0))
    assert result.counts == {"rows": 0, "rejects": 0, "labelled": 0}


def test_rejects_of_an_earlier_try_do_not_stay(run: Run):
    write_shard(run, Task(0, "d"), 0, records("a"), np.ones((1, 2), np.float16), [reject("b")])
    write_shard(run, Task(0, "e"), 0, records("a"), np.ones((1, 2), np.float16), [])
    assert not storage.exists(run.rejects(0))


def marked_shard(run: Run, row_start: int) -> None:
    unit = Task(2, "digest")
    result = write_shard(run, unit, row_start, records("a", "b"), np.ones((2, 2), np.float16), [reject("c")])
    write_mark(run.mark(2), unit, result)


def without_stamps(result: TaskResult) -> TaskResult:
    outputs = {path: {**written, "stamp": ""} for path, written in result.outputs.items()}
    return TaskResult(outputs, result.counts, result.extra)


def test_a_renumbered_part_has_the_bytes_that_a_right_guess_would_have_had(run: Run, tmp_path: Path):
    marked_shard(run, 100)
    first = renumber(run, 2, 60)
    assert tables.read_table(run.embeddings(2))["row"].to_pylist() == [60, 61]
    content = storage.read_bytes(run.embeddings(2))
    other = Run(str(tmp_path / "other"))
    marked_shard(other, 60)
    assert content == storage.read_bytes(other.embeddings(2))
    marker, right = read_mark(run.mark(2)), read_mark(other.mark(2))
    assert marker is not None
    assert right is not None
    assert marker == ("digest", first)
    assert without_stamps(first) == without_stamps(right[1])
    assert without_stamps(renumber(run, 2, 60)) == without_stamps(first)
    assert storage.read_bytes(run.embeddings(2)) == content


def test_renumbering_killed_half_way_leaves_a_marker_that_names_no_row(run: Run, monkeypatch: pytest.MonkeyPatch):
    marked_shard(run, 100)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rayclust.runtime.shards.put_table", killed)
        with pytest.raises(KeyboardInterrupt):
            renumber(run, 2, 60)
    marker = read_mark(run.mark(2))
    assert marker is not None
    assert marker[1].extra["row_start"] is None
    assert renumber(run, 2, 60).extra["row_start"] == 60


def test_a_part_without_a_marker_is_not_renumbered(run: Run):
    with pytest.raises(ArtefactError, match="is missing or damaged; run encode again"):
        renumber(run, 0, 5)


def unpacked(moments: dict[str, Any]) -> tuple[int, np.ndarray, np.ndarray]:
    total, squares = (np.frombuffer(base64.b64decode(moments[name]), "<f8") for name in ("total", "squares"))
    return moments["count"], total, squares


def moments_of(embeddings: np.ndarray) -> dict[str, Any]:
    rows = embeddings.astype(np.float64)
    return pack_moments(len(rows), np.stack([rows.sum(0), (rows**2).sum(0)]))


def test_moments_are_summed_in_order_of_the_parts_and_not_kept():
    random = np.random.default_rng(0)
    parts = [random.normal(size=(n, 3)).astype(np.float16) for n in (5, 0, 7, 4)]
    own = [unpacked(moments_of(part)) for part in parts]
    seen = MomentsInOrder()
    for index in (2, 1, 3, 0, 2):  # the last is read again
        result = TaskResult({}, {"rows": len(parts[index])}, {"moments": moments_of(parts[index])})
        seen.take(Task(index, "d"), result)
        assert result.extra == {}
    count, total, squares = unpacked(seen.sum)
    assert count == 16
    assert total.tobytes() == (own[0][1] + own[2][1] + own[3][1]).tobytes()
    assert squares.tobytes() == (own[0][2] + own[2][2] + own[3][2]).tobytes()
    x = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(total / 16, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(squares / 16 - (total / 16) ** 2, x.var(0), rtol=1e-9)


def test_moments_are_not_given_out_while_a_part_is_missing():
    seen = MomentsInOrder()
    seen.take(Task(1, "d"), TaskResult({}, {"rows": 1}, {"moments": moments_of(np.ones((1, 2), np.float16))}))
    with pytest.raises(ArtefactError, match="missing"):
        _ = seen.sum
