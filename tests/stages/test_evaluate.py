from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayclust.config import RunConfig
from rayclust.features import FeatureTransform
from rayclust.metrics import probes
from rayclust.runtime.pipeline import run_all, run_stage
from rayclust.runtime.rows import row_starts, transform_of
from rayclust.stages import evaluate
from rayclust.stages.evaluate import _columns, _sample, _Scoring
from rayclust.store.manifest import EncodeOutputs
from rayclust.store.run import Run
from tests.stages.conftest import Sealed
from tests.stages.own_space import AllAlike, EachAlone, OneDirection, use


def metrics(sealed: Sealed) -> dict:
    return json.loads((sealed.folder / "metrics.json").read_text())


def test_labels_of_some_rows_score_those_rows(vectors_run: Sealed):
    found = metrics(vectors_run)
    assert (found["rows"], found["labelled"], found["classes"], found["clusters"]) == (7, 6, 2, 2)
    assert found["accuracy"] == found["purity"] == 1
    assert found["knn_accuracy"] == found["knn_accuracy_top5"] == 1, "rows without a label neither vote nor are asked"
    assert sum(found["sizes"]) == 7


def test_labels_of_all_rows_give_the_probe_too(pictures_run: Sealed):
    found = metrics(pictures_run)
    assert found["accuracy"] == found["knn_accuracy"] == 1
    assert found["silhouette_rows"] == 24
    counts = pq.read_table(pictures_run.run.contingency).to_pylist()
    assert sorted((cell["label"], cell["count"]) for cell in counts) == [("amber", 8), ("blue", 8), ("green", 8)]
    assert len({cell["cluster"] for cell in counts}) == 3


def test_columns_join_the_parts_and_a_missing_label_is_minus_one(vectors_run: Sealed, pictures_run: Sealed):
    [clusters], codes, names = _columns(vectors_run.run, row_starts(vectors_run.manifest("encode")))
    assert [None if code < 0 else names[code] for code in codes] == ["right", None, "up", "up", "up", "right", "right"]
    assert (clusters == clusters[0]).tolist() == [True, True, False, False, False, True, True]
    _, codes, names = _columns(pictures_run.run, row_starts(pictures_run.manifest("encode")))
    assert [names[code] for code in codes] == ["amber", "blue", "green"] * 8


def test_a_single_row_with_a_label_is_scored(vectors_run: Sealed):
    encode = vectors_run.manifest("encode")
    transform = transform_of(encode, vectors_run.config.features)
    scoring = _Scoring(vectors_run.run, encode.outputs_of(EncodeOutputs), transform, vectors_run.config, (), None)
    clusters = np.zeros((1, 1), np.int32)
    found = scoring._partition(clusters, clusters[0], np.ones(1, bool), is_labelled=True)
    assert found["accuracy"] == 1
    assert "accuracy_held_out" not in found


def test_the_sample_is_seeded_in_order_and_without_repeats():
    rows = _sample(1000, 100, seed=0)
    assert len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, _sample(1000, 100, seed=0))
    assert (_sample(1000, 100, seed=1) != rows).any()
    np.testing.assert_array_equal(_sample(5, 100, seed=0), np.arange(5))


@pytest.mark.parametrize("clusters", [7, 2])
def test_rows_each_alone_and_no_sample_are_no_errors(
    vectors_run: Sealed, tmp_path: Path, in_process: None, clusters: int
):
    config = vectors_run.config.model_copy(update={"run": str(tmp_path / "run")})
    config = config.model_copy(update={"method": config.method.model_copy(update={"clusters": clusters})})
    run_all(config, stop_after="evaluate")
    assert -1 <= json.loads((tmp_path / "run" / "metrics.json").read_text())["silhouette"] <= 1
    without = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"silhouette_rows": 0})})
    run_stage("evaluate", without)
    assert "silhouette" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.fixture
def copied(vectors_run: Sealed, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of the run by a method with a space of its own."""
    use(OneDirection, monkeypatch)
    shutil.copytree(vectors_run.folder, tmp_path / "run")
    return vectors_run.config.model_copy(update={"run": str(tmp_path / "run")})


def test_the_contingency_holds_the_cells_that_are_not_empty(copied: RunConfig, monkeypatch: pytest.MonkeyPatch):
    clusters, codes = np.array([[1, 1, 0, 1, 0, 0, 1]], np.int32), np.array([0, 0, 1, 1, -1, -1, -1], np.int32)
    monkeypatch.setattr(evaluate, "_columns", lambda *given: (clusters, codes, ["a", "b"]))
    run_stage("evaluate", copied, force=True)
    table = pq.read_table(Run(copied.run).contingency)
    assert sorted(map(tuple, (row.values() for row in table.to_pylist()))) == [("a", 1, 2), ("b", 0, 1), ("b", 1, 1)]


def measured(config: RunConfig) -> dict[str, float]:
    run_stage("evaluate", config)
    found = json.loads((Path(config.run) / "metrics.json").read_text())
    return {key: value for key, value in found.items() if key.startswith("membership")}


def test_a_membership_is_measured_on_the_rows_with_labels(copied: RunConfig, monkeypatch: pytest.MonkeyPatch):
    use(AllAlike, monkeypatch)
    assert measured(copied) == {
        "membership_nonzeros": 6,
        "membership_components": 1,
        "membership_detection_error": pytest.approx(0.5),
        "membership_wrong_edges": pytest.approx(9 / 15),
    }


def test_without_labels_entries_and_components_are_left(copied: RunConfig, monkeypatch: pytest.MonkeyPatch):
    whole = evaluate._columns

    def unlabelled(*given: object) -> tuple[np.ndarray, np.ndarray, list[str]]:
        clusters, codes, _ = whole(*given)
        return clusters, np.full_like(codes, -1), []

    monkeypatch.setattr(evaluate, "_columns", unlabelled)
    monkeypatch.setattr(evaluate, "MEMBERSHIP_ROWS", 5)
    use(EachAlone, monkeypatch)
    assert measured(copied) == {"membership_nonzeros": 1, "membership_components": 5}


def test_a_method_without_a_membership_has_none_of_its_measures(copied: RunConfig, vectors_run: Sealed):
    assert measured(copied) == {}
    assert not any(key.startswith("membership") for key in metrics(vectors_run))


def test_the_linear_probe_is_scored_on_rows_that_it_was_not_trained_on(
    copied: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    drawn, features, probed, read = [], [], [], evaluate.features_at

    def note(run: Run, starts: list[int], transform: FeatureTransform, rows: np.ndarray) -> np.ndarray:
        drawn.append(set(rows.tolist()))
        features.append(read(run, starts, transform, rows))
        return features[-1]

    monkeypatch.setattr(evaluate, "features_at", note)
    monkeypatch.setattr(probes, "linear_probe_accuracy", lambda *given: probed.append(given) or 1.0)
    options = copied.evaluate.model_copy(update={"linear_probe_rows": 6})
    run_stage("evaluate", copied.model_copy(update={"evaluate": options}))
    ((x, _, z, _),) = probed
    assert x is features[0]
    assert z is features[1]
    trained, scored = drawn[:2]
    assert (len(trained), len(scored)) == (3, 3)
    assert not trained & scored
