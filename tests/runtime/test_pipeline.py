"""What runs again and what does not, without a cluster."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayclust.cli import run_command
from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, HeldError
from rayclust.methods import METHODS, build, find, reads_pixels
from rayclust.methods.base import Pairing
from rayclust.runtime import cluster, pipeline
from rayclust.runtime.api import quick
from rayclust.runtime.pipeline import (
    COUNTERPARTS,
    CURATE,
    SELECT_K,
    STAGES,
    Manifests,
    Stage,
    StageContext,
    StageResult,
    content_digest,
    run_all,
    run_stage,
    stage_digest,
    stages_of,
)
from rayclust.stages import NAMES as ORDER
from rayclust.stages.select_k import candidate_settings
from rayclust.store import storage
from rayclust.store.lock import LockOwner, RunLock, process_start_time
from rayclust.store.manifest import Manifest, Output, StageOutputs
from rayclust.store.run import Run
from tests.sealed import Sealed
from tests.stages.runs import tree, write_tars, write_yaml


def config(**groups: Any) -> RunConfig:
    return validate(tree("/runs/one", "/images", **groups))


def digests(settings: RunConfig) -> dict[str, str]:
    return {name: stage_digest(stage, settings, {}) for name, stage in STAGES.items() if name != COUNTERPARTS}


def test_stages_come_after_what_they_read_and_in_the_promised_order():
    names = list(STAGES)
    assert tuple(names) == ORDER
    for name, stage in STAGES.items():
        assert all(names.index(need) < names.index(name) for need in stage.needs + stage.own_space_needs)


OF_FEATURES = {"neighbors", "select-k", "train", "assign", "label", "curate", "evaluate", "map", "figures"}

CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "the encoder": ({"encoder": {"image_size": 9}}, {"encode", "label"}),
    "precision": ({"encoder": {"precision": "bf16"}}, {"encode", "label"}),
    "labels": ({"images": {"labels": "none"}}, {"encode"}),
    "the size of shards": ({"images": {"shard_size": 17}}, {"encode"}),
    "a limit of images": ({"images": {"max_pixels": 1000}}, {"encode"}),
    "the share of rejects": ({"images": {"max_reject_share": 0.5}}, set()),
    "centring": ({"features": {"center": False}}, OF_FEATURES),
    "z-scores": ({"features": {"standardize": True}}, OF_FEATURES),
    "neighbours": ({"neighbors": {"k": 6}}, {"neighbors"}),
    "clusters": ({"method": {"clusters": 4}}, {"train"}),
    "the temperature": ({"method": {"temperature": 0.2}}, {"select-k", "train"}),
    "how candidates are measured": ({"select_k": {"rows": 10}}, {"select-k"}),
    "how one is chosen": ({"select_k": {"rule": "knee"}}, {"select-k"}),
    "where candidates are tried": ({"select_k": {"cpus_per_trial": 2, "max_concurrent": 1}}, set()),
    "the seed": ({"seed": 1}, {"select-k", "train", "label", "curate", "index", "evaluate", "map", "figures"}),
    "exemplars": ({"label": {"exemplars": 3}}, {"label"}),
    "prompts": ({"label": {"templates": ["a {}"]}}, {"label"}),
    "the index": ({"index": {"kind": "ivf"}}, {"index"}),
    "the sample": ({"evaluate": {"silhouette_rows": 10}}, {"evaluate"}),
    "the map's sample": ({"map": {"rows": 9}}, {"map"}),
    "curation": ({"curate": {"preset": "list"}}, {"curate"}),
    "thumbnails": ({"report": {"thumbnail": 64}}, {"report"}),
    "workers": ({"resources": {"workers": 7}}, set()),
    "fewest workers": ({"resources": {"min_workers": 1}}, set()),
    "checkpoints": ({"resources": {"checkpoint_seconds": 5}}, set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_the_digests_of_the_stages_that_depend_on_it_and_of_no_other(name: str):
    groups, changed = CHANGES[name]
    before, after = digests(config()), digests(config(**groups))
    assert {stage for stage in before if before[stage] != after[stage]} == changed


def test_a_value_set_by_hand_counts_even_if_it_is_the_default():
    left_open = config(method={"name": "temi", "clusters": 3})
    by_hand = config(method={"name": "temi", "clusters": 3, "beta": left_open.method.beta})  # type: ignore[union-attr]
    assert left_open.method == by_hand.method
    assert digests(left_open)["train"] != digests(by_hand)["train"]


def test_where_the_run_lies_is_in_no_digest():
    assert digests(validate(tree("/a", "/images"))) == digests(validate(tree("memory://b/c", "/other")))


def test_another_list_of_words_under_the_same_name_names_again(tmp_path: Path):
    words = tmp_path / "words.txt"
    settings = config(label={"vocabulary": str(words)})
    seen = set()
    for text in (None, "dog\ncat\n", "dog\ncat\nbird\n"):
        if text is not None:
            words.write_text(text)
        seen.add(digests(settings)["label"])
    assert len(seen) == 3
    assert digests(settings)["label"] in seen


def manifest(**changes: Any) -> Manifest:
    output = Output(digest="d", size=1)
    return Manifest(**({"stage": "encode", "digest": "x", "outputs": {"a": output}, "seconds": 1.0} | changes))


def test_what_was_written_decides_about_later_stages_not_when_or_from_what():
    digest = content_digest(manifest())
    assert content_digest(manifest(seconds=9.0, digest="y", versions={"torch": "9"}, inputs={"a": "b"})) == digest
    assert content_digest(manifest(outputs={"a": Output(digest="e", size=1)})) != digest
    assert content_digest(manifest(extra={"parts": [1]})) != digest
    train, longer = STAGES["train"], manifest(extra={"parts": [1]})
    assert stage_digest(train, config(), {"encode": manifest()}) != stage_digest(train, config(), {"encode": longer})


@pytest.fixture
def copied(pictures_run: Sealed, tmp_path: Path, in_process: None) -> Sealed:
    """A finished run that a test may change."""
    shutil.copytree(pictures_run.folder, tmp_path / "run", copy_function=shutil.copy2)
    return Sealed(pictures_run.config.model_copy(update={"run": str(tmp_path / "run")}))


def stamps(sealed: Sealed) -> dict[str, int]:
    return {name: Path(sealed.run.manifest(name)).stat().st_mtime_ns for name in stages_of(sealed.config)}


def changed(sealed: Sealed, **groups: Any) -> RunConfig:
    return validate(tree(sealed.config.run, sealed.config.images.uri, **groups))


def test_a_finished_run_is_left_as_it_is(copied: Sealed):
    before = stamps(copied)
    run_all(copied.config)
    assert stamps(copied) == before


def test_a_stage_by_itself_refuses_inputs_of_another_config(copied: Sealed):
    for other in (
        changed(copied, encoder={"image_size": 9}),
        changed(copied, images={"labels": "none"}),
        changed(copied, features={"center": False}),
    ):
        with pytest.raises(ArtefactError, match=r"evaluate: the stage \w+ of .* is not finished for this"):
            run_stage("evaluate", other)
    assert storage.read_json(copied.run.config)["encoder"]["image_size"] == 8, "what is sealed lost its config"
    assert run_stage("evaluate", changed(copied, evaluate={"silhouette_rows": 5})).counts["rows"] == 24


def test_a_stage_by_itself_refuses_inputs_made_from_what_has_changed_since(copied: Sealed):
    other = changed(copied, method={"clusters": 2})
    run_stage("train", other)
    with pytest.raises(ArtefactError, match="label: the stage assign of"):
        run_stage("label", other)
    assert Manifests(other).of("index") is not None


def test_other_neighbors_leave_a_training_alone_that_draws_none(copied: Sealed):
    other = changed(copied, neighbors={"k": 3})
    assert Manifests(other).of("evaluate") is None
    assert Manifests(other).of("assign") is not None
    run_stage("neighbors", other)
    assert run_stage("evaluate", other).counts["rows"] == 24


def test_a_config_that_cannot_run_leaves_the_run_and_its_config_alone(copied: Sealed):
    before = stamps(copied)
    with pytest.raises(Exception, match="nowhere"):
        run_all(changed(copied, encoder={"name": "timm/resnet18", "pretrained": "/nowhere/w.safetensors"}))
    assert storage.read_json(copied.run.config)["encoder"]["name"] == "pixels"
    assert stamps(copied) == before
    assert all(Manifests(copied.config).of(name) for name in stages_of(copied.config))


def test_force_does_again_what_is_sealed_unit_by_unit_and_gives_the_same_bytes(copied: Sealed):
    part = Path(copied.run.assignments(0))
    before, time = part.read_bytes(), part.stat().st_mtime_ns
    run_stage("assign", copied.config)
    assert part.stat().st_mtime_ns == time
    run_stage("assign", copied.config, force=True)
    assert part.stat().st_mtime_ns != time
    assert part.read_bytes() == before


def test_killed_before_the_seal_only_the_unmarked_parts_are_done_again(copied: Sealed):
    Path(copied.run.manifest("assign")).unlink()
    Path(copied.run.mark(2, "assign")).unlink()
    times = [Path(copied.run.assignments(i)).stat().st_mtime_ns for i in (0, 2)]
    run_all(copied.config)
    assert Path(copied.run.assignments(0)).stat().st_mtime_ns == times[0]
    assert Path(copied.run.assignments(2)).stat().st_mtime_ns != times[1]


def test_a_stage_that_is_killed_while_it_runs_again_is_not_sealed(copied: Sealed, monkeypatch: pytest.MonkeyPatch):
    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    assert Path(copied.run.manifest("evaluate")).exists()
    monkeypatch.setattr("rayclust.stages.evaluate.run_remotely", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stage("evaluate", copied.config, force=True)
    assert not Path(copied.run.manifest("evaluate")).exists(), "it would stand for outputs that may be half new"


def test_a_shorter_input_leaves_no_part_of_the_longer_one(tmp_path: Path, in_process: None):
    images = write_tars(tmp_path / "images", shards=3, per_shard=9)
    settings = validate(tree(str(tmp_path / "run"), str(images)))
    run_all(settings)
    (images / "shard-001.tar").unlink()
    sealed = run_all(settings)
    assert sealed["encode"].extra["parts"] == [9, 9]
    for folder in ("embeddings", "neighbors", "assignments"):
        found = sorted(path.name for path in (tmp_path / "run" / folder).iterdir())
        assert found == ["part-00000.parquet", "part-00001.parquet"], folder
    write_again = tmp_path / "again"
    run_all(validate(tree(str(write_again), str(images))))
    for path in sorted((tmp_path / "run" / "embeddings").iterdir()):
        assert path.read_bytes() == (write_again / "embeddings" / path.name).read_bytes()


def other_process(run: Run) -> Iterator[LockOwner]:
    """Somebody who is at work on the run, and will not let go."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        holder = RunLock(run).owner.model_copy(update={"pid": process.pid, "born": process_start_time(process.pid)})
        storage.write_json(run.lease, holder.model_dump(mode="json"))
        yield holder
        process.kill()


