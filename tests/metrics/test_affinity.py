from __future__ import annotations

import numpy as np
import pytest

from rayclust.errors import ConfigError, ShapeError
from rayclust.metrics.affinity import absolute_gram, kernel_membership, neighbor_precision, similar_order

PLANES = np.array([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])


def test_antipodal_rows_are_alike_and_orthogonal_ones_are_not() -> None:
    half = np.sqrt(0.5)
    wanted = [[1, 1, 0, half], [1, 1, 0, half], [0, 0, 1, half], [half, half, half, 1]]
    np.testing.assert_allclose(absolute_gram(PLANES), wanted, atol=1e-12)
    assert absolute_gram(np.zeros((1, 3))).tolist() == [[0]]


def test_kernel_membership_by_hand() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    near = np.e**2 / (np.e**2 + 1)
    np.testing.assert_allclose(kernel_membership(rows, 0.5), [[0, near, 1 - near], [near, 0, 1 - near], [0.5, 0.5, 0]])
    assert kernel_membership(rows[:1], 0.5).tolist() == [[0]]
    with pytest.raises(ConfigError, match="temperature = 0"):
        kernel_membership(rows, 0)


def test_alike_clusters_stand_side_by_side() -> None:
    angles = np.radians([0, 80, 5, 85, 40])
    order = similar_order(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert order in ([0, 2, 4, 1, 3], [3, 1, 4, 2, 0], [0, 2, 4, 3, 1], [2, 0, 4, 1, 3])
    assert similar_order(PLANES[:2]) == [0, 1]
    assert sorted(similar_order(np.ones((4, 2)))) == [0, 1, 2, 3]


def test_precision_of_neighbours_by_hand() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert neighbor_precision(rows, np.array([0, 0, 1, 1]), 1) == 1
    assert neighbor_precision(rows, np.array([0, 1, 0, 1]), 1) == 0
    assert neighbor_precision(rows, np.array([0, 0, 1, 1]), 99) == pytest.approx(1 / 3)
    with pytest.raises(ShapeError):
        neighbor_precision(rows, np.array([0, 1]), 1)
    with pytest.raises(ConfigError):
        neighbor_precision(rows, np.array([0, 0, 1, 1]), 0)
