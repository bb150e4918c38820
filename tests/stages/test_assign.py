from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rayclust.errors import ConfigError
from rayclust.methods import build
from rayclust.methods.kmeans import KMeans
from rayclust.methods.settings import KMeansConfig
from rayclust.runtime.pipeline import content_digest, run_all, run_stage
from rayclust.runtime.rows import row_starts, transform_of
from rayclust.stages import assign as stage
from rayclust.stages.assign import assign
from rayclust.store.manifest import AssignOutputs
from tests.stages.conftest import Sealed


def kmeans() -> KMeans:
    """Two centres, at right angles."""
    method = build(KMeansConfig(clusters=2, temperature=1.0), 2, 10, 0)
    assert isinstance(method, KMeans)
    method.centers.copy_(torch.eye(2))
    method.inertia.fill_(10 * 1.0)
    return method


def test_the_nearest_centre_with_its_probability():
    clusters, confidence = assign(kmeans(), np.array([[2, 0], [0, 3], [1, 1]], np.float32))
    assert clusters.dtype == np.int32
    assert confidence.dtype == np.float32
    assert clusters[:2].tolist() == [0, 1]
    # Squared distances 0 and 2 between unit rows, mean 1, temperature 1.
    np.testing.assert_allclose(confidence, [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-2)), 0.5], rtol=1e-6)


def test_no_rows_are_no_clusters():
    clusters, confidence = assign(kmeans(), np.zeros((0, 2), np.float32))
    assert (clusters.shape, clusters.dtype, confidence.shape) == ((0,), np.int32, (0,))


def test_every_part_keeps_its_rows_and_keys_and_the_sizes_add_up(pictures_run: Sealed):
    sizes = np.zeros(3, int)
    for part, count in enumerate([12, 0, 12]):
        assigned = pq.read_table(pictures_run.run.assignments(part))
        embedded = pq.read_table(pictures_run.run.embeddings(part))
        assert assigned.num_rows == count
        assert assigned["row"].equals(embedded["row"])
        assert assigned["key"].equals(embedded["key"])
        sizes += np.bincount(assigned["cluster"].to_numpy(), minlength=3)
        assert all(0.01 < p < 0.99 for p in assigned["confidence"].to_pylist())
    manifest = pictures_run.manifest("assign")
    assert manifest.extra["sizes"] == sizes.tolist() == [8, 8, 8]
    assert manifest.counts == {"rows": 24, "occupied": 3}
    calibration = manifest.outputs_of(AssignOutputs).calibration
    assert calibration is not None
    assert len(calibration["probabilities"]) == len(calibration["shares"])


def test_as_many_rows_are_calibrated_on_as_clusters_need(pictures_run: Sealed, monkeypatch: pytest.MonkeyPatch):
    seen, config, encode = [], pictures_run.config, pictures_run.manifest("encode")
    monkeypatch.setattr(stage, "calibrate", lambda x, labels, probability, clusters: seen.append((len(x), clusters)))
    assert (stage.MEASURED_ROWS, stage.MOST_ROWS, stage.ROWS_PER_CLUSTER) == (4096, 65_536, 8)
    for least, most, each in ((4096, 65_536, 8), (10, 65_536, 2), (10, 65_536, 4), (10, 11, 4)):
        monkeypatch.setattr(stage, "MEASURED_ROWS", least)
        monkeypatch.setattr(stage, "MOST_ROWS", most)
        monkeypatch.setattr(stage, "ROWS_PER_CLUSTER", each)
        transform, model = transform_of(encode, config.features), content_digest(pictures_run.manifest("train"))
        stage.calibrated(pictures_run.run, row_starts(encode), transform, model)
    assert seen == [(24, 3), (10, 3), (12, 3), (11, 3)]


def _fine(sealed: Sealed, folder: Path, levels: tuple[int, ...]) -> Sealed:
    """The same images in nine clusters, with levels above them."""
    config = sealed.config.model_copy(update={"run": str(folder / "run")})
    method = config.method.model_copy(update={"clusters": 9})
    evaluate = config.evaluate.model_copy(update={"linear_probe_rows": 24})
    assigned = config.assign.model_copy(update={"levels": levels})
    return Sealed(config.model_copy(update={"method": method, "assign": assigned, "evaluate": evaluate}))


def test_levels_lie_in_each_other_and_are_scored(pictures_run: Sealed, tmp_path: Path, in_process: None):
    fine = _fine(pictures_run, tmp_path, (9, 5, 3))
    run_all(fine.config)
    tables = [pq.read_table(fine.run.assignments(part)) for part in (0, 2)]
    columns = {
        name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names[2:]
    }
    assert list(columns) == ["cluster", "confidence", "cluster_5", "cluster_3"]
    for inner, outer in (("cluster", "cluster_5"), ("cluster_5", "cluster_3")):
        for cluster in np.unique(columns[inner]):
            assert len(np.unique(columns[outer][columns[inner] == cluster])) == 1
    assert fine.manifest("assign").extra["levels"] == [5, 3]
    metrics = json.loads((fine.folder / "metrics.json").read_text())
    assert [(level["clusters"], level["purity"]) for level in metrics["levels"]] == [(5, 1.0), (3, 1.0)]
    assert metrics["levels"][1]["accuracy"] == 1.0
    assert metrics["accuracy_in_sample"] == 1.0
    assert metrics["accuracy_held_out"] > 0.5
    assert metrics["linear_probe"] > 0.8


def test_levels_finer_than_the_clusters_are_refused(pictures_run: Sealed, tmp_path: Path, in_process: None):
    with pytest.raises(ConfigError, match="finest level first"):
        run_all(_fine(pictures_run, tmp_path, (20,)).config, stop_after="assign")


def test_the_driver_keeps_no_sizes_of_single_parts(
    pictures_run: Sealed, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    copy = Sealed(pictures_run.config.model_copy(update={"run": str(tmp_path / "run")}))
    (copy.folder / "manifests" / "assign.json").unlink()
    (copy.folder / "manifests" / "assign" / "part-00001.json").unlink()  # the others come from their markers
    kept, run_units = [], stage.run_tasks

    def note(*arguments: Any, **named: Any) -> Any:
        kept.extend(run_units(*arguments, **named))
        return kept

    monkeypatch.setattr(stage, "run_tasks", note)
    run_stage("assign", copy.config)
    assert [result.extra for result in kept] == [{}, {}, {}]
    assert copy.manifest("assign").extra == pictures_run.manifest("assign").extra
