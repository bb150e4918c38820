from __future__ import annotations

from typing import Any

import pytest

from rayclust.config import RunConfig, validate
from rayclust.methods import METHODS, build
from rayclust.methods.base import Pairing
from rayclust.runtime.pipeline import SELECT_K, STAGES, candidate_settings, stages_of
from rayclust.store.layout import STAGES as ORDER
from tests.stages.runs import tree


def config(**groups: Any) -> RunConfig:
    return validate(tree("/runs/one", "/images", **groups))


def test_a_run_with_a_number_has_no_choice_and_one_without_has():
    assert stages_of(config()) == tuple(name for name in ORDER if name != SELECT_K)
    assert stages_of(config(method={"clusters": "auto"})) == ORDER


def test_the_choice_is_read_by_train_and_report_where_there_is_one():
    for settings, readers in ((config(), set()), (config(method={"clusters": [2, 3]}), {"train", "report"})):
        assert {name for name, stage in STAGES.items() if SELECT_K in stage.inputs(settings)} == readers
        assert all(set(stage.needs) <= set(stage.inputs(settings)) for stage in STAGES.values())


@pytest.mark.parametrize("name", METHODS)
def test_training_waits_for_neighbors_only_where_the_method_draws_them(name: str):
    method = config(method={"name": name, "clusters": 3}).fitted()
    drawn = getattr(build(method, 8, 40, seed=0), "pairing", Pairing())
    assert method.draws_pairs == (drawn.columns > 0)
    assert ("neighbors" in STAGES["train"].inputs(config(method={"name": name, "clusters": 3}))) == method.draws_pairs


def test_every_stage_has_its_file():
    assert all(callable(stage.module.run) for stage in STAGES.values())


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
