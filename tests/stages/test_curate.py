from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import validate
from rayclust.errors import ConfigError, DataError
from rayclust.runtime.pipeline import run_all, run_stage, stages_of
from rayclust.store.manifest import CurateOutputs
from tests.stages.runs import files, tree

CLUSTERS, EACH, WIDTH = 4, 40, 12
COPIES, NEAR, ODD = 6, 10, 157
"""Of the 160 rows 6 repeat the first, 10 are near to the second, and one is like no other."""


def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    x = np.repeat(centers[:CLUSTERS], EACH, axis=0) + 0.25 * rng.normal(size=(CLUSTERS * EACH, WIDTH))
    x[10 : 10 + COPIES] = x[0]
    x[20 : 20 + NEAR] = x[1] + 0.005 * rng.normal(size=(NEAR, WIDTH))
    x[ODD] = centers[3] - 3 * centers[-1]
    return x.astype(np.float16)


def config(folder: Path, **curate: Any) -> Any:
    groups = {"method": {"clusters": CLUSTERS}, "features": {"center": False}, "neighbors": {"k": 12}}
    return validate(tree(str(folder / "run"), str(folder / "table"), curate=curate, **groups))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two tables, done up to `label`."""
    from tests.stages.in_process import without_ray

    folder = tmp_path_factory.mktemp("curate")
    (folder / "table").mkdir()
    for part, some in enumerate(np.split(rows(), [70])):
        columns = {"embedding": pa.array(list(some), pa.list_(pa.float16()))}
        pq.write_table(pa.table(columns), folder / "table" / f"{part}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        run_all(config(folder, preset="none"), stop_after="assign")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, in_process: None) -> Path:
    """A copy of it, on which stages work in this process."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def table(folder: Path, name: str) -> pa.Table:
    parts = sorted((folder / "run" / "curation" / name).glob("part-*.parquet"))
    assert len(parts) == 2
    return pa.concat_tables(map(pq.read_table, parts))


def lines(folder: Path, name: str) -> list[str]:
    return (folder / "run" / "curation" / name).read_text().splitlines()


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "curation" / "curation.json").read_text())
    counts = found["counts"]
    assert counts["rows"] == counts["kept"] + sum(
        counts[why] for why in ("identical", "near", "outlier", "prune", "sample")
    )
    assert counts["kept"] == len(lines(folder, "kept.txt"))
    assert counts["rows"] - counts["kept"] == len(lines(folder, "removed.txt"))
    assert counts["drawn"] == sum(table(folder, "curated")["copies"].to_pylist())
    return found


