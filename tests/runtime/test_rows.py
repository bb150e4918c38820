from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rayclust.config import FeaturesConfig
from rayclust.errors import ArtefactError, ConfigError, DataError
from rayclust.features import FeatureTransform
from rayclust.runtime.rows import (
    Moments,
    MomentsInOrder,
    StoredRows,
    cache_folder,
    drop_cache,
    features_at,
    labels_at,
    mapped,
    part_features,
    renumber,
    row_starts,
    transform_of,
    unit_rows,
    write_shard,
)
from rayclust.runtime.tasks import Task, TaskResult, read_mark, write_mark
from rayclust.store import storage, tables
from rayclust.store.run import Run
from tests.sealed import LABELS, VECTORS, Sealed


def test_statistics_are_those_of_all_rows_of_the_run(vectors_run: Sealed):
    features = FeaturesConfig(center=True, standardize=True, normalize=False)
    transform = transform_of(vectors_run.manifest("encode"), features)
    x = VECTORS.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(transform.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(transform.scale, x.std(0), rtol=1e-6)


def test_parts_with_no_rows_start_where_the_next_one_does(pictures_run: Sealed):
    assert row_starts(pictures_run.manifest("encode")) == [0, 12, 12, 24]
    assert part_features(pictures_run.run, 1, FeatureTransform()).shape == (0, 192)


def testfeatures_at_rows_across_parts_come_in_order(vectors_run: Sealed):
    encode = vectors_run.manifest("encode")
    transform = transform_of(encode, vectors_run.config.features)
    found = features_at(vectors_run.run, row_starts(encode), transform, np.array([1, 2, 3, 6]))
    x = VECTORS[[1, 2, 3, 6]]
    np.testing.assert_allclose(found, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-3)
    np.testing.assert_array_equal(
        labels_at(vectors_run.run, row_starts(encode), np.array([0, 1, 6])), LABELS[:2] + LABELS[6:]
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 40])
def test_workers_share_the_rows_without_gap_or_overlap(pictures_run: Sealed, tmp_path: Path, workers: int):
    encode, features = pictures_run.manifest("encode"), pictures_run.config.features
    wanted = np.concatenate(
        [part_features(pictures_run.run, part, transform_of(encode, features)) for part in range(3)]
    )
    blocks = []
    for worker in range(workers):
        rows = StoredRows(pictures_run.run, encode, features, tmp_path / "cache", worker, workers)
        assert (rows.count, rows.dimension) == (24, 192)
        blocks += list(rows.blocks())
    np.testing.assert_array_equal(torch.cat(blocks).numpy(), wanted)
    np.testing.assert_array_equal(rows.tensor().numpy(), wanted)


def test_neighbors_come_in_the_order_of_the_rows(pictures_run: Sealed, tmp_path: Path):
    encode, features = pictures_run.manifest("encode"), pictures_run.config.features
    found = StoredRows(pictures_run.run, encode, features, tmp_path).neighbors()
    assert found.shape == (24, 5)
    last = tables.matrix(tables.read_table(pictures_run.run.neighbors(2), ["neighbors"])["neighbors"])
    np.testing.assert_array_equal(found[12:].numpy(), last)


def fill_with(value: float):
    def fill(array: np.ndarray) -> None:
        array[:] = value

    return fill


def test_a_mapped_file_is_filled_once_and_what_is_written_to_it_stays_here(tmp_path: Path):
    path = tmp_path / "new" / "x.npy"
    first = mapped(path, (2, 3), np.float32, fill_with(7))
    first[:] = 0
    again = mapped(path, (2, 3), np.float32, lambda array: pytest.fail("filled twice"))
    assert again.tolist() == [[7, 7, 7], [7, 7, 7]]


def test_a_fill_that_fails_leaves_nothing_that_would_be_taken_for_whole(tmp_path: Path):
    def killed(array: np.ndarray) -> None:
        array[0] = 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped(tmp_path / "x.npy", (2, 2), np.int64, killed)
    assert mapped(tmp_path / "x.npy", (2, 2), np.int64, fill_with(3)).tolist() == [[3, 3], [3, 3]]


def test_what_a_killed_process_left_half_filled_is_swept_away(tmp_path: Path):
    (tmp_path / "x.12345.unfinished").write_bytes(bytes(100))
    (tmp_path / "xy.12345.unfinished").write_bytes(b"of another array")
    mapped(tmp_path / "x.npy", (2,), np.float32, fill_with(1))
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.lock", "xy.12345.unfinished"}


