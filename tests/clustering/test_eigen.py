from __future__ import annotations

import logging

import pytest
import torch

from rayclust.clustering.eigen import leading
from rayclust.errors import ConfigError


def symmetric(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    turn, _ = torch.linalg.qr(torch.randn((len(values), len(values)), generator=torch.Generator().manual_seed(seed)))
    return turn @ torch.diag(values) @ turn.T


def start(rows: int, columns: int) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(1))


def test_the_largest_by_value_not_by_size():
    values = torch.cat([torch.tensor([3.0, 2.0, -9.0]), torch.linspace(-1, 1, 197)])
    a = symmetric(values)
    found = leading(lambda x: a @ x, start(200, 6), 3)
    assert found.values.tolist() == pytest.approx([3.0, 2.0, 1.0], abs=1e-4)
    assert found.residual < 9 * 1e-5
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(3), atol=1e-5, rtol=0)


def test_slowly_falling_eigenvalues_need_restarts():
    values = 1.0 - torch.arange(400) / 400.0
    a = symmetric(values)
    found = leading(lambda x: a @ x, start(400, 12), 5, tolerance=1e-5)
    assert found.values.tolist() == pytest.approx(values[:5].tolist(), abs=1e-5)
    assert 8 < found.products < 100
    exact = torch.linalg.eigh(a.double())[1][:, -5:].float()
    assert torch.linalg.svdvals(found.vectors.T @ exact).min() > 0.999


def test_equal_eigenvalues_and_a_whole_space():
    a = torch.diag(torch.tensor([2.0, 2.0, 1.0, 0.0]))
    found = leading(lambda x: a @ x, torch.eye(4), 3)
    assert found.values.tolist() == pytest.approx([2.0, 2.0, 1.0])
    assert found.products == 1


def test_an_operator_of_small_rank_is_exhausted():
    u = torch.nn.functional.normalize(start(50, 1), dim=0)
    found = leading(lambda x: u @ (u.T @ x), start(50, 4), 2)
    assert found.values.tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    torch.testing.assert_close(found.vectors[:, :1].abs(), u.abs(), atol=1e-4, rtol=0)
    nothing = leading(torch.zeros_like, start(50, 4), 2)
    assert nothing.values.tolist() == [0.0, 0.0]


def test_same_start_same_bits_and_signs_are_fixed():
    a = symmetric(torch.linspace(0, 1, 60))
    first, second = (leading(lambda x: a @ x, start(60, 5), 3) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    turned = leading(lambda x: a @ x, -start(60, 5), 3)
    torch.testing.assert_close(turned.vectors, first.vectors, atol=1e-3, rtol=0)


def test_running_out_of_products_is_said(caplog: pytest.LogCaptureFixture):
    a = symmetric(1.0 - torch.arange(400) / 400.0)
    with caplog.at_level(logging.INFO):
        found = leading(lambda x: a @ x, start(400, 6), 5, most_products=2)
    assert found.products == 2
    assert "residual" in caplog.text


def test_refuses_more_vectors_than_columns():
    with pytest.raises(ConfigError, match="count = 3: from 1 to the 2 columns"):
        leading(torch.zeros_like, start(9, 2), 3)
