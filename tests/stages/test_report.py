from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig, validate
from rayclust.report import payload
from rayclust.runtime.pipeline import StageContext, run_stage
from rayclust.stages import report, report_rows
from rayclust.store import storage
from rayclust.store.manifest import read_manifest
from rayclust.store.run import Run
from tests.report.pages import payloads
from tests.stages.conftest import Sealed
from tests.stages.runs import tree


def page(folder: Path) -> str:
    return (folder / "report" / "index.html").read_text()


def shown(folder: Path) -> dict[str, Any]:
    """What the page's script reads, from the page and the files beside it."""
    files = {str(path.relative_to(folder / "report")): path.read_bytes() for path in (folder / "report").rglob("*.*")}
    return payloads(files)


def test_the_page_shows_the_clusters_with_their_images_and_fetches_nothing(pictures_run: Sealed):
    text = page(pictures_run.folder)
    assert text.count("data:image/webp;base64,") >= 24
    assert all(name in text for name in ("amber", "blue", "green", "shard-001/broken", "empty", "kmeans", "pixels"))
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)


def test_pictures_have_their_record_and_neighbours(pictures_run: Sealed):
    found, rows = shown(pictures_run.folder), read_rows(pictures_run)
    cluster_of = dict(zip(found["index"]["id"], found["clusters-00000"], strict=True))
    for cluster in pq.read_table(pictures_run.folder / "clusters.parquet").to_pylist():
        kinds = cluster_of[cluster["cluster"]]
        assert [picture[1] for picture in kinds["typical"]] == cluster["exemplars"]
        assert {picture[1] for picture in kinds["borderline"] + kinds["outliers"]} == set(cluster["outliers"])
        for key, row, confidence, label, uri, near, *_ in kinds["typical"]:
            assert (key, uri, label) == (rows[row]["key"], rows[row]["uri"], rows[row]["label"])
            assert confidence == pytest.approx(1000 * rows[row]["confidence"], abs=1)
            assert [other for other, _, _ in near] == rows[row]["neighbors"]
            assert [k for _, k, _ in near] == [rows[other]["cluster"] for other, _, _ in near]
        assert {other for other, _ in kinds["nearest"]} == {0, 1, 2} - {cluster["cluster"]}
        cosines = [cosine for _, cosine in kinds["nearest"]]
        assert cosines == sorted(cosines, reverse=True)


def read_rows(run: Sealed) -> list[dict[str, Any]]:
    """All rows with what the tables of every stage say of them."""
    folders = ("embeddings", "assignments", "neighbors")
    found = [pq.read_table(sorted((run.folder / name).glob("*.parquet"))).to_pylist() for name in folders]
    return [one | two | three for one, two, three in zip(*found, strict=True)]


def test_the_map_has_every_row_of_a_small_run(pictures_run: Sealed):
    found, rows = shown(pictures_run.folder), read_rows(pictures_run)
    assert found["keys-00000"] == {"key": [row["key"] for row in rows], "row": list(range(24))}
    places = np.frombuffer(base64.b64decode(found["points"]["cluster"]), "<u4")
    assert [found["index"]["id"][place] for place in places] == [row["cluster"] for row in rows]


def test_a_run_of_ready_embeddings_has_a_page_without_pictures(vectors_run: Sealed):
    text = page(vectors_run.folder)
    assert "data:image/webp" not in text
    assert "up" in text


CLUSTERS = [
    {"cluster": k, "size": size, "exemplars": [*range(10 * k, 10 * k + 12)], "outliers": [*range(90, 96)]}
    for k, size in enumerate((9, 0, 5))
]


@pytest.mark.parametrize(("most", "counts"), [(1000, (12, 6)), (36, (12, 6)), (12, (4, 2)), (8, (3, 1)), (1, (2, 1))])
def test_clusters_share_the_pictures_evenly(most: int, counts: tuple[int, int]):
    found = report.pictured(CLUSTERS, most)
    assert [tuple(map(len, found[k])) for k in (0, 2)] == [counts] * 2
    assert found[2][0][:2] == [20, 21]


