from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.arrays import require_matrix, unit_rows
from rayclust.errors import ShapeError


@pytest.mark.parametrize("x", [np.zeros((0, 3)), np.zeros((2, 3)), torch.zeros(2, 3)])
def test_a_matrix_of_the_wanted_width_passes(x):
    require_matrix(x, "x")
    require_matrix(x, "x", 3)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
def test_other_shapes_are_refused_by_name(shape):
    with pytest.raises(ShapeError) as caught:
        require_matrix(np.zeros(shape), "queries")
    assert str(caught.value) == f"queries has shape {shape}: two axes are needed"


def test_another_width_is_refused_with_both():
    with pytest.raises(ShapeError) as caught:
        require_matrix(torch.zeros(2, 4), "queries", 3)
    assert str(caught.value) == "queries has width 4: 3 is needed"


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e37])
def test_rows_of_any_size_become_unit_rows(factor: float):
    rows = np.array([[3, 4], [0, -2], [0, 0]], np.float32)
    given = rows * np.array([[factor], [factor], [1]], np.float32)
    kept = given.copy()
    np.testing.assert_allclose(unit_rows(given), [[0.6, 0.8], [0, -1], [0, 0]], rtol=1e-6)
    assert unit_rows(given).dtype == np.float32
    assert np.array_equal(given, kept)
