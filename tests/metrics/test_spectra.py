from __future__ import annotations

import numpy as np
import pytest

from rayclust.errors import ConfigError, DataError
from rayclust.metrics.spectra import directions, quantiles, singular_values


def test_values_of_a_diagonal_are_its_entries_over_the_largest() -> None:
    x = np.diag([2.0, -4.0, 1.0])
    np.testing.assert_allclose(singular_values(x), [1, 0.5, 0.25])
    np.testing.assert_allclose(singular_values(np.vstack([x, np.zeros((5, 3))])), [1, 0.5, 0.25])


def test_one_direction_has_one_value() -> None:
    rows = np.outer([1.0, 2.0, -3.0], [3.0, 4.0, 0.0, 0.0])
    assert singular_values(rows).tolist() == [1, 0, 0]
    assert singular_values(np.zeros((3, 2))).tolist() == [0, 0]
    assert singular_values(np.zeros((0, 2))).tolist() == []


@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_they_equal_the_decomposition(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    values = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(singular_values(x), values / values[0], rtol=1e-9)


def test_turning_scaling_and_order_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(20, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    np.testing.assert_allclose(singular_values(7 * x[::-1] @ turn), singular_values(x), rtol=1e-9)


def test_directions_count_energy() -> None:
    assert directions(np.array([3.0, 1.0])) == 1  # 9 of 10
    assert directions(np.array([1.0, 1.0, 1.0, 1.0]), 0.5) == 2
    assert directions(np.ones(10), 1) == 10
    assert directions(np.zeros(4)) == 0
    with pytest.raises(ConfigError, match="share = 0"):
        directions(np.ones(2), 0)


def test_quantiles_reach_as_far_as_most_spectra() -> None:
    long = [np.array([1.0, 0.5, 0.2]), np.array([1.0, 0.9, 0.8]), np.array([1.0, 0.7, 0.3, 0.1])]
    np.testing.assert_allclose(quantiles(long, [0, 0.5, 1]), [[1, 0.5, 0.2], [1, 0.7, 0.3], [1, 0.9, 0.8]])
    assert quantiles([np.ones(9)] * 19 + [np.ones(1)], [0])[0].tolist() == [1] + [0] * 8
    with pytest.raises(DataError):
        quantiles([], [0.5])
