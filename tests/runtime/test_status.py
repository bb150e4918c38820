from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rayclust.config import validate
from rayclust.errors import ArtefactError
from rayclust.runtime.api import load_config
from rayclust.runtime.pipeline import save_config, stages_of
from rayclust.runtime.status import bottleneck, describe_manifest, facts, lines
from rayclust.store import storage
from rayclust.store.lock import run_lock
from rayclust.store.manifest import Manifest, Section
from rayclust.store.run import Run
from tests.sealed import Sealed
from tests.stages.runs import tree


def test_every_stage_has_its_line_with_counts_rejects_and_clusters(pictures_run: Sealed):
    shown = list(lines(pictures_run.config.run))
    assert shown[0] == f"{pictures_run.config.run}: kmeans, 3 clusters, pixels"
    assert [line.split()[0] for line in shown[1:-1]] == list(stages_of(pictures_run.config))
    assert "24 rows" in shown[1]
    assert "1 rejects (1 empty)" in shown[1]
    assert all("done in" in line and "again" not in line for line in shown[1:-1])
    assert shown[-1].split(maxsplit=1)[1] == "3 of 3 have images, the largest holds 33.3% of all"


def test_what_is_missing_half_done_or_outdated_is_said(pictures_run: Sealed, tmp_path: Path):
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    Path(run.manifest("neighbors")).unlink()
    Path(run.manifest("label")).unlink()
    shown = {line.split()[0]: line for line in lines(run.uri)}
    assert "not finished: 1 part is finished" in shown["neighbors"]
    assert "not started" in shown["label"]
    assert "runs again" in shown["evaluate"]
    assert all("runs again" not in shown[name] for name in ("train", "index"))
    save_config(validate(tree(run.uri, pictures_run.config.images.uri, encoder={"image_size": 9})))
    assert all("runs again" in line for line in lines(run.uri) if "done in" in line)


def test_a_run_that_has_only_begun_has_no_clusters_yet(tmp_path: Path):
    config = validate(tree(str(tmp_path), "/images"))
    save_config(config)
    shown = list(lines(str(tmp_path) + "/"))
    assert [line.split(maxsplit=1) for line in shown[1:-1]] == [[name, "not started"] for name in stages_of(config)]
    assert shown[-1].split(maxsplit=1) == ["next", f"rayclust run {Run(str(tmp_path)).config}"]
    assert load_config(Run(str(tmp_path)).config) == config, "the config that is named can be run"
    found = facts(str(tmp_path))
    assert (found["clusters"], found["driver"], found["driver_ended"]) == (3, None, False)
    assert {stage["state"] for stage in found["stages"]} == {"missing"}


def test_the_facts_of_a_finished_run_are_plain_data(pictures_run: Sealed):
    found = json.loads(storage.canonical_json(facts(pictures_run.config.run)))
    assert [stage["stage"] for stage in found["stages"]] == list(stages_of(pictures_run.config))
    assert {stage["state"] for stage in found["stages"]} == {"done"}
    assert (found["stages"][0]["counts"]["rows"], found["stages"][0]["reasons"]) == (24, {"empty": 1})
    assert (found["clusters"], found["occupied"], found["next"]) == (3, 3, None)
    assert found["entropy"] == pytest.approx(np.log(3))


def test_who_works_on_the_run_is_said(tmp_path: Path):
    save_config(validate(tree(str(tmp_path), "/images")))
    run = Run(str(tmp_path))
    with run_lock(run):
        last = list(lines(run.uri))[-1]
        lease = storage.read_json(run.lease)
    assert last.startswith(f"  driver     process {os.getpid()} on ")
    assert "has ended" not in last
    storage.write_json(run.lease, lease | {"born": "1"})
    assert list(lines(run.uri))[-1].endswith(", which has ended")


ENCODE = {"stage": "encode", "unit": "images", "done": 1200, "total": 3000, "per_second": 85.0, "note": "3 rejects"}


