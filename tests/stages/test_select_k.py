"""The number of clusters: chosen, adopted, and tried again only where something changed. Without a cluster."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

from rayclust.cli import run_command
from rayclust.config import RunConfig, validate
from rayclust.errors import ArtefactError, ConfigError, RayclustError
from rayclust.methods import METHODS
from rayclust.methods.kmeans import KMeans
from rayclust.metrics.internal import coding_length
from rayclust.metrics.selection import geometric_grid
from rayclust.runtime import pipeline, tensors
from rayclust.runtime.pipeline import Manifests, StageContext, run_all, run_stage, stages_of
from rayclust.runtime.results import load
from rayclust.runtime.status import lines
from rayclust.runtime.tasks import TaskResult
from rayclust.runtime.tensors import read_method
from rayclust.stages import select_k, train
from rayclust.stages.select_k import Search, _raise_failure, examine, run_trials
from rayclust.stages.train import StoredCheckpoints
from rayclust.store import storage
from rayclust.store.run import Run
from tests.stages.conftest import Sealed, sealed_run
from tests.stages.planted import planted, planted_tree
from tests.stages.runs import tree, write_yaml

TRUE = 4


def chosen(run: str) -> dict[str, Any]:
    found: dict[str, Any] = storage.read_json(Run(run).selection)
    return found


@pytest.fixture(scope="module")
def found_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    """Four planted groups and candidates from 2 to 6; read only."""
    folder = tmp_path_factory.mktemp("found")
    rows = planted(TRUE, seed=1, per_cluster=30)
    yield from sealed_run(validate(planted_tree(folder, rows, method={"clusters": [2, 3, 4, 5, 6]})))


@pytest.fixture
def copied(found_run: Sealed, tmp_path: Path, in_process: None) -> Sealed:
    """The finished run where a test may change it."""
    shutil.copytree(found_run.folder, tmp_path / "run", copy_function=shutil.copy2)
    return Sealed(found_run.config.model_copy(update={"run": str(tmp_path / "run")}))


def other(sealed: Sealed, **groups: Any) -> RunConfig:
    content = sealed.config.model_dump(mode="json", exclude_unset=True)
    for name, group in groups.items():
        content[name] = content.get(name, {}) | group
    return validate(content)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The candidates that are examined from now on."""
    found, before = list[int](), select_k.examine

    def note(search: select_k.Search, clusters: int) -> Any:
        found.append(clusters)
        return before(search, clusters)

    monkeypatch.setattr("rayclust.stages.select_k.examine", note)
    return found


def stamps(sealed: Sealed) -> dict[str, int]:
    return {name: Path(sealed.run.manifest(name)).stat().st_mtime_ns for name in stages_of(sealed.config)}


def again(sealed: Sealed, before: dict[str, int]) -> set[str]:
    return {name for name, time in stamps(sealed).items() if time != before[name]}


def test_the_true_number_is_chosen_and_written_with_its_reason(found_run: Sealed):
    written = chosen(found_run.config.run)
    assert written["chosen"] == TRUE
    assert written["rule"] == "vote"
    assert written["reason"].startswith(f"K = {TRUE}")
    assert [row["k"] for row in written["candidates"]] == [2, 3, 4, 5, 6]
    assert set(written["picks"]) >= {"coding_length", "knee", "silhouette", "davies_bouldin", "stability"}
    for row in written["candidates"]:
        assert {"coding_length", "silhouette", "calinski_harabasz", "davies_bouldin"} < set(row)
        assert {"neighbor_agreement", "modularity", "stability", "smallest", "largest", "empty"} < set(row)
        assert {"prediction_strength", "merged", "null_contrast"} < set(row)
        assert all(math.isfinite(value) for value in row.values())
        assert storage.read_json(found_run.run.candidate(row["k"]) + ".json")["criteria"].items() <= row.items()


def test_later_stages_work_with_the_chosen_number_and_every_way_into_the_run_knows_it(found_run: Sealed):
    assert storage.read_json(found_run.run.metrics)["clusters"] == TRUE
    assert len(found_run.manifest("assign").extra["sizes"]) == TRUE
    assert read_method(found_run.run.model_folder, "train").config.clusters == TRUE
    assert load(found_run.config.run).clusters.num_rows == TRUE
    assert load(found_run.config.run).config == found_run.config
    assert all(Manifests(found_run.config).of(stage) for stage in stages_of(found_run.config))