def test_uncertain_images_are_borderline_where_one_other_cluster_is_near():
    near = np.array([[5, 6, 7], [5, 6, 7], [5, -1, -1]])
    of = np.array([[1, 1, 0], [1, 2, 0], [1, -1, -1]], np.int32)
    columns = {"key": list("abc"), "uri": list("abc"), "label": [None] * 3, "cluster": [0] * 3, "confidence": [0.5] * 3}
    rows = report_rows.ShownRows(np.arange(3), pa.table(columns), near, near / 10, of, report_rows.Thumbnails())
    found = rows.gallery([0], [0, 1, 2])
    assert [[picture.key for picture in kind] for kind in (found.typical, found.borderline, found.outliers)] == [
        ["a"], ["a"], ["b", "c"],
    ]  # fmt: skip
    assert found.outliers[1].neighbors == ((5, 1, 0.5),)


def test_files_of_an_earlier_report_go_and_all_lie_where_the_run_does(
    pictures_run: Sealed, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, in_process: None
):
    uri = f"{s3_bucket}/run"
    for path in sorted(pictures_run.folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(uri, str(path.relative_to(pictures_run.folder))), path.read_bytes())
    storage.write_bytes(storage.join(uri, "report", "data", "clusters-00099.js"), b"old")
    monkeypatch.setattr(payload.DataFiles.__init__, "__defaults__", (0,))
    monkeypatch.setattr(payload, "PACK_BYTES", 1)
    manifest = run_stage("report", validate(tree(uri, pictures_run.config.images.uri)), force=True)
    names = {f"data/clusters-{pack:05d}.js" for pack in range(3)} | {
        "data/points.js",
        "data/keys-00000.js",
        "index.html",
    }
    files = {file.key: storage.read_bytes(file.uri) for file in storage.walk(storage.join(uri, "report"))}
    assert set(files) == names
    assert set(manifest.outputs) == {f"report/{name}" for name in names}
    before, after = shown(pictures_run.folder), payloads(files)
    assert [part for pack in range(3) for part in after[f"clusters-{pack:05d}"]] == before["clusters-00000"]
    assert after["points"] == before["points"]


@pytest.fixture
def copied(pictures_run: Sealed, tmp_path: Path, in_process: None) -> RunConfig:
    """The run with its images, to be changed."""
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    return validate(tree(str(tmp_path / "run"), pictures_run.config.images.uri))


def test_images_that_have_been_moved_away_leave_gaps(copied: RunConfig, monkeypatch: pytest.MonkeyPatch):
    fetched = report_rows.fetch_many
    monkeypatch.setattr(
        report_rows,
        "fetch_many",
        lambda uris, columns: fetched([uri.replace("shard-000.tar", "gone.tar") for uri in uris], columns),
    )
    run_stage("report", copied, force=True)
    assert 12 <= page(Path(copied.run)).count("data:image/webp;base64,") < 24


def context_of(config: RunConfig) -> StageContext:
    label = read_manifest(Run(config.run), "label")
    assert label is not None
    return StageContext(config, Run(config.run), "", {"label": label})


def test_methods_run_beside_this_one_are_shown_with_mean_and_spread(copied: RunConfig):
    beside = {"temi": [{"accuracy": 0.5, "nmi": 0.25}, {"accuracy": 0.7, "nmi": 0.25}], "kmeans": [{"accuracy": 0.1}]}
    storage.write_json(Run(copied.run).at("beside.json"), beside)
    _, other = report._methods(context_of(copied), {})
    assert other.name == "temi"
    assert other.metrics["accuracy"] == pytest.approx(0.6)
    assert other.spread["accuracy"] == pytest.approx(0.1)
    run_stage("report", copied, force=True)
    assert "temi" in page(Path(copied.run))


def test_the_same_artefacts_give_the_same_page(copied: RunConfig):
    pages = set()
    for _ in range(2):
        run_stage("report", copied, force=True)
        pages.add(page(Path(copied.run)))
    assert len(pages) == 1


COUNTS = pa.table({"label": ["a", "b", "a", "c"], "cluster": [0, 0, 1, 1], "count": [3, 1, 2, 2]})


@pytest.mark.parametrize(
    ("counts", "majorities"),
    [
        (COUNTS, {0: ("a", 0.75), 1: ("a", 0.5), 2: (None, None)}),
        (COUNTS.slice(0, 0), dict.fromkeys(range(3), (None, None))),
        (None, dict.fromkeys(range(3), (None, None))),
    ],
    ids=["some", "none", "no labels"],
)
def test_the_majority_of_a_cluster_and_its_share(pictures_run: Sealed, counts: pa.Table | None, majorities: Any):
    inputs = {stage: pictures_run.manifest(stage) for stage in ("encode", "assign", "label")}
    context = StageContext(pictures_run.config, pictures_run.run, "", inputs)
    clusters = pq.read_table(pictures_run.run.clusters).to_pylist()
    shown: Any = SimpleNamespace(learnt=None)
    found = report._clusters(context, clusters, {k: ([], []) for k in range(3)}, shown, counts)
    assert {cluster.id: (cluster.majority, cluster.purity) for cluster in found} == majorities


