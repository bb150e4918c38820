"""One candidate: its criteria against the plain definitions, and what it leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

from rayclust.config import validate
from rayclust.metrics.coding_length import coding_length
from rayclust.runtime import models
from rayclust.runtime.pipeline import StageContext, run_all
from rayclust.runtime.tasks import TaskResult
from rayclust.stages import select_k
from rayclust.stages.select_k import Search, examine
from rayclust.stages.train import StoredCheckpoints
from rayclust.store import filesystem
from tests.stages.conftest import Sealed, sealed_run
from tests.stages.planted import planted, planted_tree

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
    method = models.read_method(str(tmp_path / "run" / "selection" / "k-00003"), "select-k")
    labels = method.assign(select_k.torch.from_numpy(x)).argmax(1).numpy()
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
    assert of_two.unit(2) == of_three.unit(2)
    assert of_two.unit(2).digest != of_two.unit(3).digest
    assert (of_two.largest, of_three.largest) == (3, 9)


def test_rows_that_are_all_in_one_cluster_have_no_silhouette(rows_run: Sealed, tmp_path: Path, in_process: None):
    same = np.ones((12, 4), np.float32)
    settings = validate(planted_tree(tmp_path, same, method={"clusters": [2, 3]}))
    run_all(settings, stop_after="select-k")
    criteria = filesystem.read_json(str(tmp_path / "run" / "selection" / "k-00002.json"))["criteria"]
    assert "silhouette" not in criteria
    assert criteria["empty"] == 1