def test_the_model_is_the_one_that_train_fits_with_that_number(found_run: Sealed, tmp_path: Path, in_process: None):
    plain = other(found_run, method={"clusters": TRUE}).model_copy(update={"run": str(tmp_path / "plain")})
    run_all(plain)
    for path in ("model/weights.safetensors", "model/config.json", "model/metrics.parquet", "metrics.json"):
        assert (found_run.folder / path).read_bytes() == (tmp_path / "plain" / path).read_bytes(), path
    assert not (tmp_path / "plain" / "selection.json").exists()


def test_a_finished_run_is_left_as_it_is(copied: Sealed, examined: list[int]):
    before = stamps(copied)
    run_all(copied.config)
    assert again(copied, before) == set()
    assert examined == []


def test_another_list_tries_what_is_new_and_trains_again_only_for_another_model(copied: Sealed, examined: list[int]):
    before = stamps(copied)
    run_all(other(copied, method={"clusters": [3, 4, 5, 7]}))
    assert examined == [7]
    assert chosen(copied.config.run)["chosen"] == TRUE
    assert [row["k"] for row in chosen(copied.config.run)["candidates"]] == [3, 4, 5, 7]
    assert again(copied, before) == {"select-k", "report"}
    run_all(other(copied, method={"clusters": [2, 3]}))
    assert examined == [7]
    assert chosen(copied.config.run)["chosen"] in (2, 3)
    assert again(copied, before) == set(stages_of(copied.config)) - {"encode", "neighbors", "index", "map"}


def test_another_rule_chooses_again_without_a_trial(copied: Sealed, examined: list[int]):
    run_all(other(copied, select_k={"rule": "modularity"}))
    written = chosen(copied.config.run)
    assert written["rule"] == "modularity"
    assert written["chosen"] == written["picks"]["modularity"]
    assert examined == []


def test_candidates_of_other_settings_are_tried_again_and_the_old_ones_removed(copied: Sealed, examined: list[int]):
    run_all(other(copied, method={"clusters": [4, 5], "temperature": 0.3}), stop_after="select-k")
    assert examined == [4, 5]
    kept = sorted(path.name for path in (copied.folder / "selection").iterdir())
    assert kept == ["k-00004", "k-00004.json", "k-00005", "k-00005.json"]


def test_force_tries_all_again_and_gives_the_same_bytes(copied: Sealed, examined: list[int]):
    before = (copied.folder / "selection.json").read_bytes()
    run_stage("select-k", copied.config, force=True)
    assert examined == [2, 3, 4, 5, 6]
    assert (copied.folder / "selection.json").read_bytes() == before


def test_stopped_half_way_only_the_missing_candidates_are_tried(copied: Sealed, examined: list[int]):
    Path(copied.run.manifest("select-k")).unlink()
    for k in (3, 6):
        Path(copied.run.mark(k, "select-k")).unlink()
    (copied.folder / "selection" / "k-00005" / "weights.safetensors").unlink()
    before = (copied.folder / "selection.json").read_bytes()
    run_all(copied.config)
    assert examined == [3, 5, 6]
    assert (copied.folder / "selection.json").read_bytes() == before


def test_a_number_in_the_place_of_the_candidates_trains_with_it_and_goes_back_for_nothing(
    copied: Sealed, examined: list[int]
):
    settled = other(copied, method={"clusters": 3})
    run_all(settled)
    assert storage.read_json(copied.run.metrics)["clusters"] == 3
    assert run_stage("select-k", settled).outputs == {}
    run_all(copied.config)
    assert storage.read_json(copied.run.metrics)["clusters"] == TRUE
    assert examined == []


def test_status_tells_the_choice_and_that_there_is_none_yet(copied: Sealed):
    shown = list(lines(copied.config.run))
    said = f"{copied.config.run}: kmeans, {TRUE} clusters by select-k, encoder unknown: no names, no search"
    assert shown[0].startswith(said)
    [line] = [line for line in shown if line.split()[0] == "select-k"]
    assert "done in" in line
    assert f"5 candidates: K = {TRUE}" in line
    Path(copied.run.manifest("select-k")).unlink()
    shown = list(lines(copied.config.run))
    assert "clusters yet to be counted" in shown[0]
    assert "not finished: 5 parts are finished" in next(line for line in shown if line.split()[0] == "select-k")


