from __future__ import annotations

import pytest
import torch

from rayclust.losses.outer_products import cells, fold, outer_products, put_quarters, quarters


def rows(count: int = 5, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_rectangle_holds_each_pair_once():
    z = torch.tensor([[2.0, 3.0, 5.0, 7.0]])
    packed = outer_products(z.T.contiguous(), 0, 2)[:, 0]
    assert cells(4) == 10
    assert sorted(packed.tolist()) == sorted(float(a * b) for i, a in enumerate(z[0]) for b in z[0][i:])


@pytest.mark.parametrize("width", [2, 6])
def test_quarters_are_those_of_the_matrices(width: int):
    z = rows(width=width)
    rectangles = outer_products(z.T.contiguous(), 0, width // 2).T.reshape(5, width // 2, width + 1)
    full, half = z[:, :, None] * z[:, None, :], width // 2
    first, across, last = quarters(rectangles)
    torch.testing.assert_close(first.triu(), full[:, :half, :half].triu())
    torch.testing.assert_close(across, full[:, :half, half:])
    torch.testing.assert_close(last.triu(), full[:, half:, half:].triu())


def test_weights_of_a_matrix_give_its_quadratic_form():
    z, m = rows(), rows(6, 6)
    m = m + m.T
    weights = torch.empty(1, 3, 7, dtype=torch.float64)
    put_quarters(weights, m[None, :3, :3], m[None, :3, 3:], m[None, 3:, 3:])
    products = outer_products(z.T.contiguous(), 0, 3)
    torch.testing.assert_close(weights.flatten() @ products, torch.einsum("ia,ab,ib->i", z, m, z))


def test_fold_is_the_gradient_slab_by_slab():
    columns = rows().T.contiguous().requires_grad_()
    whole = outer_products(columns.detach(), 0, 3)
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros_like(columns)
    for first, last in ((0, 2), (2, 3)):
        some = slice(first * 7, last * 7)
        torch.testing.assert_close(outer_products(columns.detach(), first, last), whole[some])
        fold(weights[some].clone(), columns.detach(), first, total)

    def plain(z: torch.Tensor) -> torch.Tensor:
        parts = []
        for b in range(3):
            parts += [z[3 + b] * z[3 + a] if a <= b else z[b] * z[a - 1] for a in range(7)]
        return torch.stack(parts)

    (plain(columns) * weights).sum().backward()
    torch.testing.assert_close(total, columns.grad)
