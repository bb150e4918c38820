from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.clustering.sharded import CASES, run_all
from tests.workers import on_two_workers


@pytest.fixture(scope="module")
def both() -> list[dict[str, Any]]:
    """The results of all cases on each of two workers."""
    return on_two_workers(run_all)


@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_equal_one(name: str, both: list[dict[str, Any]]):
    alone = CASES[name]()
    tolerance = 1e-5 if name in ("membership", "spectral") else 1e-6
    for results in both:
        torch.testing.assert_close(results[name], alone, atol=tolerance, rtol=1e-5)
