from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sklearn

from rayclust.errors import DataError, ShapeError
from rayclust.metrics.external import (
    accuracy,
    ami,
    ari,
    contingency,
    expected_mutual_information,
    fmi,
    halves_accuracy,
    in_sample_accuracy,
    labelled,
    majority_map,
    mapped_accuracy,
    nmi,
    purity,
)
from tests.references import best_matching

SCORES: dict[str, Callable[..., float]] = {
    "accuracy": accuracy, "purity": purity, "nmi": nmi, "ami": ami, "ari": ari, "fmi": fmi
}  # fmt: skip
SYMMETRIC = ("accuracy", "nmi", "ami", "ari", "fmi")
EVERY = pytest.mark.parametrize("name", list(SCORES))


def two_labelings(
    seed: int = 0, classes: int = 5, clusters: int = 7, count: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """A clustering that agrees with the classes on about half of the rows."""
    rng = np.random.default_rng(seed)
    true = rng.integers(classes, size=count)
    return true, np.where(rng.random(count) < 0.5, true, rng.integers(clusters, size=count))


@EVERY
def test_names_of_labels_play_no_part(name: str):
    true, pred = two_labelings()
    score = SCORES[name](true, pred)
    assert SCORES[name](np.array([9, -4, 10**12, 3, 7])[true], pred) == pytest.approx(score)
    assert SCORES[name](np.array(list("edcba"))[true], [f"cluster {p}" for p in pred]) == pytest.approx(score)


@EVERY
def test_order_of_rows_plays_no_part(name: str):
    true, pred = two_labelings()
    order = np.random.default_rng(1).permutation(len(true))
    assert SCORES[name](true[order], pred[order]) == pytest.approx(SCORES[name](true, pred))


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric(name: str):
    true, pred = two_labelings()
    assert SCORES[name](true, pred) == pytest.approx(SCORES[name](pred, true))


@EVERY
def test_one_for_equal_partitions(name: str):
    true, _ = two_labelings()
    assert SCORES[name](true, (true + 2) % 5) == pytest.approx(1.0)
    assert SCORES[name]([0, 0, 0], [5, 5, 5]) == 1.0
    assert SCORES[name]([0], [1]) == 1.0
    assert SCORES[name]([0, 1, 2], ["a", "b", "c"]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["ami", "ari"])
def test_zero_on_average_for_chance(name: str):
    scores = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scores.append(SCORES[name](rng.integers(5, size=100), rng.integers(20, size=100)))
    assert abs(np.mean(scores)) < 0.01


@EVERY
def test_between_its_bounds(name: str):
    for seed in range(20):
        true, pred = two_labelings(seed, classes=1 + seed % 6, clusters=1 + seed % 9, count=1 + 3 * seed)
        assert -0.5 <= SCORES[name](true, pred) <= 1.0


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("nmi", sklearn.normalized_mutual_info_score),
        ("ami", sklearn.adjusted_mutual_info_score),
        ("ari", sklearn.adjusted_rand_score),
        ("fmi", sklearn.fowlkes_mallows_score),
    ],
)
def test_agrees_with_scikit_learn(name: str, theirs: Callable[..., float]):
    cases = [two_labelings(seed, 2 + seed % 5, 2 + seed % 11, 20 + 17 * seed) for seed in range(12)]
    cases += [([0, 0, 1, 1], [0, 0, 0, 0]), ([0, 1, 2, 3], [0, 0, 1, 1]), ([0, 0, 1, 1], [0, 1, 0, 1])]
    cases += [([0, 1, 2, 3], [0, 0, 0, 0])]
    for true, pred in cases:
        assert SCORES[name](true, pred) == pytest.approx(theirs(true, pred), abs=1e-9)


@pytest.mark.parametrize(("classes", "clusters"), [(2, 2), (3, 5), (5, 3), (4, 4), (1, 4)])
def test_accuracy_agrees_with_trying_every_matching(classes: int, clusters: int):
    for seed in range(5):
        true, pred = two_labelings(seed, classes, clusters, 40)
        assert accuracy(true, pred) == pytest.approx(best_matching(true.tolist(), pred.tolist()))


