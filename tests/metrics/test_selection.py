from __future__ import annotations

import math

import pytest

from rayclust.config import SelectKConfig
from rayclust.errors import ConfigError, DataError
from rayclust.metrics.selection import (
    choose,
    evidence,
    knee,
    picks,
    refine,
    vote,
)


def table() -> dict[int, dict[str, float]]:
    """Criteria that agree on about 8."""
    rows = {
        2: (9.0, 0.2, 100.0, 2.0, 0.4, 0.9),
        4: (6.0, 0.4, 300.0, 1.5, 0.6, 0.95),
        8: (4.0, 0.6, 200.0, 1.0, 0.8, 0.99),
        16: (3.9, 0.5, 150.0, 1.2, 0.7, 0.6),
        32: (5.0, 0.3, 120.0, 1.4, 0.6, 0.5),
    }
    names = ("coding_length", "silhouette", "calinski_harabasz", "davies_bouldin", "modularity", "stability")
    return {k: dict(zip(names, values, strict=True)) for k, values in rows.items()}


def test_every_criterion_says_its_pick():
    found = picks(dict(reversed(table().items())))
    assert found == {
        "coding_length": 16, "silhouette": 8, "calinski_harabasz": 4, "davies_bouldin": 8, "modularity": 8,
        "stability": 8, "knee": 8,
    }  # fmt: skip


def test_choices_and_their_reasons():
    assert choose(table(), "coding_length").k == 16
    choice = choose(table())
    assert (choice.k, choice.rule) == (8, "vote")
    assert choice.reason == (
        "K = 8 is the middle, in ratio and weighted by the evidence in brackets, of coding length 16 (0.31), "
        "silhouette 8 (0.50), modularity 8 (0.50); for comparison: calinski harabasz 4, davies bouldin 8, stability 8, "
        "knee 8"
    )
    assert choose(table(), "knee").k == 8
    assert "elbow" in choose(table(), "knee").reason
    assert choose(table(), "calinski_harabasz").k == 4


def test_a_tie_goes_to_fewer_clusters_and_gaps_are_left_out():
    candidates = {k: {"silhouette": value} for k, value in [(3, 0.5), (2, 0.5), (4, math.nan)]}
    assert picks(candidates | {5: {}}) == {"silhouette": 2}
    assert choose(candidates).k == 2


def test_knee_by_hand():
    # On a log axis 2, 4, 8, 16 are evenly spaced: 10, 2, 1, 0 lies farthest below its chord at 4.
    assert knee([2, 4, 8, 16], [10.0, 2.0, 1.0, 0.0]) == 4
    # The rise after the lowest point plays no part.
    assert knee([2, 4, 8, 16, 32, 64], [10.0, 2.0, 1.0, 0.0, 50.0, 90.0]) == 4
    # A straight line on a log axis has no knee there, but has one on a linear axis.
    line = [3.0, 2.0, 1.0, 0.0]
    assert knee([2, 4, 8, 16], line) == 16
    assert knee([2, 4, 8, 16], line, log=False) == 8
    assert knee([2, 4, 8], [1.0, 2.0, 3.0]) == 2
    assert knee([7], [1.0]) == 7


def test_the_vote_is_a_candidate_near_the_median():
    found = {"silhouette": 2, "modularity": 9, "stability": 100, "knee": 3}
    assert vote(found, dict.fromkeys(found, 1.0), [2, 8, 12, 100]) == 8
    assert vote(found, dict.fromkeys(found, 0.0), [2, 8, 12, 100]) == 8, "no evidence at all: all count alike"


def test_evidence_by_hand():
    """Best above the median of the others, as a share of the range."""
    peak = {k: {"eigengap": value, "coding_length": -value} for k, value in [(2, 0.0), (3, 1.0), (4, 0.2), (5, 0.0)]}
    assert evidence(peak) == {"eigengap": 1.0, "coding_length": 1.0}
    flat = {k: {"modularity": value} for k, value in [(2, 0.0), (3, 0.9), (4, 1.0), (5, 0.9), (6, 0.9)]}
    assert evidence(flat) == pytest.approx({"modularity": 0.1})
    shift = {k: {"modularity": 7.0 + 3.0 * each["modularity"]} for k, each in flat.items()}
    assert evidence(shift) == pytest.approx({"modularity": 0.1}), "without units"
    assert evidence({2: {"silhouette": 0.5}}) == {"silhouette": 0.0}
    assert evidence({2: {"silhouette": 0.5}, 3: {"silhouette": 0.5}}) == {"silhouette": 0.0}
    # The pick of prediction strength need not have the most of it.
    strength = {k: {"prediction_strength": value} for k, value in [(2, 1.0), (3, 1.0), (4, 0.9), (5, 0.2)]}
    assert evidence(strength) == {"prediction_strength": 0.0}


def test_more_candidates_around_the_best_do_not_change_its_evidence():
    """The others weigh as the range of ln K that they stand for: a floor of 2 to 4 and 16 to 32 is most of it."""
    coarse = {k: {"modularity": value} for k, value in [(2, 0.0), (4, 0.0), (8, 1.0), (16, 0.0), (32, 0.0)]}
    fine = coarse | {k: {"modularity": 0.9} for k in (6, 7, 9, 10, 11)}
    assert evidence(coarse) == evidence(fine) == {"modularity": 1.0}


