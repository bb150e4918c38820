from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rayclust.config import validate
from rayclust.errors import DataError
from rayclust.search.index import build_index
from rayclust.stages.neighbors import INVERTED_FILE, UNIT_ROWS, _load, _Search, _units, blocks, unit_rows
from rayclust.stages.pipeline import run_all, run_stage
from rayclust.stages.rows import row_starts, transform_of
from rayclust.stages.units import Unit
from rayclust.store import filesystem
from rayclust.store.layout import Run
from tests.references import nearest_rows
from tests.stages.conftest import VECTORS, Sealed
from tests.stages.runs import tree


def grouped(parts: list[int]) -> list[tuple[int, ...]]:
    return [unit.payload for unit in _units(parts, "digest")]


def test_parts_are_grouped_in_order_until_a_unit_is_worth_its_reading():
    assert grouped([UNIT_ROWS]) == [(0,)]
    assert grouped([UNIT_ROWS - 1, 1, 5]) == [(0, 1), (2,)]
    assert grouped([1, 1, 1]) == [(0, 1, 2)]
    assert grouped([UNIT_ROWS, 0, UNIT_ROWS, 0]) == [(0,), (1, 2), (3,)]
    assert grouped([1000] * 1000) == [tuple(range(i, min(i + 16, 1000))) for i in range(0, 1000, 16)]


def test_every_part_is_in_one_unit_and_units_know_their_rows():
    parts = np.random.default_rng(0).integers(0, 900, 200).tolist()
    units = _units(parts, "digest")
    assert [part for unit in units for part in unit.payload] == list(range(200))
    assert [unit.size for unit in units] == [sum(parts[p] for p in unit.payload) for unit in units]
    assert [unit.index for unit in units] == list(range(len(units)))
    assert len({unit.digest for unit in units}) == len(units)
    assert units == _units(parts, "digest")
    assert not {unit.digest for unit in units} & {unit.digest for unit in _units(parts, "other")}


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
    assert "neighbors/ivf.faiss" in manifests[1].outputs
    ids = [
        np.array(pq.read_table(f"{s.run}/neighbors/part-00000.parquet")["neighbors"].to_pylist())
        for s in (exact, by_file)
    ]
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*ids, strict=True)])
    assert shared >= 0.9
    assert all(row not in near for row, near in enumerate(ids[1]))
    run_stage("neighbors", by_file.model_copy(update={"neighbors": exact.neighbors}))


def test_rows_for_which_the_inverted_file_finds_too_few_are_compared_with_all(tmp_path: Path, in_process: None):
    rng = np.random.default_rng(0)
    x = (np.eye(6)[np.arange(240) % 6] + 0.05 * rng.normal(size=(240, 6))).astype(np.float32)
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", x)
    settings = validate(tree(str(tmp_path / "run"), str(tmp_path / "images")))
    encode = run_stage("encode", settings)
    run, starts, transform = Run(settings.run), row_starts(encode), transform_of(encode, settings.features)

    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block, ids in blocks(run, starts, transform):
            yield block.numpy(), ids.numpy()

    index = build_index(stream, count=240, kind="ivf", k=60)
    index.faiss_index.nprobe = 1
    filesystem.write_bytes(filesystem.join(run.neighbors_folder, INVERTED_FILE), index.to_bytes())
    unit = Unit(0, "digest", (0,), 240)
    tables = []
    for inverted_file in ("digest of the file", None):
        _Search(run, starts, transform, 60, inverted_file).search(unit)
        tables.append(pq.read_table(run.neighbors(0)))
    ids = np.array(tables[0]["neighbors"].to_pylist())
    assert ids.min() >= 0
    assert index.search(x, 61)[0].min() == -1, "nothing was short, so nothing was tested"
    assert (ids == np.array(tables[1]["neighbors"].to_pylist())).mean() > 0.9


def test_a_worker_that_lives_on_reads_a_new_inverted_file(tmp_path: Path):
    uri = str(tmp_path / "ivf.faiss")
    for rows in (3, 4):
        x = np.eye(rows, dtype=np.float32)
        built = build_index(lambda x=x: iter([(x, np.arange(len(x)))]), count=rows, kind="flat", seed=0, k=1)
        filesystem.write_bytes(uri, built.to_bytes())
        assert _load(uri, f"digest of {rows}").search(np.eye(rows, dtype=np.float32), 1)[0].shape == (rows, 1)


def test_zero_rows_stay_zero():
    assert unit_rows(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [
        [0, 0],
        [0.6000000238418579, 0.800000011920929],
    ]
