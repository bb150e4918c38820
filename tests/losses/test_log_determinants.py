from __future__ import annotations

import pytest
import torch

from rayclust.losses.log_determinants import inverse_and_log_determinant, invert_rectangles
from rayclust.losses.outer_products import outer_products


def matrices(count: int, width: int) -> torch.Tensor:
    x = torch.randn(count, width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x @ x.mT / width + torch.eye(width)


@pytest.mark.parametrize("width", [1, 5, 32, 33, 47, 130])
def test_is_the_plain_inverse_whatever_stands_below_the_diagonal(width: int):
    a = matrices(3, width)
    inverse, logs = inverse_and_log_determinant(a.triu() + 7.0 * torch.ones_like(a).tril(-1))
    torch.testing.assert_close(inverse, torch.linalg.inv(a))
    torch.testing.assert_close(logs, torch.logdet(a))


def test_what_is_not_positive_definite_gives_no_number():
    a = matrices(3, 70)
    a[1] -= 5 * torch.eye(70)
    logs = inverse_and_log_determinant(a)[1]
    assert logs.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("threads", [1, 2])
def test_rectangles_become_the_weights_of_their_inverses(threads: int):
    z = torch.nn.functional.normalize(matrices(1, 20)[0], dim=1)
    products = outer_products(z.T.contiguous(), 0, 10)
    share = matrices(1, 150)[0].abs()[:, :20]
    rectangles, scales = (share @ products.T).view(150, 10, 21), torch.linspace(0.5, 9, 150, dtype=torch.float64)
    full = torch.eye(20) + scales[:, None, None] * torch.einsum("ji,ia,ib->jab", share, z, z)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logs = invert_rectangles(rectangles, scales)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(logs, torch.logdet(full))
    forms = torch.einsum("ia,jab,ib->ji", z, torch.linalg.inv(full), z)
    torch.testing.assert_close(rectangles.flatten(1) @ products, forms)
