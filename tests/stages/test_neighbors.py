from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayclust.config import validate
from rayclust.errors import DataError
from rayclust.runtime.pipeline import run_all, run_stage
from rayclust.runtime.tasks import LARGEST_TASK_BYTES, TASK_BYTES, TASK_ROWS, TASKS, group_parts, search_task_rows
from tests.references import nearest_rows
from tests.stages.conftest import VECTORS, Sealed
from tests.stages.runs import tree


def grouped(parts: list[int]) -> list[tuple[int, ...]]:
    return [task.payload for task in group_parts(parts, "digest", search_task_rows(sum(parts), 8, 5))]


def test_parts_are_grouped_in_order_until_a_task_is_worth_its_reading():
    assert grouped([TASK_ROWS]) == [(0,)]
    assert grouped([TASK_ROWS - 1, 1, 5]) == [(0, 1), (2,)]
    assert grouped([1, 1, 1]) == [(0, 1, 2)]
    assert grouped([TASK_ROWS, 0, TASK_ROWS, 0]) == [(0,), (1, 2), (3,)]
    assert grouped([1000] * 1000) == [tuple(range(i, min(i + 16, 1000))) for i in range(0, 1000, 16)]


def test_tasks_are_a_64th_of_the_rows_but_neither_small_nor_beyond_memory():
    assert search_task_rows(2, 768, 50) == TASK_ROWS
    assert search_task_rows(10**7, 64, 10) == 10**7 // 64
    most = search_task_rows(10**8, 768, 50)
    assert most == search_task_rows(4 * 10**8, 768, 50)
    assert TASK_BYTES * 0.99 < most * (2 * 768 + 8 * 51) <= TASK_BYTES


def test_beyond_thousands_of_tasks_they_grow_again():
    most = search_task_rows(4 * 10**9, 768, 50)
    assert most == search_task_rows(8 * 10**9, 768, 50)
    assert LARGEST_TASK_BYTES * 0.99 < most * (2 * 768 + 8 * 51) <= LARGEST_TASK_BYTES
    count = 10**9
    assert TASKS <= count / search_task_rows(count, 768, 50) < 1.01 * TASKS


def test_every_part_is_in_one_task_and_tasks_know_their_rows():
    parts = np.random.default_rng(0).integers(0, 900, 200).tolist()
    tasks = group_parts(parts, "digest", 1000)
    assert [part for task in tasks for part in task.payload] == list(range(200))
    assert [task.size for task in tasks] == [sum(parts[p] for p in task.payload) for task in tasks]
    assert [task.index for task in tasks] == list(range(len(tasks)))
    assert len({task.digest for task in tasks}) == len(tasks)
    assert tasks == group_parts(parts, "digest", 1000)
    assert not {task.digest for task in tasks} & {task.digest for task in group_parts(parts, "other", 1000)}


def found(sealed: Sealed, part: int) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(sealed.run.neighbors(part))
    columns = (np.array(table[name].to_pylist(), float) for name in ("neighbors", "similarity"))
    return next(columns), next(columns)


def test_neighbours_are_those_of_all_pairs(vectors_run: Sealed):
    x = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    wanted = nearest_rows(x, x, 2, list(range(7)), list(range(7)))
    ids, similarity = (np.concatenate(both) for both in zip(found(vectors_run, 0), found(vectors_run, 1), strict=True))
    np.testing.assert_allclose(similarity, [[s for s, _ in row] for row in wanted], atol=1e-3)
    for row, (near, cosines) in enumerate(zip(ids.astype(int), similarity, strict=True)):
        assert row not in near
        np.testing.assert_allclose(x[near] @ x[row], cosines, atol=1e-3)


def test_a_part_without_rows_has_a_table_without_rows(pictures_run: Sealed):
    table = pq.read_table(pictures_run.run.neighbors(1))
    assert (table.num_rows, table.schema.field("neighbors").type.list_size) == (0, 5)


def test_more_neighbours_than_rows_gives_all_the_others(vectors_run: Sealed, tmp_path: Path, in_process: None):
    settings = validate(tree(str(tmp_path / "run"), vectors_run.config.images.uri, method={"clusters": 2}))
    manifest = run_all(settings, stop_after="neighbors")["neighbors"]
    assert manifest.extra == {"method": "exact", "k": 5}
    wide = settings.model_copy(update={"neighbors": settings.neighbors.model_copy(update={"k": 4000})})
    assert run_stage("neighbors", wide).extra["k"] == 6


def test_one_row_has_no_neighbours(tmp_path: Path, in_process: None):
    np.save(tmp_path / "a.npy", np.ones((1, 3), np.float32))
    with pytest.raises(DataError, match="the run has 1 row: at least 2 are needed"):
        run_all(validate(tree(str(tmp_path / "run"), str(tmp_path / "a.npy"))))


def test_the_inverted_file_finds_what_exact_search_finds(tmp_path: Path, in_process: None):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    x = rng.normal(size=(10, 8))[rng.integers(0, 10, 600)] + 0.2 * rng.normal(size=(600, 8))
    np.save(tmp_path / "images" / "a.npy", x.astype(np.float32))
    exact = validate(tree(str(tmp_path / "exact"), str(tmp_path / "images"), neighbors={"k": 5}))
    inverted = {"k": 5, "method": "ivf", "min_recall": 0.9}
    by_file = validate(tree(str(tmp_path / "ivf"), str(tmp_path / "images"), neighbors=inverted))
    manifests = [run_all(settings, stop_after="neighbors")["neighbors"] for settings in (exact, by_file)]
    assert manifests[0].extra["method"] == "exact"
    assert manifests[1].extra["recall"] >= 0.9
    assert set(manifests[1].outputs) == set(manifests[0].outputs)
    ids = [
        np.array(pq.read_table(f"{s.run}/neighbors/part-00000.parquet")["neighbors"].to_pylist())
        for s in (exact, by_file)
    ]
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*ids, strict=True)])
    assert shared >= 0.9
    assert all(row not in near for row, near in enumerate(ids[1]))
    run_stage("neighbors", by_file.model_copy(update={"neighbors": exact.neighbors}))