def test_of_two_that_come_at_once_one_fills_and_the_other_waits(tmp_path: Path):
    fills = list[int]()

    def fill(array: np.ndarray) -> None:
        fills.append(1)
        time.sleep(0.1)
        array[:] = 5

    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: mapped(tmp_path / "x.npy", (4,), np.float32, fill), range(2)))
    assert [array.tolist() for array in both] == [[5, 5, 5, 5]] * 2
    assert fills == [1]


def test_each_training_has_a_folder_of_its_own_that_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path))
    mapped(cache_folder("one") / "x.npy", (1,), np.float32, fill_with(0))
    mapped(cache_folder("two") / "x.npy", (1,), np.float32, fill_with(0))
    drop_cache("one")
    drop_cache("never there")
    assert not cache_folder("one").exists()
    assert (cache_folder("two") / "x.npy").exists()


def test_the_folder_that_anybody_could_have_made_first_must_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAYCLUST_SCRATCH", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder("digest")
    assert folder.parent.parent.stat().st_mode & 0o777 == 0o700
    assert cache_folder("digest") == folder
    folder.parent.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="set RAYCLUST_SCRATCH"):
        cache_folder("digest")
    folder.parent.parent.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.parent.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="set RAYCLUST_SCRATCH"):
        cache_folder("digest")
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path / "mine"))
    assert cache_folder("digest") == tmp_path / "mine" / "rows" / "digest"


def test_a_full_scratch_disk_is_one_line_and_not_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"no space left for the rows of the training.*RAYCLUST_SCRATCH"):
        mapped(tmp_path / "x.npy", (4, 2), np.float32, lambda array: None)
    assert not list(tmp_path.glob("*.unfinished"))
    assert not (tmp_path / "x.npy").exists()


def test_a_scratch_disk_that_cannot_reserve_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert mapped(tmp_path / "x.npy", (4, 2), np.float32, lambda array: array.fill(3)).sum() == 24


def test_zero_rows_stay_zero():
    assert unit_rows(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [
        [0, 0],
        [0.6000000238418579, 0.800000011920929],
    ]


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
    assert Moments.from_json(result.extra["moments"]).total.tolist() == [4, 6]


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


def test_moments_of_parts_add_up_to_those_of_all_rows_and_travel_exactly():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float16)
    total = Moments.of(x[:20]) + Moments.from_json(Moments.of(x[20:20]).to_json()) + Moments.of(x[20:])
    assert total.count == 50
    np.testing.assert_allclose(total.total / 50, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.squares / 50 - (total.total / 50) ** 2, x.astype(np.float64).var(0), rtol=1e-9)
    again = Moments.from_json(total.to_json())
    assert again.total.tobytes() == total.total.tobytes()
    assert again.squares.tobytes() == total.squares.tobytes()


def marked_shard(run: Run, row_start: int) -> None:
    unit = Task(2, "digest")
    result = write_shard(run, unit, row_start, records("a", "b"), np.ones((2, 2), np.float16), [reject("c")])
    write_mark(run.shard_manifest(2), unit, result)


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
    marker, right = read_mark(run.shard_manifest(2)), read_mark(other.shard_manifest(2))
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
        patch.setattr("rayclust.runtime.rows.put_table", killed)
        with pytest.raises(KeyboardInterrupt):
            renumber(run, 2, 60)
    marker = read_mark(run.shard_manifest(2))
    assert marker is not None
    assert marker[1].extra["row_start"] is None
    assert renumber(run, 2, 60).extra["row_start"] == 60


def test_a_part_without_a_marker_is_not_renumbered(run: Run):
    with pytest.raises(ArtefactError, match="is missing or damaged; run encode again"):
        renumber(run, 0, 5)


def test_moments_are_summed_in_order_of_the_parts_and_not_kept(run: Run):
    random = np.random.default_rng(0)
    parts = [random.normal(size=(n, 3)).astype(np.float16) for n in (5, 0, 7, 4)]
    own = [Moments.of(part) for part in parts]
    expected = own[0] + own[2] + own[3]
    seen = MomentsInOrder()
    for index in (2, 1, 3, 0, 2):  # the last is read again
        result = TaskResult({}, {"rows": len(parts[index])}, {"moments": own[index].to_json()})
        seen.take(Task(index, "d"), result)
        assert result.extra == {}
    assert seen.sum.to_json() == expected.to_json()


def test_moments_are_not_given_out_while_a_part_is_missing(run: Run):
    seen = MomentsInOrder()
    moments = Moments.of(np.ones((1, 2), np.float16)).to_json()
    seen.take(Task(1, "d"), TaskResult({}, {"rows": 1}, {"moments": moments}))
    with pytest.raises(ArtefactError, match="missing"):
        _ = seen.sum