def test_flat_criteria_give_way_to_those_that_stand_out():
    """Two that see the clusters against three whose curves are flat around another number."""
    ks, sharp, flat = range(2, 13), {3: 1.0}, {2: 0.0, 8: 1.02}
    table = {
        k: {"eigengap": sharp.get(k, 0.0), "feature_coding_length": -sharp.get(k, 0.0)}
        | {name: flat.get(k, 1.0) for name in ("modularity", "silhouette", "stability")}
        for k in ks
    }
    choice = choose(table)
    assert (choice.k, choice.picks["modularity"]) == (3, 8)
    assert choice.evidence["eigengap"] == 1.0
    assert choice.evidence["modularity"] == pytest.approx(0.02 / 1.02)


def test_the_silhouette_votes_where_there_are_no_null_models():
    picked = {"silhouette": 2, "stability": 2, "modularity": 8, "coding_length": 16}
    even = dict.fromkeys([*picked, "null_contrast"], 1.0)
    assert vote(picked, even, [1, 2, 4, 8, 16, 32]) == 8
    assert vote(picked | {"null_contrast": 16}, even, [1, 2, 4, 8, 16, 32]) == 16


def test_the_reason_tells_what_null_models_have():
    table = {k: {"silhouette": -abs(k - 4), "silhouette_sample": 0.3, "null_contrast": 0.25} for k in range(2, 8)}
    assert choose(table).reason.endswith("; k-means of a sample: silhouette 0.30, of null models 0.05")


def test_an_end_of_the_candidates_is_no_optimum_until_most_pick_one():
    ks = [2, 4, 8, 16, 32]
    found = {"coding_length": 2, "silhouette": 2, "map_equation": 8, "modularity": 8}
    even = dict.fromkeys([*found, "feature_coding_length", "eigengap"], 1.0)
    lengths = {"coding_length": 2, "silhouette": 2, "feature_coding_length": 2, "modularity": 8}
    assert vote(found, even, ks) == 8
    assert vote(found | {"feature_coding_length": 2, "eigengap": 2}, even, ks) == 8  # 4 of 6 are not above two thirds
    assert vote(lengths, even, ks) == 2
    assert vote({"silhouette": 2, "map_equation": 32}, even, ks) in ks
    assert vote({"silhouette": 2, "map_equation": 32, "modularity": 8}, even, ks) == 8, "two slopes, not one"
    assert vote({"silhouette": 2, "map_equation": 2, "modularity": 8}, even, [2, 8, 32]) == 2  # too few for slopes
    slopes = even | {"coding_length": 0.1, "silhouette": 0.1, "feature_coding_length": 0.1}
    assert vote(lengths, slopes, ks) == 8
    candidates = {k: {"silhouette": -abs(k - 2), "modularity": -abs(k - 8)} for k in ks}
    assert "no vote, being an end of the candidates: silhouette 2 (" in choose(candidates).reason


def test_refinement_lies_between_the_best_ones_neighbours():
    assert refine([2, 4, 8, 16], 8) == (5, 7, 9, 12)
    assert refine([2, 4, 8, 16], 2) == (3,)
    assert refine([2, 4, 8, 16], 16, points=2) == (10, 13)
    assert refine([2, 3, 4], 3) == ()
    assert refine([100, 200, 400], 200, points=3) == (141, 201, 283)


def test_refuse_what_cannot_be():
    with pytest.raises(DataError, match="candidates = 0"):
        choose({})
    with pytest.raises(DataError, match="no criterion was measured"):
        choose({2: {}})
    with pytest.raises(DataError, match="no candidate has"):
        choose({2: {"silhouette": 1.0}}, "knee")
    with pytest.raises(ConfigError, match="rule = 'best': must be one of vote, coding_length, knee, merge, feature_"):
        choose(table(), "best")
    with pytest.raises(ConfigError, match="best = 3"):
        refine([2, 4], 3)
    with pytest.raises(DataError, match="one for each"):
        knee([2], [])


def test_prediction_strength_picks_the_most_clusters_that_have_enough_of_it():
    strength = {2: 1.0, 4: 0.9, 6: 0.8, 8: 0.79, 10: 0.3}
    found = picks({k: {"prediction_strength": value} for k, value in strength.items()})
    assert found == {"prediction_strength": 6}
    assert picks({k: {"prediction_strength": 0.5} for k in strength}) == {}
    choice = choose({k: {"prediction_strength": value} for k, value in strength.items()}, "prediction_strength")
    assert (choice.k, choice.reason) == (
        6,
        "K = 6 has the most clusters of prediction strength 0.8 among 2, 4, 6, 8, 10",
    )


def test_merging_starts_from_the_most_clusters():
    candidates = {2: {"merged": 2.0}, 6: {"merged": 5.0}, 8: {"merged": 7.0}, 32: {"merged": 7.2}}
    assert picks(candidates)["merge"] == 8
    assert choose(candidates, "merge").k == 8
    assert "what is left of 32 clusters" in choose(candidates, "merge").reason
    assert "merge" not in picks({2: {"merged": 2.0}, 4: {}})


def test_the_most_clusters_that_come_back_as_well_as_the_surest_number():
    """chooseR: the medians of 2, 3 and 4 are at least the largest bound, that of 3, and 5 is not."""
    medians, bounds = (0.9, 0.95, 0.88, 0.7), (0.8, 0.87, 0.6, 0.5)
    table = {
        k: {"resampled_silhouette": median, "resampled_bound": bound}
        for k, median, bound in zip((2, 3, 4, 5), medians, bounds, strict=True)
    }
    found = choose(table, "resampled_silhouette")
    assert found.k == 4
    assert "come back in subsamples" in found.reason
    with pytest.raises(ValueError, match=r"needs select_k\.resamples"):
        SelectKConfig(rule="resampled_silhouette")
    with pytest.raises(ValueError, match=r"needs select_k\.umap"):
        SelectKConfig(rule="umap_silhouette")
