from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayclust.errors import ArtefactError, ConfigError, HeldError
from rayclust.runtime.edits import ShownClusters
from rayclust.store.overlay import (
    Edit,
    Edited,
    Mark,
    Merge,
    Overlay,
    Rename,
    Split,
    clusters_named,
    read_overlay,
    refit,
    write_overlay,
)
from rayclust.store.run import Run

KEYS = pa.array(["a0", "a1", "b0", "b1", "c0", "c1"])
CLUSTERS = np.array([0, 0, 1, 1, 2, 2])
TYPICAL = {0: ["a0", "a1"], 1: ["b0", "b1"], 2: ["c0", "c1"]}


def overlay(*edits: Edit) -> Overlay:
    final = Edited.by(edits, 3).final
    ends = {int(final[k]) for edit in edits for k in clusters_named(edit)}
    typical = {k: tuple(keys) for k, keys in TYPICAL.items() if int(final[k]) in ends}
    return Overlay(assign="first", clusters=3, fingerprints=typical, edits=edits)


def shown(*edits: Edit) -> list[int]:
    return Edited.by(edits, 3).of(CLUSTERS, KEYS).tolist()


def test_edits_take_effect_in_their_order():
    assert shown() == [0, 0, 1, 1, 2, 2]
    assert shown(Merge(clusters=(2, 0))) == [2, 2, 1, 1, 2, 2]
    # An image that is not in the cluster at that time stays: b1 joins only with the merge before the split.
    split = Split(cluster=0, keys=("a1", "b1"))
    assert shown(split) == [0, 3, 1, 1, 2, 2]
    assert shown(Merge(clusters=(0, 1)), split) == [0, 3, 0, 3, 2, 2]
    # What was split can be merged, and split again under the next number.
    assert shown(split, Merge(clusters=(2, 3)), Split(cluster=2, keys=("a1", "c0"))) == [0, 4, 1, 1, 4, 2]


def test_new_images_have_no_keys_and_follow_merges_alone():
    edited = Edited.by((Merge(clusters=(0, 1)), Split(cluster=0, keys=("a0",))), 3)
    assert edited.of(CLUSTERS).tolist() == [0, 0, 0, 0, 2, 2]
    assert edited.of(CLUSTERS, pa.chunked_array([KEYS[:3], KEYS[3:]])).tolist() == [3, 0, 0, 0, 2, 2]


def test_names_and_marks_belong_to_what_is_shown():
    edits = (
        Rename(cluster=1, name="cats"),
        Merge(clusters=(1, 0)),
        Split(cluster=1, keys=("b0",), name="kittens"),
        Mark(cluster=1, mark="checked"),
        Mark(cluster=2, mark="junk"),
        Mark(cluster=2, mark=None),
    )
    edited = Edited.by(edits, 3)
    assert edited.shown == [1, 2, 3]
    assert ShownClusters(Overlay(), edited, {0: "dogs", 1: "pets", 2: "cars"}).names == {
        1: "cats",
        2: "cars",
        3: "kittens",
    }
    assert edited.marks == {1: "checked"}


@pytest.mark.parametrize(
    ("edits", "wanted"),
    [
        ((Rename(cluster=3, name="x"),), "edit 1, rename: there is no cluster 3 among 3"),
        ((Merge(clusters=(0, 1)), Mark(cluster=1, mark="x")), "edit 2, mark: there is no cluster 1, it is part of 0"),
        ((Merge(clusters=(1, 1)),), "names a cluster twice"),
    ],
)
def test_edits_of_clusters_that_are_not_there_are_refused(edits: tuple[Edit, ...], wanted: str):
    with pytest.raises(ConfigError, match=wanted):
        Edited.by(edits, 3)


