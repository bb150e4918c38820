"""The join over inverted lists through the whole stage, in many small tasks."""

from __future__ import annotations

import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, DataError
from rayclust.runtime import tasks
from rayclust.runtime.cluster import may_use_driver
from rayclust.runtime.pipeline import run_stage
from rayclust.runtime.tasks import Task
from rayclust.search.knn import pack_keys
from rayclust.stages import neighbors_ivf
from rayclust.stages.neighbors_ivf import (
    IvfLayout,
    ListSearch,
    SortedFile,
    collect,
    found_records,
    kept_tensors,
    map_threads,
    merge_sorted,
    put_records,
    put_tensors,
    read_bounds,
    read_records,
    read_tensors,
    row_records,
)
from rayclust.store import tables
from rayclust.store.manifest import Manifest
from rayclust.store.run import Run, parts
from tests.chaos.faults import Fault, Killed, artefacts, damage, storage_with
from tests.references import nearest_rows
from tests.stages.in_process import without_ray
from tests.stages.runs import tree, write_tars


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of some hundred rows."""
    monkeypatch.setattr(tasks, "TASK_ROWS", 150)


def planted(count: int, groups: int = 12, width: int = 8) -> np.ndarray:
    random = np.random.default_rng(0)
    x = random.normal(size=(groups, width))[random.integers(groups, size=count)]
    return (x + 0.3 * random.normal(size=(count, width))).astype(np.float16)


def encoded(folder: Path, x: np.ndarray, sizes: tuple[int, ...], **settings: object) -> RunConfig:
    """A run whose embeddings are `x`, in tables of these sizes."""
    (folder / "images").mkdir()
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    assert bounds[-1] == len(x)
    for part in range(len(sizes)):
        np.save(folder / "images" / f"{part:02d}.npy", x[bounds[part] : bounds[part + 1]])
    own = {"method": "ivf", "k": 5} | settings
    config = validate(tree(str(folder / "run"), str(folder / "images"), neighbors=own, images={"shard_size": 100}))
    run_stage("encode", config)
    return config


def found(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Int64[N k] neighbours and Float[N k] similarities of all rows, in order."""
    read = [tables.read_table(uri) for _, uri in parts(Run(config.run).neighbors_folder)]
    assert np.concatenate([table["row"] for table in read]).tolist() == list(range(sum(map(len, read))))
    ids, similarity = (np.concatenate([tables.matrix(t[name]) for t in read]) for name in ("neighbors", "similarity"))
    return ids, similarity


def features(config: RunConfig) -> np.ndarray:
    """Float64[N D] unit rows, as the stage sees them."""
    read = [tables.read_table(uri, ["embedding"]) for _, uri in parts(Run(config.run).embeddings_folder)]
    x = np.concatenate([tables.matrix(table["embedding"]) for table in read]).astype(float)
    x -= x.mean(0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def recall(config: RunConfig, k: int, tolerance: float = 1e-3) -> float:
    """Of every fifth row against all pairs; what lies within float16's rounding of the last true neighbour counts."""
    x, (ids, _) = features(config), found(config)
    some = list(range(0, len(x), 5))
    truth = nearest_rows(x[some], x, k, some, list(range(len(x))))
    assert not (ids == np.arange(len(x))[:, None]).any()
    assert all(len(set(row)) == k for row in ids.tolist())
    hits = [x[ids[row]] @ x[row] >= own[-1][0] - tolerance for row, own in zip(some, truth, strict=True)]
    return float(np.mean(hits))


SIZES = (300, 500, 1, 399, 400)


@pytest.mark.parametrize("min_recall", [0.5, 0.9, 1.0])
def test_the_recall_that_is_told_is_the_one_over_other_rows_too(
    min_recall: float, tmp_path: Path, in_process: None, small_tasks: None
):
    config = encoded(tmp_path, planted(1600), SIZES, min_recall=min_recall)
    manifest = run_stage("neighbors", config)
    told = manifest.extra["recall"]
    assert manifest.extra["nlist"] > 20
    assert 0 < manifest.extra["halo"] < 10, "rows of nine other shards at most"
    assert told >= min_recall
    assert abs(recall(config, 5, tolerance=1e-4) - told) < 0.04
    ids, similarity = found(config)
    x = features(config)
    assert np.allclose(np.einsum("nd,nkd->nk", x, x[ids]), similarity, atol=2e-3)
    assert (np.diff(similarity.astype(float), axis=1) <= 0).all()
    assert similarity.max() <= 1


def test_with_all_lists_open_it_is_exact_search(
    tmp_path: Path, in_process: None, small_tasks: None, monkeypatch: pytest.MonkeyPatch
):
    config = encoded(tmp_path, planted(900), (400, 500))
    monkeypatch.setattr(neighbors_ivf, "choose_probes", lambda centers, *others: (len(centers), len(centers)))
    manifest = run_stage("neighbors", config)
    assert manifest.extra["nprobe"] == manifest.extra["nlist"] > 10
    assert manifest.extra["recall"] == 1
    ids, similarity = found(config)
    exact = config.model_copy(update={"neighbors": config.neighbors.model_copy(update={"method": "exact"})})
    run_stage("neighbors", exact)
    expected, near = found(exact)
    assert np.allclose(similarity.astype(float), near.astype(float), atol=2e-3)
    assert recall(config, 5) == 1
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ids.tolist(), expected.tolist(), strict=True)])
    assert shared > 0.98, "only what float16 does not tell apart is another"


