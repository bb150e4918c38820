from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rayclust.errors import ConfigError, DataError
from rayclust.features import FeaturesConfig
from rayclust.methods.base import Pairing
from rayclust.methods.settings import EMBEDDINGS, Plan
from rayclust.runtime import tensors
from rayclust.runtime.rows import (
    cache_folder,
    drop_cache,
    features_at,
    part_features,
    row_starts,
    table_at,
    transform_of,
)
from rayclust.runtime.tensors import StoredRows, mapped, unit_rows
from rayclust.store import tables
from rayclust.training.sampling import RowSource
from tests.sealed import LABELS, VECTORS, Sealed


def test_statistics_are_those_of_all_rows_of_the_run(vectors_run: Sealed):
    features = FeaturesConfig(center=True, standardize=True, normalize=False)
    transform = transform_of(vectors_run.manifest("encode"), features)
    x = VECTORS.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(transform.transforms[EMBEDDINGS].mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(transform.transforms[EMBEDDINGS].scale, x.std(0), rtol=1e-6)


def test_parts_with_no_rows_start_where_the_next_one_does(pictures_run: Sealed):
    assert row_starts(pictures_run.manifest("encode")) == [0, 12, 12, 24]
    transform = transform_of(pictures_run.manifest("encode"), FeaturesConfig())
    assert part_features(pictures_run.run, 1, transform).shape == (0, 192)


def test_features_of_rows_across_parts_come_in_order(vectors_run: Sealed):
    encode = vectors_run.manifest("encode")
    transform = transform_of(encode, vectors_run.config.features)
    found = features_at(vectors_run.run, row_starts(encode), transform, np.array([1, 2, 3, 6]))
    x = VECTORS[[1, 2, 3, 6]]
    np.testing.assert_allclose(found, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-3)
    labels = table_at(vectors_run.run.rows, row_starts(encode), np.array([0, 1, 6]), ["label"])["label"]
    assert labels.to_pylist() == LABELS[:2] + LABELS[6:]


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


def rows_of(*values: float) -> Iterator[np.ndarray]:
    """Blocks of one row, a value each."""
    return (np.full((1, 2), value) for value in values)


def never() -> Iterator[np.ndarray]:
    pytest.fail("filled twice")
    yield


def test_a_mapped_file_is_filled_once_and_what_is_written_to_it_stays_here(tmp_path: Path):
    path = tmp_path / "new" / "x.npy"
    first = mapped(path, (2, 2), np.float32, rows_of(7, 8))
    first[:] = 0
    assert mapped(path, (2, 2), np.float32, never()).tolist() == [[7, 7], [8, 8]]


def test_a_fill_that_fails_leaves_nothing_that_would_be_taken_for_whole(tmp_path: Path):
    def killed() -> Iterator[np.ndarray]:
        yield np.ones((1, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped(tmp_path / "x.npy", (2, 2), np.int64, killed())
    assert mapped(tmp_path / "x.npy", (2, 2), np.int64, rows_of(3, 3)).tolist() == [[3, 3], [3, 3]]


def test_what_a_killed_process_left_half_filled_is_swept_away(tmp_path: Path):
    (tmp_path / "x.12345.unfinished").write_bytes(bytes(100))
    (tmp_path / "xy.12345.unfinished").write_bytes(b"of another array")
    mapped(tmp_path / "x.npy", (1, 2), np.float32, rows_of(1))
    assert {path.name for path in tmp_path.iterdir()} == {"x.npy", "x.lock", "xy.12345.unfinished"}


def test_of_two_that_come_at_once_one_fills_and_the_other_waits(tmp_path: Path):
    fills = list[int]()

    def slow() -> Iterator[np.ndarray]:
        fills.append(1)
        time.sleep(0.1)
        yield from rows_of(5)

    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: mapped(tmp_path / "x.npy", (1, 2), np.float32, slow()), range(2)))
    assert [array.tolist() for array in both] == [[[5, 5]]] * 2
    assert fills == [1]


def test_each_training_has_a_folder_of_its_own_that_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path))
    mapped(cache_folder("one") / "x.npy", (1, 2), np.float32, rows_of(0))
    mapped(cache_folder("two") / "x.npy", (1, 2), np.float32, rows_of(0))
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
        mapped(tmp_path / "x.npy", (4, 2), np.float32, never())
    assert not list(tmp_path.glob("*.unfinished"))
    assert not (tmp_path / "x.npy").exists()


def test_a_scratch_disk_that_cannot_reserve_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    assert mapped(tmp_path / "x.npy", (4, 2), np.float32, rows_of(3, 3, 3, 3)).sum() == 24


def test_zero_rows_stay_zero():
    assert unit_rows(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [
        [0, 0],
        [0.6000000238418579, 0.800000011920929],
    ]


def test_bytes_are_kept_as_bytes_and_come_back_as_the_tables_have_them(pictures_run: Sealed, tmp_path: Path):
    encode, features = pictures_run.manifest("encode"), FeaturesConfig(normalize=False)
    stored = np.arange(24 * 192).reshape(24, 192) % 256
    halves = (stored.astype(np.float32) / 255).astype(np.float16).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        starts = row_starts(encode)
        patch.setattr(tensors, "part_features", lambda run, part, transform: halves[starts[part] : starts[part + 1]])
        rows = StoredRows(pictures_run.run, encode, features, tmp_path, are_bytes=True)
        assert rows.tensor().dtype == torch.uint8
        np.testing.assert_array_equal(rows.tensor().numpy(), stored)
        np.testing.assert_array_equal(torch.cat(list(rows.blocks())).numpy(), halves)
        source = RowSource(rows, Pairing(), 0, torch.device("cpu"))
        batch = next(source.batches(Plan(6, 1, 4, 0), 0))
        np.testing.assert_array_equal(batch.x[0].numpy(), halves[batch.rows.numpy()])