@pytest.mark.parametrize("command", ["run", "encode", "report"])
def test_a_run_that_another_works_on_is_left_alone(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: None
):
    write_tars(tmp_path / "images", shards=1, per_shard=6)
    path = write_yaml(tmp_path / "RUN.yaml", tree(str(tmp_path / "run"), str(tmp_path / "images")))
    for holder in other_process(Run(str(tmp_path / "run"))):
        assert run_command([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert (
            error == f"rayclust: {tmp_path / 'run'}: is worked on by {holder}; wait for it to end, or stop it first\n"
        )
        assert [file.name for file in (tmp_path / "run").iterdir()] == ["lease.json"]
    assert run_command(["encode", str(path)]) == 0  # its process is gone
    assert not (tmp_path / "run" / "lease.json").exists()


def test_a_driver_that_lost_the_run_meanwhile_does_not_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None
):
    write_tars(tmp_path / "images", shards=1, per_shard=6)
    settings = validate(tree(str(tmp_path / "run"), str(tmp_path / "images")))
    run = Run(settings.run)

    def slept(self: RunLock) -> None:
        raise HeldError("taken over")

    monkeypatch.setattr(RunLock, "check", slept)
    with pytest.raises(HeldError, match="taken over"):
        run_stage("encode", settings)
    assert not storage.exists(run.manifest("encode"))


def test_every_stage_with_a_gpu_route_computes_on_a_gpu_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    node = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {}}
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr("ray.nodes", lambda: [node])
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(namespace=cluster.OWN))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    given = dict[str, float]()

    def record(stage: Stage, context: StageContext) -> StageResult:
        given[stage.name] = context.config.resources.gpus
        return StageResult({}, {"rows": 1})

    monkeypatch.setattr(Stage, "run", record)
    stages = {name: replace(stage, outputs=StageOutputs) for name, stage in STAGES.items()}
    monkeypatch.setattr(pipeline, "STAGES", stages)
    write_tars(tmp_path / "images", shards=1, per_shard=3)
    quick(str(tmp_path / "images"), str(tmp_path / "run"), clusters="2", method="kmeans", encoder=None)
    on_gpu = {name for name, stage in STAGES.items() if stage.on_gpu} - {SELECT_K, COUNTERPARTS}
    assert {"encode", "train"} <= on_gpu
    assert {name for name, gpus in given.items() if gpus == 1} == on_gpu
    saved = storage.read_json(Run(str(tmp_path / "run")).config)
    assert saved["encoder"]["name"] == "open_clip/ViT-L-14"
    assert "resources" not in saved, "another machine has other GPUs"


