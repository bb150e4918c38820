from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sklearn

from rayclust.errors import DataError, ShapeError
from rayclust.metrics import external
from rayclust.metrics.external import (
    accuracy,
    ami,
    ari,
    contingency,
    knn_accuracy,
    labelled,
    majority_map,
    mapped_accuracy,
    nmi,
    purity,
)
from tests.references import best_matching

SCORES: dict[str, Callable[..., float]] = {
    "accuracy": accuracy, "purity": purity, "nmi": nmi, "ami": ami, "ari": ari
}  # fmt: skip
SYMMETRIC = ("accuracy", "nmi", "ami", "ari")
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
    found = external.scores(true, pred)
    assert found["purity"] == 1.0
    assert 0.0 < found["ari"] < found["ami"] < found["nmi"] < 1.0


def test_labelled_rows():
    assert labelled([3, -1, 0]).tolist() == [True, False, True]
    assert labelled(["a", None, ""]).tolist() == [True, False, True]
    assert labelled([1.0, np.nan]).tolist() == [True, False]
    assert labelled([None, None]).tolist() == [False, False]


def test_knn_vote_worked_by_hand():
    labels = np.array([0, 0, 1, 1])
    neighbors = np.array([[1, 2, 3], [0, 2, 3], [3, 0, 1], [0, 1, 2]])
    similarity = np.array([[0.9, 0.1, 0.1], [0.2, 0.1, 0.1], [0.5, 0.4, 0.0], [0.5, 0.4, 0.3]])
    # One neighbour: the last row is wrong. All three, nearly equal weights: rows 0 and 1 lose to two of class 1.
    assert knn_accuracy(neighbors, similarity, labels, k=1) == 0.75
    assert knn_accuracy(neighbors, similarity, labels, k=3, temperature=1e6) == 0.0
    assert knn_accuracy(neighbors, similarity, labels, k=3, temperature=0.01) == 0.75
    assert knn_accuracy(neighbors[:1], similarity[:1], labels, labels[:1], k=1) == 1.0
    assert knn_accuracy(neighbors, similarity, np.array(list("xxyy")), k=1) == 0.75


def test_knn_vote_without_all_neighbours():
    labels = np.array([0, 1, 1])
    neighbors = np.array([[1, -1], [2, -1], [-1, -1]])
    similarity = np.array([[0.5, -np.inf], [0.5, -np.inf], [-np.inf, -np.inf]], dtype=np.float16)
    with np.errstate(all="raise"):
        assert knn_accuracy(neighbors, similarity, labels) == pytest.approx(2 / 3)


def test_knn_probe_of_real_features(shared_data):
    import torch

    from rayclust.features import FeatureTransform
    from rayclust.search.knn import top_k

    features = np.load(shared_data / "imagenette_val3k" / "features_mnv2a_f16.npy")
    labels = np.load(shared_data / "imagenette_val3k" / "labels.npy")
    transform = FeatureTransform.fitted(features, center=True, standardize=False, normalize=True)
    x = torch.from_numpy(transform(features))
    ids, similarity = top_k(x, x, 20, query_ids=torch.arange(len(x)))
    assert knn_accuracy(ids.numpy(), similarity.numpy(), labels) == pytest.approx(0.973, abs=0.004)


def test_refuses_what_cannot_be():
    with pytest.raises(ShapeError, match=r"shapes \(2,\) and \(3,\)"):
        accuracy([0, 1], [0, 1, 2])
    with pytest.raises(ShapeError, match="one axis"):
        nmi(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(DataError, match="0 rows"):
        ari([], [])
    with pytest.raises(ShapeError, match="one row for each label"):
        knn_accuracy(np.zeros((2, 3), int), np.zeros((2, 3)), np.zeros(5))
