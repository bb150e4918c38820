from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayclust.clustering.sinkhorn import membership
from rayclust.errors import ConfigError
from tests import references


def codes(count: int = 12, width: int = 5, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.parametrize("half_steps", [1, 3, 5, 11])
def test_is_the_alternating_scaling_of_the_whole_matrix(half_steps: int):
    c = codes()
    wanted = references.membership(c.numpy(), 0.2, half_steps)
    np.testing.assert_allclose(membership(c, 0.2, half_steps).numpy(), wanted, rtol=1e-10)
    assert membership(c, 0.2, half_steps).sum(1).allclose(torch.ones(12, dtype=torch.float64), atol=1e-12)
    assert membership(c.float(), 0.2, half_steps).sum(1).allclose(torch.ones(12), atol=1e-6)


def test_equal_codes_belong_to_all_alike():
    c = codes(1).expand(7, 5)
    torch.testing.assert_close(membership(c, 0.1), torch.full((7, 7), 1 / 7, dtype=torch.float64))


def test_two_orthogonal_groups():
    c = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1, 1, 1]]
    found = membership(c, 0.1)
    inside = math.exp(10) / (3 * math.exp(10) + 3)
    assert found[0, 1].item() == pytest.approx(inside)
    assert inside == pytest.approx(0.333318, abs=5e-7)
    assert found[0, 3].item() == pytest.approx(1.513e-5, abs=5e-9)


def test_temperature_goes_from_each_alone_to_all_alike():
    c = codes()
    torch.testing.assert_close(membership(c, 1e-4), torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(membership(c, 1e5), torch.full((12, 12), 1 / 12, dtype=torch.float64), atol=1e-5, rtol=0)


def test_signs_and_order_of_codes():
    c, order = codes(), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    signs = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(membership(signs * c, 0.2), membership(c, 0.2))
    torch.testing.assert_close(membership(c[order], 0.2), membership(c, 0.2)[order][:, order])


def test_gradient_holds_the_columns_scales_fixed():
    c = codes().requires_grad_()
    weights = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((membership(c, 0.2) * weights).sum(), c)
    with torch.no_grad():  # any row scaling cancels: b is read off up to a constant
        scales = (membership(c, 0.2).log() - (c @ c.T).abs() / 0.2)[0]
    plain = ((c @ c.T).abs() / 0.2 + scales).softmax(1)
    torch.testing.assert_close(gradient, torch.autograd.grad((plain * weights).sum(), c)[0])
    assert torch.autograd.grad(membership(c, 0.2).sum(), c)[0].abs().max() < 1e-12


def test_converged_membership_is_doubly_stochastic_and_symmetric():
    found = membership(codes(60, 8), 0.1, None)
    assert (found.sum(0) - 1).abs().max() < 2e-6
    torch.testing.assert_close(found, found.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("settings", "message"), [
    ((0.0, 5), "temperature = 0.0: must be above 0"),
    ((0.1, 4), "half_steps = 4: must be odd"),
])  # fmt: skip
def test_what_cannot_be_is_refused(settings: tuple[float, int], message: str):
    with pytest.raises(ConfigError, match=message):
        membership(codes(), *settings)