def test_a_run_with_a_number_has_no_choice_and_one_without_has():
    usual = tuple(name for name in ORDER if name not in (SELECT_K, COUNTERPARTS, CURATE))
    assert stages_of(config()) == usual
    assert set(stages_of(config(method={"clusters": "auto"}))) == {*usual, SELECT_K}


def test_the_choice_is_read_by_train_and_report_where_there_is_one():
    for settings, readers in ((config(), set()), (config(method={"clusters": [2, 3]}), {"train", "report"})):
        assert {name for name, stage in STAGES.items() if SELECT_K in stage.inputs(settings)} == readers
        assert all(set(stage.needs) <= set(stage.inputs(settings)) for stage in STAGES.values())


@pytest.mark.parametrize("name", METHODS)
def test_training_waits_for_neighbors_only_where_the_method_draws_them(name: str):
    groups: dict[str, Any] = {"method": {"name": name, "clusters": 3}}
    if reads_pixels(name):
        groups |= {"encoder": {"normalize": False}, "features": {"center": False, "normalize": False}}
    settings = config(**groups)
    width: Any = {"embeddings": 12} if find(name).spaces is None else 12
    if name == "cpp_pixels":
        pytest.skip("reads the weights of its backbone when it is built")
    drawn = getattr(build(settings.method, width, 40, seed=0), "pairing", Pairing())
    assert settings.method.draws_pairs == (drawn.columns > 0)
    assert ("neighbors" in STAGES["train"].inputs(settings)) == settings.method.draws_pairs


