from __future__ import annotations

import numpy as np
import pytest

from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.metrics.geometry import (
    absolute_gram,
    directions,
    kernel_membership,
    membership_scores,
    neighbor_precision,
    quantiles,
    similar_order,
    singular_values,
)

HALVES = np.array([0, 0, 1, 1])
BLOCKS = np.kron(np.eye(2), np.full((2, 2), 0.5))
EVEN = np.full((4, 4), 0.25)
CHAIN = np.array([[0.5, 0.5, 0, 0], [0, 0.6, 0.4, 0], [0, 0, 0.9, 0.1], [0, 0, 0, 1]])
"""Each row joined to the next by one of the two directions; rows 1 and 2 are of two classes."""

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


@pytest.mark.parametrize(
    ("membership", "wanted"),
    [
        (BLOCKS, {"nonzeros": 2, "components": 2, "detection_error": 0, "wrong_edges": 0}),
        (EVEN, {"nonzeros": 4, "components": 1, "detection_error": 0.5, "wrong_edges": 4 / 6}),
        (np.eye(4), {"nonzeros": 1, "components": 4, "detection_error": 0, "wrong_edges": 0}),
        (np.zeros((4, 4)), {"nonzeros": 0, "components": 4, "detection_error": 0, "wrong_edges": 0}),
    ],
    ids=["blocks", "even: of six pairs, four are of two classes", "to itself alone: no edges", "zeros"],
)
def test_memberships_of_two_equal_classes(membership: np.ndarray, wanted: dict[str, float]) -> None:
    assert membership_scores(membership, HALVES) == pytest.approx(wanted)
    assert membership_scores(membership).items() <= membership_scores(membership, HALVES).items()


def test_a_chain_by_hand() -> None:
    """Halves of its edges: 0.25, 0.2, 0.05; the second is wrong."""
    levels = {least: membership_scores(CHAIN, HALVES, least) for least in (0, 0.1, 0.22, 0.3, 0.45)}
    assert [found["detection_error"] for found in levels.values()] == pytest.approx([0.4 / 4] * 5)
    assert membership_scores(3 * CHAIN, HALVES)["detection_error"] == pytest.approx(0.4 / 4), "a share of the mass"
    assert [found["wrong_edges"] for found in levels.values()] == pytest.approx([1 / 3, 1 / 2, 0, 0, 0])
    assert [found["components"] for found in levels.values()] == [1, 2, 3, 4, 4]
    assert [levels[least]["nonzeros"] for least in (0, 0.1, 0.45)] == [7 / 4, 6 / 4, 5 / 4]


def test_measures_of_a_membership_know_no_order_of_rows_and_no_names_of_classes() -> None:
    rng = np.random.default_rng(0)
    matrix, labels, order = rng.random((12, 12)), rng.integers(0, 3, 12), rng.permutation(12)
    turned, named = matrix[np.ix_(order, order)], np.array([7, 2, 5])[labels[order]]
    for least in (0.3, 0.7, 0.9):
        assert membership_scores(turned, named, least) == pytest.approx(membership_scores(matrix, labels, least))


def test_a_membership_that_is_none_is_refused() -> None:
    with pytest.raises(ShapeError, match="2 × 3"):
        membership_scores(np.ones((2, 3)))
    with pytest.raises(ShapeError, match="0 × 0"):
        membership_scores(np.ones((0, 0)))
    with pytest.raises(ShapeError, match="3 labels"):
        membership_scores(EVEN, HALVES[:3])


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
def test_singular_values_equal_the_decomposition(shape: tuple[int, int]) -> None:
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