def test_a_stage_under_way_or_interrupted_says_how_far_it_is(tmp_path: Path):
    save_config(validate(tree(str(tmp_path), "/images")))
    run = Run(str(tmp_path))

    def line() -> str:
        return next(line for line in lines(run.uri) if line.split()[0] == "encode").split(maxsplit=1)[1]

    with run_lock(run):
        assert line() == "under way"
        storage.write_json(run.progress, ENCODE)
        assert line() == "under way: 1,200 of 3,000 images (40%), 3 rejects, 85 a second, about 21 s left"
    assert line() == "stopped at 1,200 of 3,000 images (40%), 3 rejects"
    storage.write_json(run.mark(0), {})
    assert line() == "stopped at 1,200 of 3,000 images (40%), 3 rejects; 1 part is finished"
    first = facts(run.uri)["stages"][0]
    assert (first["progress"], first["summary"]) == (ENCODE, line())


def test_an_interrupted_training_names_its_last_checkpoint(tmp_path: Path):
    save_config(validate(tree(str(tmp_path), "/images")))
    run = Run(str(tmp_path))
    storage.write_json(run.progress, ENCODE | {"stage": "train", "unit": "steps", "total": None, "note": "loss 0.5"})
    for step in (400, 1000):
        storage.write_json(run.at("checkpoints", "abc", f"step-{step:09d}", "state.json"), {})
    shown = {line.split()[0]: line for line in lines(run.uri)}
    assert shown["encode"].endswith("not started")
    assert shown["train"].endswith("stopped at 1,200 steps, loss 0.5; the last checkpoint is that of step 1,000")


def test_no_run_is_one_line(tmp_path: Path):
    with pytest.raises(ArtefactError, match="no run there"):
        list(lines(str(tmp_path)))


def test_the_busiest_workers_are_named_with_what_they_did():
    decoders = Section(name="decoders", workers=4, seconds=10, busy={"reading": 3.0, "decoding": 33.0})
    encoders = Section(name="encoders", workers=1, seconds=10, busy={"encoding": 5.0})
    idle = Section(name="writers", workers=1, seconds=0.0, busy={})
    assert bottleneck([encoders, decoders, idle]) == "decoding (decoders: 4 workers, busy 90 % of 10 s)"
    assert bottleneck([idle]) == bottleneck([]) == ""


def test_a_rate_is_of_the_call_that_finished_the_stage():
    parts = Section(name="parts", workers=2, seconds=9, busy={"working": 16.0}, done=100)
    sealed = Manifest(stage="assign", digest="", seconds=10, counts={"rows": 1000}, measured=(parts,))
    assert "1,000 rows, 10 a second (100 in the call that finished it), held up by" in describe_manifest(sealed)
    whole = sealed.model_copy(update={"measured": (parts.model_copy(update={"done": 1000}),)})
    assert "1,000 rows, 100 a second, held up by" in describe_manifest(whole)
    assert describe_manifest(sealed.model_copy(update={"measured": ()})).endswith("1,000 rows, 100 a second")


def test_workers_that_were_idle_for_the_most_part_waited():
    decoders = Section(name="decoders", workers=1, seconds=10, busy={"decoding": 0.9})
    assert bottleneck([decoders]) == "starting and waiting, then decoding (decoders: 1 worker, busy 9 % of 10 s)"


def test_a_long_phase_counts_more_than_a_short_busy_one():
    long = Section(name="parts", workers=2, seconds=100, busy={"working": 160.0})
    short = Section(name="index", workers=1, seconds=2, busy={"working": 2.1})
    assert bottleneck([short, long]).startswith("working (parts: 2 workers, busy 80 %")
    assert "busy 100 %" in bottleneck([short])


def test_an_unknown_encoder_is_said(vectors_run: Sealed):
    assert next(lines(vectors_run.config.run)).endswith("encoder unknown: no names, no search by text or image")
