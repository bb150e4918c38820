"""The closed forms of rate reduction, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rayclust.errors import ShapeError
from rayclust.losses.coding_rate import coding_rate, membership_energy
from rayclust.losses.compression_rate import compression_rate

EPSILON2 = 0.1


def unit_rows(count: int, width: int, seed: int = 0) -> Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


def groups(sizes: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Rows on one axis for each group, and Π uniform within groups."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    same = (labels[:, None] == labels).double()
    return torch.eye(width, dtype=torch.float64)[labels], same / same.sum(1, keepdim=True)


def close(value: Tensor, wanted: float) -> None:
    assert value.item() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(("count", "width"), [(30, 8), (9, 20), (25, 7)])
def test_uniform_membership_compresses_nothing(count: int, width: int):
    z = unit_rows(count, width)
    uniform = torch.full((count, count), 1.0 / count, dtype=torch.float64)
    close(compression_rate(z, uniform, EPSILON2), coding_rate(z, EPSILON2).item())


@pytest.mark.parametrize("count", [24, 5])
def test_each_row_its_own_group_costs_the_same_for_any_unit_rows(count: int):
    eye = torch.eye(count, dtype=torch.float64)
    for seed in (0, 1):
        close(compression_rate(unit_rows(count, 8, seed), eye, EPSILON2), 0.5 * math.log(1 + 8 / EPSILON2))
    assert 0.5 * math.log(81) == pytest.approx(2.19722, abs=5e-6)


def test_equal_rows_fill_one_direction():
    z = unit_rows(1, 8).expand(30, 8)
    close(coding_rate(z, EPSILON2), 0.5 * math.log(1 + 8 / EPSILON2))


def test_a_basis_fills_the_most_that_unit_rows_can():
    z = torch.eye(8, dtype=torch.float64).repeat(4, 1)
    assert coding_rate(z, EPSILON2).item() == pytest.approx(9.59158, abs=5e-6)
    close(coding_rate(z, EPSILON2), 4 * math.log(11))
    for seed in range(5):
        assert coding_rate(unit_rows(32, 8, seed), EPSILON2) < 4 * math.log(11)


def test_two_orthogonal_groups():
    z, membership = groups([6, 6], 8)
    assert coding_rate(z, EPSILON2).item() == pytest.approx(3.71357, abs=5e-6)
    assert compression_rate(z, membership, EPSILON2).item() == pytest.approx(2.19722, abs=5e-6)


def test_more_orthogonal_groups_reduce_the_rate_more():
    losses = []
    for count in (1, 2, 4, 8):
        z, membership = groups([24 // count] * count, 8)
        rate, compressed = coding_rate(z, EPSILON2), compression_rate(z, membership, EPSILON2)
        close(rate, count / 2 * math.log(1 + 8 / (count * EPSILON2)))
        close(compressed, 0.5 * math.log(1 + 8 / EPSILON2))
        losses.append((compressed - rate).item())
    assert losses == sorted(losses, reverse=True)


def test_rotations_and_the_order_of_rows_change_nothing():
    z, order = unit_rows(20, 6), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    membership = (z @ z.T).abs().div(0.2).softmax(1)
    rotation = torch.linalg.qr(unit_rows(6, 6, 2)).Q
    rate, compressed = coding_rate(z, EPSILON2).item(), compression_rate(z, membership, EPSILON2).item()
    for rows, pi in ((z @ rotation, membership), (z[order], membership[order][:, order])):
        close(coding_rate(rows, EPSILON2), rate)
        close(compression_rate(rows, pi, EPSILON2), compressed)


def test_few_rows_and_many_dimensions_have_the_rate_of_the_plain_formula():
    z = unit_rows(5, 9).requires_grad_()
    plain = 0.5 * torch.logdet(torch.eye(9) + 9 / (5 * EPSILON2) * z.T @ z)
    close(coding_rate(z, EPSILON2), plain.item())
    assert torch.autograd.gradcheck(lambda x: coding_rate(x, EPSILON2), (z,))


def test_the_rate_is_taken_in_float32_at_least():
    z = unit_rows(40, 8)
    assert coding_rate(z.bfloat16(), EPSILON2).dtype == torch.float32
    assert coding_rate(z.float(), EPSILON2).item() == pytest.approx(coding_rate(z, EPSILON2).item(), rel=1e-5)


def test_energy_of_a_membership_lies_between_uniform_and_permutation():
    assert membership_energy(torch.full((7, 7), 1 / 7)).item() == pytest.approx(0.5)
    assert membership_energy(torch.eye(7).flip(0)).item() == pytest.approx(3.5)
    soft = unit_rows(7, 7).abs().softmax(1)
    assert 0.5 < membership_energy(soft).item() < 3.5


def test_vectors_are_refused():
    with pytest.raises(ShapeError, match="z has shape"):
        coding_rate(torch.ones(3), EPSILON2)
