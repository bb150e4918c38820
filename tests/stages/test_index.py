from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rayclust.config import IndexConfig, RunConfig, validate
from rayclust.runtime.pipeline import run_stage
from rayclust.runtime.spaces import ENCODER_INDEX, OWN_INDEX
from rayclust.search.index import load_index
from rayclust.stages.index import QUERIES, RETRIEVAL, SHOWN
from rayclust.store import storage
from rayclust.store.run import Run
from tests.stages.conftest import VECTORS, Sealed
from tests.stages.own_space import OneDirection, use
from tests.stages.runs import tree


@pytest.fixture
def copied(pictures_run: Sealed, tmp_path: Path, in_process: None) -> RunConfig:
    shutil.copytree(pictures_run.folder, tmp_path / "run")
    return validate(tree(str(tmp_path / "run"), pictures_run.config.images.uri))


def test_rows_are_found_by_their_direction_alone(vectors_run: Sealed):
    found = load_index(storage.read_bytes(storage.join(vectors_run.run.index_folder, ENCODER_INDEX)))
    x = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    ids, similarity = found.search(x[3:4], 7)
    cosines = x @ x[3]
    assert ids[0][0] == 3
    np.testing.assert_allclose(similarity[0], np.sort(cosines)[::-1], atol=1e-3)
    assert vectors_run.manifest("index").extra["kind"] == "flat"


@pytest.mark.parametrize(("flat_rows", "kind"), [(24, "flat"), (23, "ivf")])
def test_auto_takes_an_inverted_file_above_the_bound(copied: RunConfig, flat_rows: int, kind: str):
    manifest = run_stage("index", copied.model_copy(update={"index": IndexConfig(flat_rows=flat_rows)}), force=True)
    assert manifest.extra["kind"] == kind
    assert set(manifest.outputs) == {f"index/{ENCODER_INDEX}"}


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_space_of_the_methods_own_has_an_index_beside(copied: RunConfig, kind: str, monkeypatch: pytest.MonkeyPatch):
    use(OneDirection, monkeypatch)
    settings = copied.model_copy(update={"index": IndexConfig(kind=kind)})
    manifest = run_stage("index", settings)
    assert set(manifest.outputs) == {f"index/{name}" for name in (ENCODER_INDEX, OWN_INDEX, RETRIEVAL)}
    assert manifest.extra["z"]["kind"] == kind
    assert 0.95 <= manifest.extra["z"]["recall"] <= 1
    run = Run(copied.run)
    assert not list(Path(copied.run).glob("index/scratch*")), "rows are scratch"
    found = load_index(storage.read_bytes(storage.join(run.index_folder, OWN_INDEX)))
    assert found.faiss_index.ntotal == 24
    near = storage.read_json(storage.join(run.index_folder, RETRIEVAL))
    assert len(near["rows"]) == QUERIES
    for row, encoder, own in zip(near["rows"], near["encoder"], near["z"], strict=True):
        assert len(encoder) == len(own) == SHOWN
        assert row not in {hit["row"] for hit in encoder + own}
        assert {hit["similarity"] for hit in own[:7]} == {1.0}  # a colour has eight images
        assert [hit["similarity"] for hit in encoder] == sorted((hit["similarity"] for hit in encoder), reverse=True)


def test_pages_show_both_searches_side_by_side(copied: RunConfig, monkeypatch: pytest.MonkeyPatch):
    use(OneDirection, monkeypatch)
    for stage in ("index", "evaluate", "map", "figures", "report"):
        run_stage(stage, copied, force=stage == "figures")
    page = storage.read_bytes(Run(copied.run).report).decode()
    assert page.count('<div class="query">') == QUERIES
    assert "Above: what the encoder gives." in page