def test_train_by_itself_waits_for_the_choice_and_the_index_does_not(copied: Sealed):
    Path(copied.run.manifest("select-k")).unlink()
    with pytest.raises(ArtefactError, match=r"train: the stage select-k of .* run `rayclust select-k RUN\.yaml` first"):
        run_stage("train", copied.config)
    assert run_stage("index", copied.config).counts["rows"]


def test_auto_refines_its_grid_around_the_best(tmp_path: Path, in_process: None):
    rows = planted(7, seed=0, per_cluster=20)
    content = planted_tree(tmp_path, rows, method={"clusters": "auto"}, select_k={"seeds": 1, "rule": "silhouette"})
    settings = validate(content)
    grid = geometric_grid(*settings.select_k.bounds(len(rows)))
    assert grid == tuple(sorted(set(grid)))
    assert (grid[0], grid[-1]) == (2, math.ceil(2 * math.sqrt(len(rows))))
    run_all(settings, stop_after="select-k")
    written = chosen(settings.run)
    assert written["chosen"] == 7
    tried = [row["k"] for row in written["candidates"]]
    assert set(grid) < set(tried)
    assert {6, 7, 8} <= set(tried)
    assert "stability" not in written["candidates"][0]


class CutKMeans(KMeans):
    """k-means of which the first K centres are a partition too: a method that needs no fit for each number."""

    def recut(self, clusters: int, seed: int | None = None) -> KMeans:
        cut = CutKMeans(self.config.model_copy(update={"clusters": clusters}), self.dimension, self.count, 0)
        order = torch.arange(len(self.centers)) if seed is None else torch.arange(len(self.centers)).flip(0)
        cut.centers.copy_(self.centers[order[:clusters]])
        cut.inertia.copy_(self.inertia)
        return cut


def test_a_method_that_is_cut_is_fitted_once_with_the_largest_candidate(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, examined: list[int]
):
    monkeypatch.setitem(METHODS, "kmeans", f"{__name__}:CutKMeans")
    fits, before = list[int](), train.fit

    def note(job: train.Job) -> dict[str, Any]:
        fits.append(job.config.method.clusters)
        return before(job)

    monkeypatch.setattr(select_k, "fit", note)
    rows = planted(TRUE, seed=2, per_cluster=30)
    settings = validate(planted_tree(tmp_path, rows, method={"clusters": [2, 4, 6]}))
    run_all(settings)
    assert (fits, examined) == ([6], [2, 4, 6])
    run, k = Run(settings.run), chosen(settings.run)["chosen"]
    whole, cut = (read_method(folder, "select-k") for folder in (run.selection_fit, run.model_folder))
    assert torch.equal(cut.centers, whole.centers[:k])
    assert 0 < chosen(settings.run)["candidates"][0]["stability"] < 1, "two seeds, two partitions"
    metrics = ("selection/fit/metrics.parquet", "model/metrics.parquet")
    assert pq.read_table(tmp_path / "run" / metrics[0]).equals(pq.read_table(tmp_path / "run" / metrics[1]))

    Path(run.manifest("select-k")).unlink()
    Path(run.mark(4, "select-k")).unlink()
    run_all(settings)
    assert (fits, examined) == ([6], [2, 4, 6, 4])
    run_all(other(Sealed(settings), method={"clusters": [2, 4, 8]}))
    assert (fits, examined[4:]) == ([6, 8], [2, 4, 8])


def test_candidates_above_the_rows_are_refused_before_anything_starts(copied: Sealed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select_k, "run_trials", lambda *arguments: pytest.fail("a trial was started"))
    with pytest.raises(ConfigError, match=r"method\.clusters = \[4, 500\]: 500 is above the number of rows, 120"):
        run_stage("select-k", other(copied, method={"clusters": [4, 500]}))
    with pytest.raises(ConfigError, match=r"select_k\.least = 200: must be at most the number of rows, 120"):
        run_stage("select-k", other(copied, method={"clusters": "auto"}, select_k={"least": 200}))


def test_the_choice_is_json_that_any_reader_takes(found_run: Sealed):
    def refuse(name: str) -> Any:
        pytest.fail(f"{name} in selection.json")

    json.loads((found_run.folder / "selection.json").read_text(), parse_constant=refuse)


