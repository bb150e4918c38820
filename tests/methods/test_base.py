from __future__ import annotations

import pytest
import torch
from torch import nn

from rayclust.methods.base import Method


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_matrices_decay_and_vectors_do_not(shape: tuple[int, ...]):
    method = Method()
    assert method.is_decayed("w", nn.Parameter(torch.zeros(shape)))
    assert not method.is_decayed("b", nn.Parameter(torch.zeros(3)))