def test_the_table_of_counts_is_drawn_while_it_can_be_read():
    drawn = report._contingency(COUNTS, 3)
    assert drawn is not None
    assert drawn.classes == ("a", "b", "c")
    np.testing.assert_array_equal(drawn.counts, [[3, 2, 0], [1, 0, 0], [0, 2, 0]])
    assert report._contingency(COUNTS, report.DRAWN_CLASSES + 1) is None


def test_examples_of_rejects_are_few_and_their_counts_whole(pictures_run: Sealed):
    [group] = report._rejects(pictures_run.run, pictures_run.manifest("encode"))
    assert (group.reason, group.count, [reject["key"] for reject in group.examples]) == (
        "empty",
        1,
        ["shard-001/broken"],
    )


def test_levels_stand_below_their_method(pictures_run: Sealed):
    levels = [{"clusters": 1000, "occupied": 990, "purity": 0.75}, {"clusters": 50, "occupied": 50, "purity": 0.5}]
    own, *found = report._methods(context_of(pictures_run.config), {"nmi": 0.5, "rows": 24, "levels": levels})
    assert (own.name, own.metrics["nmi"]) == ("kmeans", 0.5)
    assert "rows" not in own.metrics
    assert [(level.name, level.metrics) for level in found] == [
        ("kmeans, level of 1,000 clusters", {"purity": 0.75}),
        ("kmeans, level of 50 clusters", {"purity": 0.5}),
    ]


def test_a_collapse_is_the_first_thing_to_read(pictures_run: Sealed):
    rows, context = {"collapsed": [0, 1], "collapsed_heads": [2, 3], "live_clusters": [90, 2]}, pictures_run.config
    [note] = report._notes(context_of(context), pa.table(rows))
    assert "3 of the heads; the best one has 2 live clusters" in note
    assert list(report._notes(context_of(context), pa.table(rows).slice(0, 1))) == []
    assert list(report._notes(context_of(context), pa.table({"inertia": [1.0]}))) == []


def test_a_choice_among_partitions_is_a_table_and_no_curve():
    evidence = {"inertia": 0.5, "modularity": 0.8, "neighbor_agreement": 0.9, "size_entropy": 1.0, "occupied": 4.0}
    rows = [evidence | {"candidate": name, "chosen": float(name == "consensus")} for name in ("k-means", "consensus")]
    table = pa.Table.from_pylist(rows)
    assert report._curves(table) == []
    first, second = report._candidates(table, {})
    assert (first["name"], first["chosen"], second["chosen"]) == ("k-means", False, True)
    assert second["evidence"]["Modularity"] == 0.8
    assert list(report._candidates(pa.table({"loss": [1.0]}), {})) == []
    # TURTLE has both: steps, and then its runs.
    steps = [{"loss": 2.0}, {"loss": 1.0}]
    run = {"loss": 0.5, "score": 0.9, "candidate": "start 0", "chosen": 1.0}
    table = pa.table({name: [row.get(name) for row in [*steps, run]] for name in run})
    assert [curve.series for curve in report._curves(table)] == [{"loss": [2.0, 1.0]}]
    [kept] = report._candidates(table, {})
    assert kept == {"name": "start 0", "chosen": True, "evidence": {"Labels predicted on held-out rows": 0.9}}


def test_curves_are_those_that_the_method_reports(vectors_run: Sealed):
    history = pq.read_table(vectors_run.folder / "model" / "metrics.parquet")
    names = [name for curve in report._curves(history) for name in curve.series]
    assert set(names) <= {"loss", "inertia"}
    table = pa.table({"loss": [2.0, 1.0], "live_clusters": [9, 8], "epoch": [0, 1]})
    assert [(curve.title, list(curve.series.values())) for curve in report._curves(table)] == [
        ("Loss", [[2.0, 1.0]]),
        ("Live clusters of the best head", [[9, 8]]),
    ]
    assert report._curves(table.slice(0, 1)) == []