SEEDS = {0: 6, 1: 4, 2: 9, 8: 2, 9: 12}


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_groups_are_counted_whatever_the_seed(seed: int, tmp_path: Path, in_process: None):
    """The same trials as over the cluster; one of these goes through Ray Tune below."""
    rows = planted(SEEDS[seed], seed, per_cluster=600 // SEEDS[seed])
    settings = validate(planted_tree(tmp_path, rows, seed=seed))
    run_all(settings, stop_after="select-k")
    assert chosen(settings.run)["chosen"] == SEEDS[seed]


def test_subspaces_are_counted_by_the_criteria_that_see_them(tmp_path: Path, in_process: None):
    """Three orthogonal subspaces of three dimensions: what measures distances splits them, at the end or near it."""
    rng = np.random.default_rng(0)
    bases = np.linalg.qr(rng.normal(size=(64, 64)))[0].T[:9].reshape(3, 3, 64)
    rows = np.einsum("nr,nrd->nd", rng.normal(size=(600, 3)), bases[np.arange(600) % 3])
    rows = (rows + 0.03 * rng.normal(size=rows.shape)).astype(np.float32)
    method = {"name": "cpp", "preset": "auto", "steps": 20, "clusters": list(range(2, 8))}
    settings = validate(planted_tree(tmp_path, rows, method=method))
    run_all(settings, stop_after="select-k")
    written = chosen(settings.run)
    assert (written["chosen"], written["picks"]["eigengap"], written["picks"]["feature_coding_length"]) == (3, 3, 3)
    assert written["picks"]["silhouette"] > 4
    assert written["evidence"]["eigengap"] > 0.8 > written["evidence"]["modularity"]


# Candidates over a real Ray Tune: chosen rightly, refused in one line, and finished after a kill.


def ended(**what: Any) -> Any:
    return SimpleNamespace(**({"error": None, "metrics": {"refused": None}} | what))


def test_a_trial_that_ended_well_is_no_failure():
    _raise_failure(7, ended())


def test_a_refusal_keeps_its_kind_and_names_the_candidate():
    with pytest.raises(ConfigError, match=r"^select-k: the candidate k = 7 failed: method\.beta = 0: too low$"):
        _raise_failure(7, ended(metrics={"refused": "method.beta = 0: too low", "kind": "ConfigError"}))


CRASHES = {
    "Traceback (most recent call last):\n  File x\nMemoryError: 9 GB\n\n": "MemoryError: 9 GB",
    "The actor died.\nValueError: x\nAn internal error occurred.": "ValueError: x",
    "The actor died.\n\tname: f\n\tpid: 3": "The actor died.",
    "": "RuntimeError",
}


@pytest.mark.parametrize("text", CRASHES)
def test_a_crash_is_one_line(text: str):
    with pytest.raises(RayclustError) as caught:
        _raise_failure(7, ended(error=RuntimeError(text), metrics=None))
    assert str(caught.value) == f"select-k: the candidate k = 7 failed: {CRASHES[text]}"


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "room"),
    [
        ({"CPU": 8}, 1, 0, 8),
        ({"CPU": 8}, 3, 0, 2),
        ({"CPU": 2}, 3, 0, 0),
        ({"CPU": 8, "GPU": 2}, 1, 1, 2),
        ({"CPU": 8, "GPU": 2}, 1, 0.25, 8),
        ({"CPU": 8}, 1, 1, 0),
    ],
)
def test_a_node_holds_as_many_trials_as_its_scarcest_resource_allows(
    node: dict[str, float],
    cpus: int,
    gpus: float,
    room: int,
    found_run: Sealed,
    monkeypatch: pytest.MonkeyPatch,
):
    at_once = []

    class Tuner:
        def __init__(self, trainable: Any, tune_config: Any, **others: Any) -> None:
            at_once.append(tune_config.max_concurrent_trials)

        def fit(self) -> list[Any]:
            return []

    monkeypatch.setattr("ray.tune.Tuner", Tuner)
    monkeypatch.setattr(select_k, "connect", lambda: None)
    monkeypatch.setattr(select_k, "in_driver", lambda: False)
    monkeypatch.setattr("rayclust.runtime.cluster.live_nodes", lambda labels: [node, node])
    config = other(found_run, select_k={"cpus_per_trial": cpus})
    search = Search(config, found_run.manifest("encode"), "digest", "settings", TRUE, gpus)
    run_trials(search, [2, 3], lambda running, ended: None)
    assert at_once == [max(1, 2 * room)]