def test_after_another_assignment_clusters_are_found_by_their_typical_images():
    before = overlay(
        Rename(cluster=0, name="cats"),
        Merge(clusters=(1, 2)),
        Split(cluster=1, keys=("c1",), name="trucks"),
        Rename(cluster=3, name="lorries"),
    )
    assert before.fingerprints == {cluster: tuple(keys) for cluster, keys in TYPICAL.items()}
    # The same groups under other numbers, among five.
    new = {"a0": 4, "a1": 4, "b0": 2, "b1": 2, "c0": 0, "c1": 0}
    after = refit(before, "second", 5, new)
    assert after.unfit == ()
    edited = Edited.by(after.edits, after.clusters)
    assert edited.of(np.array(list(new.values())), pa.array(list(new))).tolist() == [4, 4, 2, 2, 2, 5]
    assert ShownClusters(after, edited, {}).names == {1: None, 2: None, 3: None, 4: "cats", 5: "lorries"}
    # And back: nothing was lost on the way.
    assert refit(after, "first", 3, dict(zip(KEYS.to_pylist(), CLUSTERS.tolist(), strict=True))) == before


def test_what_no_longer_fits_is_said_and_kept_apart():
    before = overlay(
        Rename(cluster=0, name="cats"),
        Split(cluster=1, keys=("b1",)),
        Rename(cluster=3, name="kittens"),
        Rename(cluster=2, name="cars"),
    )
    # Cluster 0 is torn apart; of cluster 1 only the image that was split off is gone elsewhere; 2 is whole.
    after = refit(before, "second", 3, {"a0": 0, "a1": 1, "b0": 2, "b1": 2, "c0": 1, "c1": 1})
    assert [edit.model_dump() for edit in after.edits] == [
        {"do": "split", "cluster": 2, "keys": ("b1",), "name": None},
        {"do": "rename", "cluster": 3, "name": "kittens"},
        {"do": "rename", "cluster": 1, "name": "cars"},
    ]
    assert [(each.edit, each.reason) for each in after.unfit] == [
        (Rename(cluster=0, name="cats"), "the typical images of cluster 0 no longer lie together")
    ]
    # The images of a split are gone: so is what was said of it.
    gone = refit(before, "third", 3, {"a0": 0, "a1": 0, "b0": 1, "c0": 2, "c1": 2})
    assert [each.reason for each in gone.unfit] == [
        "the typical images of cluster 1 no longer lie together",
        "the typical images of cluster 3 no longer lie together",
    ]
    assert [clusters_named(edit) for edit in gone.edits] == [(0,), (2,)]


def test_clusters_that_have_become_one_keep_the_edits_of_the_larger_or_of_all_that_were_merged():
    joined = {"a0": 0, "a1": 0, "b0": 0, "b1": 0, "c0": 1, "c1": 1}
    names = (Rename(cluster=0, name="cats"), Rename(cluster=1, name="dogs"))
    after = refit(overlay(*names), "second", 2, joined)
    assert [edit.model_dump() for edit in after.edits] == [{"do": "rename", "cluster": 0, "name": "cats"}]
    assert after.unfit[0].reason == "cluster 1 lies in cluster 0 with cluster 0"
    merged = refit(overlay(Merge(clusters=(1, 0)), Rename(cluster=1, name="pets")), "second", 2, joined)
    assert [edit.model_dump() for edit in merged.edits] == [{"do": "rename", "cluster": 0, "name": "pets"}]
    assert merged.unfit == ()


def test_the_file_reads_back_and_two_writers_do_not_undo_each_other(tmp_path: Path):
    run = Run(str(tmp_path))
    assert read_overlay(run) == (Overlay(), None)
    written = overlay(Rename(cluster=0, name="cats"), Split(cluster=0, keys=("a0",)))
    version = write_overlay(run, written, None)
    assert read_overlay(run) == (written, version)
    with pytest.raises(HeldError, match="load them again"):
        write_overlay(run, Overlay(), None)
    assert write_overlay(run, Overlay(), version) != version
    (tmp_path / "overlay.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ArtefactError, match=r"overlay.json: is not a list of edits: version = 2"):
        read_overlay(run)