def test_every_stage_has_its_file():
    for name, stage in STAGES.items():
        assert stage.name == name
        assert callable(importlib.import_module(f"rayclust.stages.{name.replace('-', '_')}").run)
    with pytest.raises(KeyError):
        STAGES["dreams"]


SAME = {
    "other candidates": {"method": {"clusters": [2, 9]}},
    "auto": {"method": {"clusters": "auto"}},
    "the rule": {"select_k": {"rule": "knee"}},
    "the resources of a trial": {"select_k": {"cpus_per_trial": 4}},
}
OTHER = {
    "the method": {"method": {"temperature": 0.2}},
    "the seeds": {"select_k": {"seeds": 5}},
    "the sample": {"select_k": {"rows": 50}},
    "the distortion": {"select_k": {"distortion": 0.5}},
    "the features": {"features": {"center": False}},
    "the seed": {"seed": 3},
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_a_candidate_depends_on_what_it_is_made_and_measured_by_and_not_on_the_others(name: str):
    groups = dict((SAME | OTHER)[name])
    groups["method"] = {"clusters": [2, 3]} | groups.get("method", {})  # type: ignore[operator]
    before = candidate_settings(config(method={"clusters": [2, 3]}))
    assert (candidate_settings(config(**groups)) == before) == (name in SAME)


def test_a_training_does_not_depend_on_what_a_worker_has_room_for():
    settings = STAGES["train"].settings
    temi = {"name": "temi", "clusters": 3}
    assert settings(config(method=temi | {"worker_memory": 80})) == settings(config(method=temi))
    assert settings(config(method=temi | {"heads": 3})) != settings(config(method=temi))


PINNED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("stage_digests.json").read_text())
"""Digests that earlier versions have written: another one would run finished stages again."""


@pytest.mark.parametrize("name", PINNED)
def test_equal_configs_keep_the_digests_of_earlier_versions(name: str):
    settings = validate(PINNED[name]["config"])
    found = {stage: stage_digest(STAGES[stage], settings, {}) for stage in stages_of(settings)}
    assert found == PINNED[name]["digests"]


def test_declarations_of_stages_bring_neither_torch_nor_ray_nor_scipy():
    """`status` and a run with nothing to do read every declaration."""
    code = (
        "import sys; from rayclust.runtime.pipeline import STAGES\n"
        "list(STAGES.values())\n"
        "print([name for name in ('torch', 'ray', 'scipy', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
