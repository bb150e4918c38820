from __future__ import annotations

import numpy as np

from rayclust.config import IndexConfig
from rayclust.search.index import load_index
from rayclust.stages.index import ENCODER_INDEX, _build
from rayclust.stages.rows import row_starts
from rayclust.store import filesystem
from rayclust.store.layout import Run
from tests.stages.conftest import VECTORS, Sealed


def test_rows_are_found_by_their_direction_alone(vectors_run: Sealed):
    found = load_index(filesystem.read_bytes(filesystem.join(vectors_run.run.index_folder, ENCODER_INDEX)))
    x = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    ids, similarity = found.search(x[3:4], 7)
    cosines = x @ x[3]
    assert ids[0][0] == 3
    np.testing.assert_allclose(similarity[0], np.sort(cosines)[::-1], atol=1e-3)
    assert vectors_run.manifest("index").extra["kind"] == "flat"


def test_auto_takes_an_inverted_file_above_the_bound(pictures_run: Sealed, tmp_path):
    starts = row_starts(pictures_run.manifest("encode"))
    for flat_rows, kind in ((24, "flat"), (23, "ivf")):
        outputs, extra = _build(pictures_run.run, starts, IndexConfig(flat_rows=flat_rows), 0)
        assert extra["kind"] == kind
        assert list(outputs) == [f"index/{ENCODER_INDEX}"]
    _build(Run(pictures_run.config.run), starts, pictures_run.config.index, pictures_run.config.seed)