@pytest.mark.parametrize("search", ["neighbors", "clusters"])
def test_duplicates_by_either_search(folder: Path, search: str):
    run_stage("curate", config(folder, preset="list", duplicates={"remove": True, "search": search, "probes": None}))
    found = facts(folder)
    assert found["search"] == search
    assert found["recall"] == 1
    assert (found["counts"]["identical"], found["counts"]["near"]) == (COPIES, NEAR)
    assert found["groups"] == {"count": 2, "rows": COPIES + NEAR + 2, "largest": NEAR + 1}
    duplicates = table(folder, "duplicates")
    assert duplicates.column_names == ["key", "row", "group", "size", "kept", "keeper", "cosine", "kind"]
    identical = duplicates.filter(pa.compute.equal(duplicates["group"], 0)).to_pylist()
    assert [line["row"] for line in identical] == [0, *range(10, 10 + COPIES)]
    assert [line["kind"] for line in identical] == ["near", *["identical"] * COPIES]
    assert {line["keeper"] for line in identical} == {identical[0]["key"]}
    near = duplicates.filter(pa.compute.equal(duplicates["group"], 1)).to_pylist()
    assert sum(line["kept"] for line in near) == 1
    assert all(line["size"] == NEAR + 1 and line["cosine"] > 0.97 for line in near)
    kept = set(lines(folder, "kept.txt"))
    assert len(kept) == 160 - COPIES - NEAR
    assert {line.split("\t")[0] for line in lines(folder, "removed.txt")}.isdisjoint(kept)
    shares = [point["share_kept"] for point in found["curve"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1 - COPIES / 160
    assert not (folder / "run" / "curation" / "scratch").exists()
    assert not list((folder / "run" / "manifests" / "curate").glob("*"))


def test_outliers_are_listed_and_nothing_is_removed(folder: Path):
    manifest = run_stage("curate", config(folder, preset="list", outliers={"share": 0.01}))
    assert manifest.outputs_of(CurateOutputs).epsilon == 0.03
    found = facts(folder)
    assert found["counts"]["kept"] == 160
    scores = table(folder, "outliers")
    assert scores["row"].to_pylist() == list(range(160))
    assert scores["knn"].to_numpy().argmax() == ODD
    assert ODD in found["examples"]["outliers"][:2]
    assert scores["flagged"].to_pylist()[ODD]
    assert sum(scores["flagged"].to_pylist()) == 2
    assert scores["in_degree"].to_pylist()[ODD] == 0
    assert len({scores["knn"].to_pylist()[row] for row in (0, 10, 15)}) == 1, "identical rows have one score"
    run_stage("curate", config(folder, preset="list", outliers={"share": 0.01, "remove": True}))
    assert facts(folder)["counts"]["outlier"] == 2


def test_a_share_to_keep_then_prototypes_as_in_d4(folder: Path):
    run_stage("curate", config(folder, preset="d4", duplicates={"keep_share": 0.9}))
    found = facts(folder)
    counts = found["counts"]
    left = 160 - counts["identical"] - counts["near"]
    assert 0.85 * 160 <= left <= 0.9 * 160
    assert 0 < found["epsilon"] < 0.03
    assert counts["prune"] == left - int(np.ceil(0.8 * left))
    assert all(line.endswith(("\tnear", "\tidentical", "\tprune")) for line in lines(folder, "removed.txt"))


def test_a_balanced_sample_over_levels(folder: Path):
    sample = {"rows": 24, "levels": [8, 2], "resamples": 2, "copies": 2}
    run_stage("curate", config(folder, preset="hierarchical", sample=sample))
    found = facts(folder)
    assert found["counts"]["drawn"] == 24
    levels = pq.read_table(folder / "run" / "curation" / "levels.parquet").to_pylist()
    assert [(line["level"], line["parent"] == -1) for line in levels] == [(1, False)] * 8 + [(2, True)] * 2
    assert [line["drawn"] for line in levels] == [line["quota"] for line in levels]
    assert [line["drawn"] for line in levels[-2:]] == [12, 12]
    curated = table(folder, "curated").to_pylist()
    for line in curated:
        top, leaf = line["path"]
        assert levels[leaf]["parent"] == top
        assert line["reason"] == ("whole" if levels[leaf]["quota"] >= levels[leaf]["rows"] else "quota")


def test_the_run_s_clusters_as_levels_and_more_than_there_is(folder: Path, caplog: pytest.LogCaptureFixture):
    run_stage("curate", config(folder, preset="list", sample={"rows": 40}))
    levels = pq.read_table(folder / "run" / "curation" / "levels.parquet")
    assert levels["quota"].to_pylist() == [10] * CLUSTERS
    facts(folder)
    run_stage("curate", config(folder, preset="list", sample={"rows": 999}))
    assert "only 160 can be drawn" in caplog.text
    assert facts(folder)["counts"]["drawn"] == 160


def test_rows_are_kept_by_a_column_of_a_file(folder: Path):
    keys = pa.concat_tables(pq.read_table(p) for p in sorted((folder / "run" / "embeddings").glob("*.parquet")))["key"]
    sizes = np.arange(160.0)
    pq.write_table(pa.table({"key": keys, "pixels": sizes}), folder / "sizes.parquet")
    duplicates = {"keep": "pixels", "values": str(folder / "sizes.parquet")}
    run_stage("curate", config(folder, preset="list", duplicates=duplicates))
    found = table(folder, "duplicates").to_pylist()
    assert [line["row"] for line in found if line["kept"]] == [0, 29]
    pq.write_table(pa.table({"key": ["another"], "pixels": [1.0]}), folder / "sizes.parquet")
    with pytest.raises(DataError, match="none of the run's keys"):
        run_stage("curate", config(folder, preset="list", duplicates=duplicates))
    for columns in ({"key": ["a"], "size": [1.0]}, {"key": ["a"], "pixels": ["large"]}, {"key": [1], "pixels": [[1]]}):
        pq.write_table(pa.table(columns), folder / "sizes.parquet")
        with pytest.raises(DataError, match="must be a table of key and numbers called pixels"):
            run_stage("curate", config(folder, preset="list", duplicates=duplicates))


def test_keys_with_line_breaks_are_in_the_tables_alone(tmp_path: Path, in_process: None, caplog: Any):
    (tmp_path / "table").mkdir()
    keys = ["a\nb", *(f"k{place}" for place in range(19))]
    pq.write_table(
        pa.table({"embedding": list(rows()[::8].astype(np.float32)), "key": keys}), tmp_path / "table/a.parquet"
    )
    run_all(config(tmp_path, preset="list"), stop_after="curate")
    assert lines(tmp_path, "kept.txt") == sorted(keys[1:])
    assert "1 keys hold line breaks" in caplog.text


def test_a_split_keeps_its_test_rows_out(folder: Path):
    given = config(folder, preset="list", duplicates={"remove": True})
    given = given.model_copy(update={"images": given.images.model_copy(update={"split": 0.3})})
    run_all(given, stop_after="curate")
    aside = pa.concat_tables(pq.read_table(p) for p in sorted((folder / "run" / "embeddings").glob("*.parquet")))
    train = [r["row"] for r in aside.select(["row", "split"]).to_pylist() if r["split"] == "train"]
    assert table(folder, "outliers")["row"].to_pylist() == train
    counts = facts(folder)["counts"]
    assert counts["rows"] == len(train) < 160
    assert counts["identical"] + counts["near"] > 0


def test_a_killed_stage_goes_on_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    given = config(folder, preset="hierarchical", sample={"rows": 30})
    run_stage("curate", given)
    before = files(folder / "run", "curation/**/*.*")
    from rayclust.stages import curate

    whole = curate.Curation.curate

    def killed(*arguments: Any) -> Any:
        raise DataError("killed")

    monkeypatch.setattr(curate.Curation, "curate", killed)
    with pytest.raises(DataError, match="killed"):
        run_stage("curate", given, force=True)
    assert len(list((folder / "run" / "manifests" / "curate").glob("part-*.json"))) == 2
    monkeypatch.setattr(curate.Curation, "curate", whole)
    run_stage("curate", given)
    assert files(folder / "run", "curation/**/*.*") == before


def test_only_runs_that_ask_have_the_stage(folder: Path):
    assert "curate" not in stages_of(config(folder))
    assert "curate" in stages_of(config(folder, preset="list"))
    with pytest.raises(ConfigError, match=r"curate\.preset = none"):
        run_stage("curate", config(folder))


def test_the_page_shows_groups_and_outliers(folder: Path):
    run_all(config(folder, preset="semdedup"))
    page = (folder / "run" / "report" / "index.html").read_text()
    assert 'id="curation"' in page
    assert "identical" in page