def test_equal_rows_come_in_order_of_their_numbers(tmp_path: Path, in_process: None, small_tasks: None):
    x = np.repeat(planted(40), 20, axis=0)[np.random.default_rng(1).permutation(800)]
    config = encoded(tmp_path, x, (300, 500), k=6)
    run_stage("neighbors", config)
    ids, similarity = found(config)
    assert (similarity > 0.999).all()
    for row, own in enumerate(ids.tolist()):
        twins = np.flatnonzero((x == x[row]).all(1))
        assert own == twins[twins != row][:6].tolist()


def test_one_long_list_is_searched_over_many_shards(
    tmp_path: Path, in_process: None, small_tasks: None, monkeypatch: pytest.MonkeyPatch
):
    x = np.concatenate([np.ones((700, 8)), planted(200)]).astype(np.float16)
    monkeypatch.setattr(neighbors_ivf, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(neighbors_ivf, "QUERIES_AT_ONCE", 17)
    monkeypatch.setattr(neighbors_ivf, "PAIRS_AT_ONCE", 1)
    config = encoded(tmp_path, x, (450, 450))
    run_stage("neighbors", config)
    ids, _ = found(config)
    assert ids[0].tolist() == [1, 2, 3, 4, 5]
    assert (ids[10:700] == np.arange(5)).all()
    assert recall(config, 5) > 0.9


@pytest.mark.parametrize("count", [2, 3, 40, 90])
def test_few_rows(count: int, tmp_path: Path, in_process: None):
    config = encoded(tmp_path, planted(count), (1, count - 1), k=100)
    manifest = run_stage("neighbors", config)
    assert (manifest.extra["method"], manifest.extra["k"]) == ("ivf", count - 1)
    ids, _ = found(config)
    assert all(sorted([row, *own]) == list(range(count)) for row, own in enumerate(ids.tolist()))


def test_parts_and_groups_without_rows_have_tables_without_rows(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tasks, "TASK_ROWS", 10)
    write_tars(tmp_path / "images", shards=2, per_shard=12)
    for name in ("shard-000a", "shard-002"):
        tarfile.open(tmp_path / "images" / f"{name}.tar", "w").close()
    config = validate(tree(str(tmp_path / "run"), str(tmp_path / "images"), neighbors={"k": 5, "method": "ivf"}))
    run_stage("encode", config)
    run_stage("neighbors", config)
    assert len(list((tmp_path / "run" / "manifests" / "neighbors").iterdir())) == 3, "the last group is empty"
    for part in (1, 3):
        table = tables.read_table(Run(config.run).neighbors(part))
        assert (table.num_rows, table.schema.field("neighbors").type.list_size) == (0, 5)
    assert len(found(config)[0]) == 24


def test_rows_whose_lists_hold_too_few_look_into_more(tmp_path: Path, in_process: None, small_tasks: None):
    random = np.random.default_rng(0)
    x = np.eye(6)[np.arange(480) % 6] + 0.05 * random.normal(size=(480, 6))
    config = encoded(tmp_path, x.astype(np.float16), (480,), k=150, min_recall=0.01)
    manifest = run_stage("neighbors", config)
    assert manifest.extra["nprobe"] * 480 / manifest.extra["nlist"] < 150, "no row was short, so nothing was tested"
    ids, _ = found(config)
    assert ids.min() >= 0
    assert all(len(set(own)) == 150 for own in ids.tolist())


def test_a_recall_out_of_reach_says_what_to_do(
    tmp_path: Path, in_process: None, small_tasks: None, monkeypatch: pytest.MonkeyPatch
):
    config = encoded(tmp_path, planted(900), (900,), min_recall=0.95)
    monkeypatch.setattr(neighbors_ivf, "choose_probes", lambda *arguments: (1, 1))
    message = r"neighbors.min_recall = 0.95: the inverted file reaches 0\.\d+; lower the bound or set neighbors.method"
    with pytest.raises(DataError, match=message):
        run_stage("neighbors", config)


def test_zero_rows_have_neighbours_too(tmp_path: Path, in_process: None, small_tasks: None):
    x = planted(400)
    x[::7] = x.astype(float).mean(0).astype(np.float16)
    config = encoded(tmp_path, x, (200, 200))
    run_stage("neighbors", config)
    ids, similarity = found(config)
    assert ids.min() >= 0
    assert np.isfinite(similarity.astype(float)).all()


Joined = tuple[RunConfig, Manifest, int, dict[str, bytes]]


@pytest.fixture(scope="module")
def joined_once(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    """A run whose neighbours are done; the seal, changes of the storage that they took, and what is there."""
    folder = tmp_path_factory.mktemp("joined")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        patch.setattr(tasks, "TASK_ROWS", 150)
        config = encoded(folder, planted(700), (300, 1, 399))
        shutil.copytree(config.run, folder / "encoded")
        with storage_with(None) as recorder:
            manifest = run_stage("neighbors", config)
    shutil.copytree(config.run, folder / "done")
    return config, manifest, recorder.count, artefacts(config.run)


@pytest.fixture
def joined(joined_once: Joined, in_process: None, small_tasks: None) -> Joined:
    """That run, which a test may change."""
    run = Path(joined_once[0].run)
    shutil.rmtree(run)
    shutil.copytree(run.parent / "done", run)
    return joined_once


def fresh(config: RunConfig) -> None:
    """As it was before the stage."""
    shutil.rmtree(config.run)
    shutil.copytree(Path(config.run).parent / "encoded", config.run)


def test_many_files_are_merged_in_two_rounds_and_the_tables_are_the_same(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
):
    config, _, _, done = joined
    fresh(config)
    monkeypatch.setattr(neighbors_ivf, "FAN_IN", 1)
    read, seen = neighbors_ivf.read_bounds, set[str]()
    monkeypatch.setattr(
        neighbors_ivf, "read_bounds", lambda uri, *keys: seen.add(uri.split("/")[-1]) or read(uri, *keys)
    )
    run_stage("neighbors", config, force=True)
    assert {name.partition("-")[0] for name in seen} == {"sorted", "merging", "found", "gathering"}
    tables_of = {path: content for path, content in artefacts(config.run).items() if path.startswith("neighbors/")}
    assert tables_of == {path: content for path, content in done.items() if path.startswith("neighbors/")}


def test_nothing_is_left_but_the_tables_and_the_markers_of_their_groups(joined: Joined):
    config, manifest, _, _ = joined
    run = Path(config.run)
    assert not (run / "neighbors" / "scratch").exists()
    assert sorted(path.name for path in (run / "neighbors").iterdir()) == [f"part-{i:05d}.parquet" for i in range(3)]
    markers = sorted(path.name for path in (run / "manifests" / "neighbors").iterdir())
    assert markers == ["part-00000.json", "part-00001.json"]
    assert set(manifest.outputs) == {f"neighbors/part-{i:05d}.parquet" for i in range(3)}
    names = ["centres", "sorting", "probing", "sharding", "searching", "collecting"]
    assert [section.name for section in manifest.measured] == names
    assert max(section.done for section in manifest.measured) == 700


@pytest.mark.parametrize("kind", ["before", "after", "torn", "full"])
def test_killed_at_any_change_and_run_again_the_bytes_are_the_same(kind: str, joined: Joined):
    config, _, changes, expected = joined
    assert changes > 30
    # Killed after a change is killed before the next one, if there is one; torn leaves all that killed before does.
    moments = {"before": range(0, changes, 2), "torn": range(1, changes, 2), "full": range(0, changes, 6)}
    for at in moments.get(kind, range(changes - 1, changes)):
        fresh(config)
        with storage_with(Fault(kind, at)), pytest.raises((Killed, DataError)):
            run_stage("neighbors", config)
        (Path(config.run) / "lease.json").unlink(missing_ok=True)
        run_stage("neighbors", config)
        assert artefacts(config.run) == expected, at


@pytest.mark.parametrize("seed", range(6))
def test_killed_and_harmed_the_bytes_are_the_same(seed: int, joined: Joined):
    config, _, changes, expected = joined
    draw = random.Random(seed)
    fresh(config)
    with storage_with(Fault("before", draw.randrange(changes))), pytest.raises(Killed):
        run_stage("neighbors", config)
    (Path(config.run) / "lease.json").unlink(missing_ok=True)
    done = damage(Path(config.run) / "neighbors", draw)
    run_stage("neighbors", config)
    assert artefacts(config.run) == expected, done


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sections of which units are done from now on."""
    seen, sections = list[str](), list[str]()
    submit, timed = tasks.map_tasks, tasks.timed_section

    def name(section: str) -> Any:
        sections.append(section)
        return timed(section)

    def note(function: Any, items: Any, **options: Any) -> Any:
        seen.extend([sections[-1]] * len(items))
        return submit(function, items, **options)

    monkeypatch.setattr(tasks, "timed_section", name)
    monkeypatch.setattr(tasks, "map_tasks", note)
    return seen


@pytest.mark.parametrize(
    ("phase", "left"),
    [
        ("search", ["searching"] * 5 + ["collecting"] * 2),
        ("shard", ["sharding"] * 5 + ["searching"] * 5 + ["collecting"] * 2),
    ],
)
def test_units_that_are_marked_are_not_done_again(
    phase: str, left: list[str], joined: Joined, monkeypatch: pytest.MonkeyPatch
):
    config = joined[0]
    fresh(config)
    real: Callable[..., object] = getattr(neighbors_ivf.ListSearch, phase)
    with monkeypatch.context() as patch:
        patch.setattr(
            neighbors_ivf.ListSearch, phase, lambda *arguments: real(*arguments) if arguments[-1] < 0 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            run_stage("neighbors", config)
    seen = counted(monkeypatch)
    run_stage("neighbors", config)
    assert seen == left[-len(seen) :]
    assert len(seen) in (len(left), len(left) - 1)


def test_ended_before_the_seal_nothing_is_searched_again(joined: Joined, monkeypatch: pytest.MonkeyPatch):
    config, manifest, _, expected = joined
    (Path(config.run) / "manifests" / "neighbors.json").unlink()
    seen = counted(monkeypatch)
    assert run_stage("neighbors", config).extra == manifest.extra
    assert seen == []
    assert artefacts(config.run) == expected


def test_another_method_leaves_no_scratch_files(joined: Joined):
    config, _, changes, _ = joined
    fresh(config)
    with storage_with(Fault("before", changes - 8)), pytest.raises(Killed):
        run_stage("neighbors", config)
    run = Path(config.run)
    assert (run / "neighbors" / "scratch").exists()
    (run / "lease.json").unlink(missing_ok=True)
    (run / "neighbors" / "ivf.faiss").write_bytes(b"of an earlier version")
    run_stage(
        "neighbors", config.model_copy(update={"neighbors": config.neighbors.model_copy(update={"method": "exact"})})
    )
    assert sorted(path.name for path in (run / "neighbors").iterdir()) == [f"part-{i:05d}.parquet" for i in range(3)]
    assert len(list((run / "manifests" / "neighbors").iterdir())) == 2


@pytest.mark.ray
def test_workers_of_a_cluster_write_the_same_bytes(tmp_path: Path, ray_session: None):
    config = encoded(tmp_path, planted(12_000, groups=60), (3000, 4000, 5000))
    assert not may_use_driver(config)  # tasks go to Ray; where they are short, one worker may take them all
    run_stage("neighbors", config)
    expected = artefacts(config.run)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_stage("neighbors", config, force=True)
    assert artefacts(config.run) == expected


ROWS, LISTS, WIDTH = 60, 7, 2


def sorted_groups(tmp_path: Path, homes: np.ndarray, shard_rows: int) -> tuple[IvfLayout, ListSearch]:
    """Files of three groups of rows, as the sorting leaves them, of rows whose features are their numbers."""
    starts = [0, 10, 10, 35, ROWS]
    layout = IvfLayout(Run(str(tmp_path)), "d", starts, [(0, 1), (2,), (3,)], shard_rows, WIDTH, k=1)
    for group in range(3):
        first, end = layout.span(group)
        order = np.argsort(homes[first:end], kind="stable")
        records = np.empty(end - first, row_records(WIDTH))
        records["row"], records["unit"] = first + order, (first + order)[:, None]
        bounds = np.searchsorted(homes[first:end][order], np.arange(LISTS + 1))
        put_records(layout.run, layout.at("sorted", group), records, bounds)
    sizes = np.bincount(homes, minlength=LISTS)
    bounds = torch.from_numpy(np.concatenate([[0], sizes.cumsum()]))
    written = put_tensors(layout.run, layout.at("lists"), {"bounds": bounds})
    digest = next(iter(written.values()))["digest"]
    return layout, ListSearch(layout, digest, LISTS, reach=LISTS, nprobe=2)


def by_list(layout: IvfLayout) -> list[SortedFile]:
    return [SortedFile(layout.at("sorted", group), 0, LISTS) for group in range(len(layout.groups))]


HOMES = {
    "spread": np.random.default_rng(0).integers(0, LISTS, ROWS),
    "one long list": np.full(ROWS, 3),
    "gaps": np.where(np.arange(ROWS) % 3 == 0, 6, 1),
}


@pytest.mark.parametrize("shard_rows", [1, 7, 25, 60, 99])
@pytest.mark.parametrize("homes", HOMES.values(), ids=HOMES)
def test_shards_hold_all_rows_in_order_of_list_and_row(homes: np.ndarray, shard_rows: int, tmp_path: Path):
    layout, lists = sorted_groups(tmp_path, homes, shard_rows)
    found = []
    for shard in range(layout.shards):
        low, high = layout.places(shard)
        assert lists.shard(by_list(layout), shard).counts == {"rows": high - low}
        found.append(read_records(layout.at("shard", shard), row_records(WIDTH), 0, high - low))
    records = np.concatenate(found)
    assert records["row"].tolist() == np.lexsort((np.arange(ROWS), homes)).tolist()
    assert np.array_equal(records["unit"][:, 1], records["row"].astype(np.float16))


def test_files_that_hold_other_keys_are_merged_as_one_file_would_be(tmp_path: Path):
    """Five files of keys 0 to 2, 0 to 4, 3 to 4, 2 to 6 and none, of which keys 1 to 4 are wanted."""
    kind, held = np.dtype([("row", "<i8")]), [[0, 0, 1, 2], [0, 1, 1, 4], [3, 4], [2, 2, 5, 6], []]
    spans = [(0, 3), (0, 5), (3, 5), (2, 7), (6, 7)]
    files, expected, row = [], [], 0
    for number, (keys, (first, end)) in enumerate(zip(held, spans, strict=True)):
        records = np.arange(row, row + len(keys)).astype(kind)
        expected += [(key, number, row + place) for place, key in enumerate(keys) if 1 <= key < 5]
        row += len(keys)
        files.append(SortedFile(str(tmp_path / str(number)), first, end))
        put_records(Run(str(tmp_path)), files[-1].uri, records, np.searchsorted(keys, np.arange(first, end + 1)))
    records, bounds = merge_sorted(files, kind, 1, 5)
    assert records["row"].tolist() == [row for _, _, row in sorted(expected)]
    assert bounds.tolist() == np.searchsorted(sorted(key for key, _, _ in expected), [1, 2, 3, 4, 5]).tolist()
    some, _ = merge_sorted(files, kind, 1, 5, slice(2, 6))
    assert some["row"].tolist() == records["row"][2:6].tolist()


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_each_pair_of_a_row_and_a_list_sees_all_rows_of_the_list(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(neighbors_ivf, "BLOCK_BYTES", block * row_records(WIDTH).itemsize)
    monkeypatch.setattr(neighbors_ivf, "READ_BYTES", 5 * row_records(WIDTH).itemsize)
    homes = HOMES["spread"]
    layout, lists = sorted_groups(tmp_path, homes, 13)
    for shard in range(layout.shards):
        lists.shard(by_list(layout), shard)
    bounds = kept_tensors(layout.at("lists"), lists.digest)["bounds"]
    own = neighbors_ivf._read(layout, *layout.places(2))
    pairs = [(4, 0), (12, 0), (3, 1), (0, 2), (1, 2), (5, 4), (5, 5), (9, 6)]
    places, opened = torch.tensor(pairs).T
    seen: dict[tuple[int, int], list[int]] = {}
    for some, rows, units in neighbors_ivf._blocks(layout, own, places, opened, bounds):
        assert units[:, 0].tolist() == rows.tolist()
        assert len(rows) <= max(block, 1)
        for place in some.tolist():
            for row in rows.tolist():
                seen.setdefault((place, int(homes[row])), []).append(row)
    assert seen == {pair: np.flatnonzero(homes == pair[1]).tolist() for pair in pairs}


@pytest.mark.parametrize("some", [[0, 1, 2, 5], [0, 2, 5]])
def test_lists_that_lie_close_are_read_in_one_go(some: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layout, lists = sorted_groups(tmp_path, HOMES["spread"], 13)
    for shard in range(layout.shards):
        lists.shard(by_list(layout), shard)
    reads, read = [], neighbors_ivf._read
    monkeypatch.setattr(neighbors_ivf, "_read", lambda *arguments: reads.append(arguments[1:]) or read(*arguments))
    bounds = kept_tensors(layout.at("lists"), lists.digest)["bounds"]
    own = read(layout, *layout.places(4))
    blocks = list(neighbors_ivf._blocks(layout, own, torch.zeros(len(some)).long(), torch.tensor(some), bounds))
    assert [len(rows) for _, rows, _ in blocks] == [int(bounds[i + 1] - bounds[i]) for i in some]
    assert reads == [(int(bounds[0]), int(bounds[3])), (int(bounds[5]), int(bounds[6]))]


def test_a_row_that_no_shard_has_found_is_an_error(tmp_path: Path):
    layout = IvfLayout(Run(str(tmp_path)), "d", [0, 3], [(0,)], shard_rows=9, width=WIDTH, k=1)
    records = np.zeros(2, found_records(1))
    records["row"], records["keys"] = [0, 2], pack_keys(torch.zeros(2, 1), torch.ones(2, 1).long())
    put_records(layout.run, layout.at("found", 0), records, np.array([0, 2]))
    with pytest.raises(ArtefactError, match="neighbors: 2 rows are there for the rows 0 to 2"):
        collect(layout, {}, [SortedFile(layout.at("found", 0), 0, 1)], Task(0, "d", (0,), 3))


@pytest.mark.parametrize("opened", [[0, 1, 2, 3, 4, 5, 6], [0, 3], [5]])
@pytest.mark.parametrize("name", HOMES)
def test_rows_outside_a_shard_are_counted_once(
    name: str, opened: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    layout, lists = sorted_groups(tmp_path, HOMES[name], 13)
    known = kept_tensors(layout.at("lists"), lists.digest)
    nothing = {"query": torch.zeros(0, dtype=torch.int64), "keys": torch.zeros((0, 1), dtype=torch.int64)}
    monkeypatch.setattr(neighbors_ivf, "kept_tensors", lambda *of: known | nothing)
    # Every row of a shard looks into the same lists.
    pairs = torch.cartesian_prod(torch.tensor(opened), torch.arange(13))
    for shard in range(layout.shards):
        lists.shard(by_list(layout), shard)
    for shard in range(layout.shards):
        low, high = layout.places(shard)
        some = pairs[pairs[:, 1] < high - low]
        monkeypatch.setattr(ListSearch, "_pairs", lambda *given, found=some: (found[:, 1], found[:, 0]))
        homes = np.sort(HOMES[name])
        wanted = np.isin(homes, opened).sum() - np.isin(homes[low:high], opened).sum()
        assert lists.search(shard).counts["halo"] == wanted


def layout(run: Run) -> IvfLayout:
    return IvfLayout(run, "d1", [0, 4, 4, 9, 10], [(0, 1), (2,), (3,)], shard_rows=4, width=3, k=2)


def test_a_layout_knows_its_shards_groups_and_files(tmp_path: Path):
    of = layout(Run(str(tmp_path)))
    assert (of.count, of.shards) == (10, 3)
    assert [of.span(group) for group in range(3)] == [(0, 4), (4, 9), (9, 10)]
    assert [of.places(shard) for shard in range(3)] == [(0, 4), (4, 8), (8, 10)]
    assert of.at("shard", 2) == f"{tmp_path}/neighbors/scratch/d1/shard-00002"


@pytest.mark.parametrize("place", ["local", "s3"])
def test_ranges_of_records_and_of_their_bounds(place: str, tmp_path: Path, request: pytest.FixtureRequest):
    run = Run(str(tmp_path) if place == "local" else request.getfixturevalue("s3_bucket"))
    kind = row_records(3)
    records = np.zeros(7, kind)
    records["row"], records["unit"] = np.arange(7) * 10, np.arange(21).reshape(7, 3) / 8
    bounds = np.array([0, 2, 2, 7])
    uri = run.at("neighbors", "scratch", "file")
    written = put_records(run, uri, records, bounds)
    assert written["neighbors/scratch/file"]["size"] == 4 * 8 + 7 * (8 + 6)
    assert read_bounds(uri, 0, 3).tolist() == [0, 2, 2, 7]
    assert read_bounds(uri, 1, 2).tolist() == [2, 2]
    assert np.array_equal(read_records(uri, kind, 2, 6, groups=3), records[2:6])
    assert len(read_records(uri, kind, 4, 4, groups=3)) == 0
    put_records(run, uri, records)
    assert np.array_equal(read_records(uri, kind, 0, 7), records)


def test_a_file_that_is_too_short_says_so(tmp_path: Path):
    run = Run(str(tmp_path))
    kind = found_records(2)
    put_records(run, run.at("file"), np.zeros(3, kind))
    with pytest.raises(ArtefactError, match="file: is shorter than was written"):
        read_records(run.at("file"), kind, 1, 4)


def test_arrays_are_what_was_written_or_an_error(tmp_path: Path):
    run = Run(str(tmp_path))
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.zeros(0, 4, dtype=torch.float16)}
    digest = put_tensors(run, run.at("file"), tensors)["file"]["digest"]
    found = read_tensors(run.at("file"), digest)
    assert {name: (own.dtype, own.tolist()) for name, own in found.items()} == {
        name: (own.dtype, own.tolist()) for name, own in tensors.items()
    }
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"file: is damaged .* `rayclust neighbors RUN.yaml`"):
        read_tensors(run.at("file"), digest)


def test_a_worker_that_lives_on_reads_arrays_of_another_digest_anew(tmp_path: Path):
    run = Run(str(tmp_path))
    for value in (1, 2):
        digest = put_tensors(run, run.at("file"), {"a": torch.tensor([value])})["file"]["digest"]
        assert kept_tensors(run.at("file"), digest)["a"].tolist() == [value]


def test_results_come_in_order():
    assert map_threads(lambda x: x * x, range(100)) == [x * x for x in range(100)]