def read_choice(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = storage.read_json(Run(str(folder / "run")).selection)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_planted_groups_are_counted_through_tune(tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]):
    rows = planted(SEEDS[1], 1, per_cluster=600 // SEEDS[1])
    run_all(validate(planted_tree(tmp_path, rows, seed=1)), stop_after="select-k")
    assert read_choice(tmp_path)["chosen"] == SEEDS[1]
    said = capfd.readouterr()
    assert said.out == "", "Tune talks"


def test_a_run_finds_its_own_number_and_goes_on_to_the_page(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    content = tree(
        str(tmp_path / "run"),
        "dataset:digits",
        images={"shard_size": 512},
        encoder={"batch_size": 256},
        method={"name": "kmeans", "clusters": "auto"},
        select_k={"least": 4, "most": 30, "seeds": 1, "rounds": 1, "max_concurrent": 1},
        resources={"workers": 1, "decode_workers": 1},
    )
    config = write_yaml(tmp_path / "RUN.yaml", content)
    assert run_command(["run", str(config)]) == 0
    found = read_choice(tmp_path)
    assert 10 / 1.5 <= found["chosen"] <= 10 * 1.5, "scanned digits are ten classes"
    metrics = storage.read_json(str(tmp_path / "run" / "metrics.json"))
    assert metrics["clusters"] == found["chosen"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Number of clusters" in page
    assert f"{found['chosen']} clusters were chosen" in page
    assert "clusters: auto" in page
    capsys.readouterr()
    assert run_command(["status", str(tmp_path / "run")]) == 0
    assert f"kmeans, {found['chosen']} clusters by select-k" in capsys.readouterr().out
    monkeypatch.setattr(pipeline, "_run", lambda *_: pytest.fail("a stage ran again"))
    assert run_command(["run", str(config)]) == 0


@pytest.mark.ray
def test_a_refused_trial_ends_the_stage_in_one_line(
    tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
):
    rows = planted(3, seed=0, per_cluster=20)
    method = {"name": "temi", "preset": "none", "heads": 1, "steps": 20, "batch_size": 32, "learning_rate": 1e30}
    content = planted_tree(tmp_path, rows, method=method | {"clusters": [2, 3]})
    config = write_yaml(tmp_path / "RUN.yaml", content)
    assert run_command(["neighbors", str(config)]) == 2  # encode comes first
    run_all(validate(content), stop_after="neighbors")
    capsys.readouterr()
    assert run_command(["select-k", str(config)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rayclust: select-k: the candidate k = ")
    assert "training loss = nan" in error


# One candidate: its criteria against the plain definitions, and what it leaves behind.


ROWS = planted(3, seed=0, per_cluster=25)


@pytest.fixture(scope="module")
def rows_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    """Three planted groups, tried as 2 and 3; read only."""
    folder = tmp_path_factory.mktemp("rows")
    yield from sealed_run(validate(planted_tree(folder, ROWS, method={"clusters": [2, 3]})))


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the rows on this node is a test's own."""
    monkeypatch.setenv("RAYCLUST_SCRATCH", str(tmp_path / "scratch"))


def search(sealed: Sealed, run: Path, **changes: Any) -> Search:
    """A search over a copy of the run's embeddings, with nothing tried yet."""
    for name in ("embeddings", "neighbors"):
        shutil.copytree(sealed.folder / name, run / name)
    config = sealed.config.model_copy(update={"run": str(run)} | changes)
    inputs = {name: sealed.manifest(name) for name in ("encode", "neighbors")}
    return Search.of(StageContext(config, sealed.run, f"digest-of-{run.parent.name}", inputs))


def test_criteria_are_those_of_the_first_seeds_partition(rows_run: Sealed, tmp_path: Path):
    found = examine(search(rows_run, tmp_path / "run"), 3).extra["criteria"]
    x = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    method = tensors.read_method(str(tmp_path / "run" / "selection" / "k-00003"), "select-k")
    labels = method.predict_proba(select_k.torch.from_numpy(x)).argmax(1).numpy()
    assert np.bincount(labels).tolist() == [25, 25, 25]
    assert found["coding_length"] == pytest.approx(coding_length(x, labels, 0.1) / len(x), rel=1e-3)
    assert found["silhouette"] == pytest.approx(silhouette_score(x, labels, metric="cosine"), rel=1e-2)
    assert found["calinski_harabasz"] == pytest.approx(calinski_harabasz_score(x, labels), rel=1e-2)
    assert found["davies_bouldin"] == pytest.approx(davies_bouldin_score(x, labels), rel=1e-2)
    assert found["neighbor_agreement"] == 1.0
    assert found["modularity"] == pytest.approx(1 - 1 / 3)
    assert (found["smallest"], found["largest"], found["empty"], found["occupied"]) == (25, 25, 0, 3)
    assert found["entropy"] == pytest.approx(1)


def digests(result: TaskResult) -> dict[str, str]:
    return {path: written["digest"] for path, written in result.outputs.items()}


def test_the_same_candidate_gives_the_same_bytes_and_leaves_no_checkpoints(rows_run: Sealed, tmp_path: Path):
    first = examine(search(rows_run, tmp_path / "a" / "run"), 2)
    second = examine(search(rows_run, tmp_path / "b" / "run"), 2)
    assert digests(first) == digests(second)
    assert set(first.outputs) == {
        "selection/k-00002/weights.safetensors",
        "selection/k-00002/config.json",
        "selection/k-00002/metrics.parquet",
        "selection/k-00002.json",
    }
    assert not list((tmp_path / "a" / "run" / "checkpoints").glob("*/*"))


def test_a_sample_of_the_rows_is_enough_for_what_is_taken_on_one(rows_run: Sealed, tmp_path: Path):
    options = rows_run.config.select_k.model_copy(update={"rows": 30})
    found = examine(search(rows_run, tmp_path / "run", select_k=options), 3).extra["criteria"]
    assert found["largest"] == 25, "sizes are of all rows"
    assert found["silhouette"] > 0.5


def test_every_fit_of_a_candidate_has_a_seed_of_its_own(
    rows_run: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seeds, build_for = [], select_k.build_for

    def note(rows: Any, config: Any, seed: int) -> Any:
        seeds.append(seed)
        return build_for(rows, config, seed)

    monkeypatch.setattr(select_k, "build_for", note)
    options = rows_run.config.select_k.model_copy(update={"seeds": 3})
    examine(search(rows_run, tmp_path / "run", select_k=options, seed=7), 3)
    assert seeds == [7, 8, 9]


def test_a_killed_trial_goes_on_from_the_checkpoint_of_the_seed_it_was_at(
    rows_run: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    method = validate(
        rows_run.config.model_dump(mode="json", exclude_unset=True)
        | {"method": {"name": "temi", "clusters": [2, 3], "preset": "none", "heads": 2, "steps": 60, "batch_size": 32}}
    ).method
    resources = rows_run.config.resources.model_copy(update={"checkpoint_seconds": 1e-9})
    changes = {"method": method, "resources": resources}
    whole = examine(search(rows_run, tmp_path / "whole" / "run", **changes), 3)
    stopped = search(rows_run, tmp_path / "stopped" / "run", **changes)
    before, saved = StoredCheckpoints.save, list[int]()

    def save_and_die(self: StoredCheckpoints, step: int, *content: Any) -> None:
        before(self, step, *content)
        saved.append(step)
        if len(saved) == 5:  # three of the first seed, two of the second
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoredCheckpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            examine(stopped, 3)
        examine(stopped, 3)
    assert saved == [20, 40, 60, 20, 40, 60]
    assert list((tmp_path / "stopped").glob("run/checkpoints/*/*")) == []
    for name in ("weights.safetensors", "metrics.parquet", "config.json"):
        path = f"selection/k-00003/{name}"
        assert (tmp_path / "whole/run" / path).read_bytes() == (tmp_path / "stopped/run" / path).read_bytes()
    assert whole.extra["k"] == 3


def test_a_candidates_unit_is_another_for_another_number_and_the_same_for_another_list(
    rows_run: Sealed, tmp_path: Path
):
    of_two = search(rows_run, tmp_path / "a")
    content = rows_run.config.model_dump(mode="json", exclude_unset=True)
    longer = validate(content | {"method": {"name": "kmeans", "clusters": [2, 3, 9]}})
    of_three = search(rows_run, tmp_path / "b", select_k=longer.select_k, method=longer.method)
    assert of_two.task(2) == of_three.task(2)
    assert of_two.task(2).digest != of_two.task(3).digest
    assert (of_two.largest, of_three.largest) == (3, 9)


def test_rows_that_are_all_in_one_cluster_have_no_silhouette(rows_run: Sealed, tmp_path: Path, in_process: None):
    same = np.ones((12, 4), np.float32)
    settings = validate(planted_tree(tmp_path, same, method={"clusters": [2, 3]}))
    run_all(settings, stop_after="select-k")
    criteria = storage.read_json(str(tmp_path / "run" / "selection" / "k-00002.json"))["criteria"]
    assert "silhouette" not in criteria
    assert criteria["empty"] == 1
