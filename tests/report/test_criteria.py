from __future__ import annotations

import math

from rayclust.report.criteria import Criterion, criteria
from tests.report.test_figures import HOSTILE, SVG, drawn, words

LENGTH = Criterion("Coding length", {2: 9.0, 4: 3.0, 8: 5.0, 16: 6.0}, larger_is_better=False)
SILHOUETTE = Criterion("Silhouette", {2: 0.1, 4: 0.3, 8: 0.5, 16: math.nan}, larger_is_better=True, spread={4: 0.1})


def test_the_best_of_each_criterion_is_told() -> None:
    root = drawn(criteria([LENGTH, SILHOUETTE], 4, "t"))
    tips = [node[0].text for node in root.iter(f"{SVG}circle")]
    assert tips == [
        "2 clusters: 9",
        "4 clusters: 3, the best",
        "8 clusters: 5",
        "16 clusters: 6",
        "2 clusters: 0.1",
        "4 clusters: 0.3",
        "8 clusters: 0.5, the best",
    ]
    assert len(list(root.iter(f"{SVG}polygon"))) == 1
    assert {"Coding length", "Silhouette"} <= set(words(root))


def test_the_chosen_number_has_a_line_in_every_panel() -> None:
    def dashed(chosen: int | None) -> int:
        root = drawn(criteria([LENGTH, SILHOUETTE], chosen, "t"))
        return sum(node.attrib.get("stroke-dasharray") == "3 3" for node in root.iter(f"{SVG}line"))

    assert [dashed(4), dashed(None), dashed(99)] == [2, 0, 0]


def test_ties_go_to_fewer_clusters_and_some_criteria_have_no_best() -> None:
    tied = Criterion("a", {3: 1.0, 2: 1.0}, larger_is_better=True)
    open_ = Criterion("b", {2: 1.0, 3: 2.0})
    tips = [node[0].text for node in drawn(criteria([tied, open_], 2, "t")).iter(f"{SVG}circle")]
    assert tips == ["2 clusters: 1, the best", "3 clusters: 1", "2 clusters: 1", "3 clusters: 2"]


def test_one_candidate_none_and_hostile_names() -> None:
    drawn(criteria([Criterion("a", {5: 1.0}, True)], 5, "t"))
    drawn(criteria([Criterion("a", {5: math.nan}, True)], 5, "t"))
    drawn(criteria([], None, "t"))
    drawn(criteria([Criterion(name, {2: 0.0, 900: 1.0}) for name in HOSTILE], 2, HOSTILE[0]))
