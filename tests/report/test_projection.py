from __future__ import annotations

import numpy as np
import pytest

from rayclust.metrics.affinity import neighbor_precision
from rayclust.report.projection import FEW, planar_map


def groups(per_group: int = 20, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centers = 4 * np.eye(4, width)
    return np.repeat(centers, per_group, 0) + 0.3 * rng.normal(size=(4 * per_group, width)), np.repeat(
        range(4), per_group
    )


def test_groups_stay_together_and_the_map_fills_its_square() -> None:
    x, labels = groups()
    flat = planar_map(x)
    assert flat.shape == (80, 2)
    assert np.abs(flat).max() == 1
    np.testing.assert_allclose(flat.min(0) + flat.max(0), 0, atol=1e-6)
    centers = np.stack([flat[labels == k].mean(0) for k in range(4)])
    nearest = np.linalg.norm(flat[:, None] - centers, axis=2).argmin(1)
    assert (nearest == labels).all()
    assert neighbor_precision(x, labels, 5) == 1


def test_equal_rows_and_seeds_give_equal_maps() -> None:
    x, _ = groups(6)
    np.testing.assert_array_equal(planar_map(x, 3), planar_map(x, 3))


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (2, 1), (FEW, 5), (FEW + 1, 1), (40, 2), (12, 300)])
def test_few_rows_and_odd_widths_have_a_map(shape: tuple[int, int]) -> None:
    flat = planar_map(np.random.default_rng(0).normal(size=shape))
    assert flat.shape == (shape[0], 2)
    assert np.isfinite(flat).all()


@pytest.mark.parametrize("count", [3, 30])
def test_rows_that_are_all_alike_lie_in_one_place(count: int) -> None:
    assert not planar_map(np.ones((count, 4))).any()
