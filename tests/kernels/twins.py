"""The compiled passes and their torch twins, on the same input."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from rayclust.kernels import native


def both_ways(passes: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What `passes`, which draws its input, returns with the compiled library and without it."""
    if native.library() is None:
        pytest.skip("no compiler, or a processor that the sources are not for")
    torch.manual_seed(0)
    compiled = passes()
    torch.manual_seed(0)
    with mock.patch.object(native, "library", return_value=None):
        return compiled, passes()
