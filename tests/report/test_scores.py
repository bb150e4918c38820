from __future__ import annotations

import math

from rayclust.report import scores
from rayclust.report.contents import MethodResult

TEMI = MethodResult(name="temi", metrics={"own": 3.0, "nmi": 0.5, "accuracy": 0.9, "coding_length": 7.0, "ari": None})
KMEANS = MethodResult(name="kmeans", metrics={"nmi": 0.6, "accuracy": math.nan, "coding_length": 6.0})


def test_known_scores_come_first_in_their_order_and_absent_ones_are_left_out() -> None:
    assert [score.key for score in scores.columns([KMEANS, TEMI])] == ["accuracy", "nmi", "coding_length", "own"]
    assert scores.columns([MethodResult(name="x")]) == []


def test_the_best_needs_two_numbers_and_a_better_end() -> None:
    best = {score.key: scores.best(score, [TEMI, KMEANS]) for score in scores.columns([TEMI, KMEANS])}
    assert best == {"accuracy": None, "nmi": 0.6, "coding_length": 6.0, "own": None}


def test_shares_are_percent_and_spread_stands_beside() -> None:
    accuracy, silhouette = (next(s for s in scores.KNOWN if s.key == key) for key in ("accuracy", "silhouette"))
    assert accuracy.write(0.926) == "92.6%"
    assert accuracy.write(0.926, 0.002) == "92.6 ± 0.2%"
    assert silhouette.write(-0.1234) == "-0.1234"
    assert silhouette.write(0.5, 0.01) == "0.5 ± 0.01"
    assert accuracy.write(None, 0.1) == "–"
