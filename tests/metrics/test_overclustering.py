from __future__ import annotations

import time

import numpy as np
import pytest

from rayclust.metrics import overclustering
from rayclust.metrics.external import accuracy, purity
from rayclust.metrics.overclustering import halves_accuracy, held_out_accuracy, in_sample_accuracy


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
    assert held_out_accuracy([0, 0, 1, 1], [5, 5, 6, 6], [0, 1, 1, 0], [5, 6, 5, 7]) == 0.5  # 7 is unknown


def test_single_rows_win_in_sample_and_lose_held_out():
    labels, clusters = np.arange(300) % 3, np.arange(300)
    assert in_sample_accuracy(labels, clusters) == 1.0
    assert halves_accuracy(labels, clusters) == 0.0


def test_chance_is_the_largest_class():
    rng = np.random.default_rng(0)
    labels, clusters = rng.choice(2, 20_000, p=[0.7, 0.3]), rng.integers(10, size=20_000)
    assert halves_accuracy(labels, clusters) == pytest.approx(0.7, abs=0.01)


def test_names_and_order_of_rows_play_no_part():
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
    found = overclustering.scores(labels, clusters)
    assert time.perf_counter() - start < 60
    assert found["occupied"] > 24_900
    assert found["accuracy_in_sample"] == found["purity"] == 1.0
    assert 0.9 < found["accuracy_held_out"] <= 1.0
