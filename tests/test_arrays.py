from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.arrays import require_matrix
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
