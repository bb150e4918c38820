from __future__ import annotations

import pyarrow as pa

from rayclust.stages.report_training import curves, health, history
from tests.stages.conftest import Sealed


def test_a_collapse_is_the_first_thing_to_read():
    rows = {"collapsed": [0, 1], "collapsed_heads": [2, 3], "live_clusters": [90, 2]}
    [note] = health(pa.table(rows))
    assert "3 of the heads; the best one has 2 live clusters" in note
    assert health(pa.table(rows).slice(0, 1)) == []
    assert health(pa.table({"inertia": [1.0]})) == []


def test_curves_are_those_that_the_method_reports(vectors_run: Sealed):
    names = [name for curve in curves(history(vectors_run.run)) for name in curve.series]
    assert set(names) <= {"loss", "inertia"}
    table = pa.table({"loss": [2.0, 1.0], "live_clusters": [9, 8], "epoch": [0, 1]})
    assert [(curve.title, list(curve.series.values())) for curve in curves(table)] == [
        ("Loss", [[2.0, 1.0]]),
        ("Live clusters of the best head", [[9, 8]]),
    ]
    assert curves(table.slice(0, 1)) == []
