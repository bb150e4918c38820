from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError
from rayclust.runtime.api import load_run
from rayclust.runtime.edits import edit_clusters, shown_clusters, undo_edit
from rayclust.runtime.pipeline import run_stage
from rayclust.runtime.results import RunTables
from rayclust.stages.predict import predict
from rayclust.stages.search import search
from rayclust.store import storage
from rayclust.store.manifest import Manifest, read_manifest, write_manifest
from rayclust.store.overlay import Mark, Merge, Rename, Split, clusters_named, read_overlay
from rayclust.store.run import Run
from tests.sealed import Sealed

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def edited(pictures_run: Sealed, tmp_path: Path) -> RunConfig:
    """A copy of the run with two clusters merged, one renamed, and one image split off."""
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    keys = [key for key, cluster in assigned(run).items() if cluster == 2]
    edit_clusters(run, Merge(clusters=(0, 1)))
    edit_clusters(run, Rename(cluster=0, name="warm"))
    edit_clusters(run, Split(cluster=2, keys=(keys[0],), name="odd"))
    return load_run(run.uri)


def assigned(run: Run) -> dict[str, int]:
    table = pa.concat_tables([pq.read_table(run.assignments(part), columns=["key", "cluster"]) for part in range(3)])
    return dict(zip(table["key"].to_pylist(), table["cluster"].to_pylist(), strict=True))


def test_tables_search_and_new_images_show_the_edits(edited: RunConfig, tmp_path: Path):
    own, odd = assigned(Run(edited.run)), read_overlay(Run(edited.run))[0].edits[2]
    assert isinstance(odd, Split)
    wanted = {key: 3 if key in odd.keys else 0 if cluster < 2 else 2 for key, cluster in own.items()}
    frame = RunTables(edited).frame()
    assert dict(zip(frame["key"], frame["cluster"], strict=True)) == wanted
    names = [None if name is None or name != name else name for name in frame["name"]]
    assert set(zip(frame["cluster"], names, strict=True)) == {(0, "warm"), (2, None), (3, "odd")}

    image = next(uri for key, uri in zip(frame["key"], frame["uri"], strict=True) if key in odd.keys)
    data = tmp_path / "query.png"
    RunTables(edited).images([int(np.flatnonzero(frame["uri"] == image)[0])])[0].save(data)
    [first, *_] = search(edited, image=str(data), text=None, top=3)["encoder"]
    assert (first.key, first.cluster, first.name) == (odd.keys[0], 3, "odd")

    predict(edited, edited.images.uri, str(tmp_path / "t.parquet"), evaluate=True)
    table = pq.read_table(tmp_path / "t.parquet").slice(0, 24)
    # The image that was split off counts as a new one here: splits are lists of the run's own.
    found = dict(zip(table["key"].to_pylist(), table["cluster"].to_pylist(), strict=True))
    assert found == {key: 0 if cluster < 2 else 2 for key, cluster in own.items()}
    assert set(table["name"].to_pylist()) == {"warm", None}


def test_the_report_is_made_again_with_the_names(edited: RunConfig):
    run = Run(edited.run)
    before = read_manifest(run, "report")
    assert run_stage("figures", edited) == read_manifest(run, "figures"), "nothing but the report reads edits"
    after = run_stage("report", edited)
    assert before is not None
    assert before.digest != after.digest
    page = Path(run.report).read_text()
    assert "warm" in page
    assert "3 edits in overlay.json" in page
    for _ in range(3):
        undo_edit(run)
    assert read_overlay(run)[0].edits == ()
    assert run_stage("report", edited).digest == before.digest


def test_edits_survive_another_numbering_of_the_clusters(edited: RunConfig, caplog: pytest.LogCaptureFixture):
    run, before = Run(edited.run), RunTables(edited).frame()
    # Another fit gave the same clusters under other numbers, and the image that was split off a cluster elsewhere.
    moved = read_overlay(run)[0].edits[2]
    assert isinstance(moved, Split)
    for part in range(3):
        table = pq.read_table(run.assignments(part))
        clusters = (table["cluster"].to_numpy() + 1) % 3
        pq.write_table(table.set_column(2, table.schema.field(2), pa.array(clusters)), run.assignments(part))
    manifest = read_manifest(run, "assign")
    assert manifest is not None
    write_manifest(run, Manifest.model_validate(manifest.model_dump() | {"outputs": {}}))
    shown = shown_clusters(run)
    assert shown is not None
    assert shown.overlay.unfit == ()
    after = RunTables(edited).frame()
    assert after["name"].tolist() == before["name"].tolist()
    assert [clusters_named(edit) for edit in shown.overlay.edits] == [(1, 2), (1,), (0,)]
    assert clusters_named(read_overlay(run)[0].edits[1]) == (0,), "reading writes nothing"
    assert not caplog.records


def test_names_hold_only_for_the_assignment_that_they_were_given_to(pictures_run: Sealed, tmp_path: Path):
    named = shown_clusters(pictures_run.run)
    assert named is not None
    assert named.own_names == {0: None, 1: None, 2: None}
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    manifest = pictures_run.manifest("assign")
    write_manifest(run, Manifest.model_validate(manifest.model_dump() | {"extra": {"sizes": [24, 0, 0]}}))
    other = shown_clusters(run)
    assert other is not None
    assert other.own_names == {}
    storage.remove(run.manifest("assign"))
    assert shown_clusters(run) is None


def test_clusters_that_edits_name_are_known_by_their_typical_images(pictures_run: Sealed, tmp_path: Path):
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    run, rows = Run(str(tmp_path / "run")), RunTables(pictures_run.config).frame()
    named = pq.read_table(run.clusters, columns=["cluster", "exemplars"]).to_pylist()
    typical = {each["cluster"]: tuple(rows["key"].to_numpy()[each["exemplars"]]) for each in named}
    edit_clusters(run, Rename(cluster=1, name="x"))
    assert read_overlay(run)[0].fingerprints == {1: typical[1]}
    # A merged cluster is known by those of all that went into it.
    edit_clusters(run, Merge(clusters=(2, 1)))
    edit_clusters(run, Mark(cluster=2, mark="checked"))
    assert read_overlay(run)[0].fingerprints == {1: typical[1], 2: typical[2]}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"do": "drop", "cluster": 1}, "drop"),
        ({"do": "rename", "cluster": 1, "name": ""}, "at least 1 character"),
        ({"do": "merge", "clusters": [1]}, "at least 2 items"),
        ({"do": "mark", "cluster": -1, "mark": "x"}, "greater than or equal to 0"),
        ({"do": "rename", "cluster": 1, "name": "x", "path": "/etc"}, "unknown key"),
        ("rename", "should be a group of keys"),
    ],
)
def test_what_is_no_edit_is_one_line(content: Any, wanted: str):
    with pytest.raises(ConfigError, match=wanted) as refused:
        edit_clusters(Run("nowhere"), content)
    assert "\n" not in str(refused.value)


def test_a_run_without_typical_images_is_not_edited(pictures_run: Sealed, tmp_path: Path):
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    Path(run.manifest("label")).unlink()
    with pytest.raises(ArtefactError, match="has no typical images yet"):
        edit_clusters(run, Rename(cluster=0, name="x"))
    Path(run.manifest("assign")).unlink()
    assert shown_clusters(run) is None
