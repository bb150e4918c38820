from __future__ import annotations

import itertools

import numpy as np
import pytest

from rayclust.metrics.chance import expected_mutual_information


def mutual_information(true: tuple[int, ...], pred: tuple[int, ...]) -> float:
    count, result = len(true), 0.0
    for pair in set(zip(true, pred, strict=True)):
        share = sum(other == pair for other in zip(true, pred, strict=True)) / count
        result += share * np.log(share * count**2 / (true.count(pair[0]) * pred.count(pair[1])))
    return result


@pytest.mark.parametrize(
    ("true", "pred"), [((0, 0, 1), (0, 1, 1)), ((0, 0, 1, 1, 2), (0, 0, 0, 1, 1)), ((0, 1, 2, 3), (0, 0, 1, 1))]
)
def test_is_the_mean_over_all_orders_of_the_rows(true: tuple[int, ...], pred: tuple[int, ...]):
    mean = np.mean([mutual_information(true, order) for order in itertools.permutations(pred)])
    assert expected_mutual_information(np.bincount(true), np.bincount(pred)) == pytest.approx(mean)


def test_one_cluster_tells_nothing():
    assert expected_mutual_information(np.array([3, 4]), np.array([7])) == pytest.approx(0.0, abs=1e-12)