def test_worked_by_hand():
    # Cluster 0: a a b; cluster 1: b; cluster 2: b b.
    true, pred = list("aabbbb"), [0, 0, 0, 1, 2, 2]
    assert contingency(true, pred).toarray().tolist() == [[2, 0, 0], [1, 1, 2]]
    assert accuracy(true, pred) == pytest.approx(4 / 6)  # 0 → a, 2 → b, 1 unmatched
    assert purity(true, pred) == pytest.approx(5 / 6)
    assert ari([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx((1 - 2 / 6) / (1.5 - 2 / 6))
    assert fmi([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(0.5**0.5)  # one pair of one together, one of two
    assert nmi([0, 0, 1, 1], [0, 1, 2, 3]) == pytest.approx(2 / 3)  # ln 2 over the mean of ln 2 and ln 4


def test_every_class_split_in_two_pure_clusters():
    # Hungarian matching sees one half of each class; the majority map sees all of it.
    true = np.repeat(np.arange(10), 20)
    pred = 2 * true + np.arange(200) % 2
    assert accuracy(true, pred) == pytest.approx(0.5)
    assert purity(true, pred) == pytest.approx(1.0)
    assert mapped_accuracy(true, pred, majority_map(true, pred)) == 1.0


def test_majority_map_is_scored_on_another_split():
    mapping = majority_map(["x", "x", "y", "z", "z", "y"], [0, 0, 0, 1, 1, 2])
    assert mapping == {0: "x", 1: "z", 2: "y"}
    assert mapped_accuracy(["x", "y", "z", "z"], [0, 0, 1, 3], mapping) == pytest.approx(0.5)
    assert majority_map([3, 1], [0, 0]) == {0: 1}  # a draw goes to the class that sorts first
    assert mapped_accuracy([None, 1], [3, 0], {0: 1}) == 0.5  # an unknown cluster is no class, not even None


def test_thousands_of_clusters_are_cheap():
    rng = np.random.default_rng(0)
    true = rng.integers(1000, size=50_000)
    pred = true * 25 + rng.integers(25, size=50_000)
    assert purity(true, pred) == 1.0
    assert 0.0 < ari(true, pred) < ami(true, pred) < nmi(true, pred) < 1.0


def test_labelled_rows():
    assert labelled([3, -1, 0]).tolist() == [True, False, True]
    assert labelled(["a", None, ""]).tolist() == [True, False, True]
    assert labelled([1.0, np.nan]).tolist() == [True, False]
    assert labelled([None, None]).tolist() == [False, False]


def test_refuses_what_cannot_be():
    with pytest.raises(ShapeError, match=r"shapes \(2,\) and \(3,\)"):
        accuracy([0, 1], [0, 1, 2])
    with pytest.raises(ShapeError, match="one axis"):
        nmi(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(DataError, match="0 rows"):
        ari([], [])


def mutual_information(true: tuple[int, ...], pred: tuple[int, ...]) -> float:
    count, result = len(true), 0.0
    for pair in set(zip(true, pred, strict=True)):
        share = sum(other == pair for other in zip(true, pred, strict=True)) / count
        result += share * np.log(share * count**2 / (true.count(pair[0]) * pred.count(pair[1])))
    return result


@pytest.mark.parametrize(
    ("true", "pred"), [((0, 0, 1), (0, 1, 1)), ((0, 0, 1, 1, 2), (0, 0, 0, 1, 1)), ((0, 1, 2, 3), (0, 0, 1, 1))]
)
def test_expected_information_is_the_mean_over_all_orders_of_the_rows(true: tuple[int, ...], pred: tuple[int, ...]):
    mean = np.mean([mutual_information(true, order) for order in itertools.permutations(pred)])
    assert expected_mutual_information(np.bincount(true), np.bincount(pred)) == pytest.approx(mean)


def test_one_cluster_has_no_information():
    assert expected_mutual_information(np.array([3, 4]), np.array([7])) == pytest.approx(0.0, abs=1e-12)


def test_pure_clusters_are_right_however_many():
    """Every class split in two pure clusters: all right with a map, half right one to one."""
    labels, clusters = np.repeat([0, 1, 2], 4), np.repeat(np.arange(6), 2)
    assert in_sample_accuracy(labels, clusters) == 1.0
    assert halves_accuracy(np.tile(labels, 50), np.tile(clusters, 50)) == 1.0
    assert accuracy(labels, clusters) == 0.5


def test_the_published_map_matches_first_and_maps_the_rest():
    """Both clusters lean to class 0; one of them has to stand for class 1."""
    labels = ["a", "a", "a", "b", "a", "a", "b"]
    clusters = [0, 0, 0, 0, 1, 1, 1]
    assert in_sample_accuracy(labels, clusters) == pytest.approx((3 + 1) / 7)
    assert purity(labels, clusters) == pytest.approx((3 + 2) / 7)


def test_a_map_is_scored_on_rows_that_it_has_not_seen():
    assert mapped_accuracy([0, 1, 1, 0], [5, 6, 5, 7], majority_map([0, 0, 1, 1], [5, 5, 6, 6])) == 0.5  # 7 is unknown


def test_single_rows_win_in_sample_and_lose_held_out():
    labels, clusters = np.arange(300) % 3, np.arange(300)
    assert in_sample_accuracy(labels, clusters) == 1.0
    assert halves_accuracy(labels, clusters) == 0.0


def test_chance_is_the_largest_class():
    rng = np.random.default_rng(0)
    labels, clusters = rng.choice(2, 20_000, p=[0.7, 0.3]), rng.integers(10, size=20_000)
    assert halves_accuracy(labels, clusters) == pytest.approx(0.7, abs=0.01)


def test_in_sample_accuracy_knows_no_names_and_no_order():
    rng = np.random.default_rng(1)
    labels, clusters = rng.integers(4, size=500), rng.integers(30, size=500)
    order, names = rng.permutation(500), rng.permutation(30)
    assert in_sample_accuracy(labels, clusters) == in_sample_accuracy(labels[order], names[clusters][order])
    assert in_sample_accuracy(labels, clusters) <= purity(labels, clusters)


def test_25_000_clusters_take_seconds():
    rng = np.random.default_rng(2)
    clusters = rng.integers(25_000, size=200_000)
    labels = clusters % 100
    start = time.perf_counter()
    assert in_sample_accuracy(labels, clusters) == purity(labels, clusters) == 1.0
    assert 0.9 < halves_accuracy(labels, clusters) <= 1.0
    assert time.perf_counter() - start < 60
