"""Closed forms of rate reduction in float64; the fast compression rate against the published form, with gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rayclust.errors import ShapeError
from rayclust.losses import coding_rate as module
from rayclust.losses.coding_rate import (
    CompressionOptions,
    Groups,
    by_rows,
    by_top,
    by_width,
    coding_rate,
    compression_rate,
    inverse_and_log_determinant,
    invert_rectangles,
    membership_energy,
    outer_products,
    outer_products_backward,
)
from tests import references

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


SHAPES = [(30, 8), (50, 7), (13, 40), (130, 66), (40, 70)]


def problem(count: int, width: int, temperature: float = 0.2) -> tuple[Tensor, Tensor]:
    z = unit_rows(count, width)
    codes = unit_rows(count, width, 1)
    return z, (codes @ codes.T).abs().div(temperature).softmax(1)


def evaluated(function: Any, z: Tensor, membership: Tensor, *more: Any) -> list[Tensor]:
    """Value and both gradients, in float64."""
    z, membership = z.clone().requires_grad_(), membership.clone().requires_grad_()
    value = function(z, membership, 0.1, *more)
    (3.0 * value).backward()
    assert z.grad is not None
    assert membership.grad is not None
    return [value.detach().double(), z.grad.double() / 3, membership.grad.double() / 3]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("count", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_published_form_in_value_and_gradient(count: int, width: int, dtype: torch.dtype):
    z, membership = problem(count, width)
    wanted = evaluated(references.compression_rate, z, membership)
    found = evaluated(compression_rate, z.to(dtype), membership.to(dtype))
    bounds = (1e-10, 1e-10, 1e-10) if dtype == torch.float64 else (1e-5, 1e-4, 1e-4)
    for part, plain, bound in zip(found, wanted, bounds, strict=True):
        assert relative(part, plain) < bound


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(("count", "width"), [(30, 8), (50, 7), (13, 40), (70, 66)])
def test_both_routes_agree_in_any_amount_of_memory(rows: bool, count: int, width: int, monkeypatch: pytest.MonkeyPatch):
    z, membership = problem(count, width)
    wanted = evaluated(references.compression_rate, z, membership)
    for name in ("by_rows", "by_width"):
        monkeypatch.setattr(module, name, by_rows if rows else by_width)
    for memory in (1 << 30, 8 * 20_000, 1):
        found = evaluated(compression_rate, z, membership, CompressionOptions(memory))
        for part, plain in zip(found, wanted, strict=True):
            assert relative(part, plain) < 1e-10


@pytest.mark.parametrize(("count", "width"), [(9, 4), (5, 11)])
def test_gradcheck(count: int, width: int):
    z, membership = problem(count, width)
    inputs = (z.requires_grad_(), membership.detach()[:, :4].requires_grad_())
    assert torch.autograd.gradcheck(lambda x, p: compression_rate(x, p, 0.1), inputs)


def test_columns_of_the_membership_add_up():
    z, membership = problem(30, 8)
    whole = evaluated(compression_rate, z, membership)
    parts = [evaluated(compression_rate, z, membership[:, some]) for some in (slice(0, 11), slice(11, 30))]
    assert relative(parts[0][0] + parts[1][0], whole[0]) < 1e-12
    assert relative(parts[0][1] + parts[1][1], whole[1]) < 1e-12
    assert relative(torch.cat([part[2] for part in parts], dim=1), whole[2]) < 1e-12


def test_without_gradients_only_the_value_is_found():
    z, membership = problem(30, 8)
    value = compression_rate(z, membership, 0.1)
    assert not value.requires_grad
    assert value.item() == pytest.approx(references.compression_rate(z, membership, 0.1).item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.12, 0.175])
def test_a_sharp_membership_in_float32_stays_exact(temperature: float):
    """Within rounding times the condition of A_j, which is in the hundreds for the sharpest of these."""
    z = unit_rows(200, 32)
    membership = (z @ z.T).abs().div(temperature).softmax(1)
    condition = 1.0 + float(membership.max() / membership.sum(0).min()) * 32 / 0.1
    bound = max(1e-4, 4 * torch.finfo(torch.float32).eps * condition)
    wanted = evaluated(references.compression_rate, z, membership)
    found = evaluated(compression_rate, z.float(), membership.float())
    assert relative(found[0], wanted[0]) < 1e-5
    assert max(relative(part, plain) for part, plain in zip(found[1:], wanted[1:], strict=True)) < bound


def test_the_largest_entries_alone_are_the_whole_where_there_are_no_others():
    z, _ = problem(40, 12)
    labels = torch.arange(40) % 8
    membership = (labels[:, None] == labels).double() / 5
    wanted = evaluated(references.compression_rate, z, membership)
    found = evaluated(compression_rate, z, membership, CompressionOptions(top=5))
    assert relative(found[0], wanted[0]) < 1e-12
    assert relative(found[1], wanted[1]) < 1e-12
    inside = membership > 0
    assert relative(found[2][inside], wanted[2][inside]) < 1e-12


def test_truncation_is_the_plain_form_of_the_kept_entries():
    z, membership = problem(40, 12, temperature=0.05)
    membership = membership / membership.sum(0)
    kept = torch.zeros_like(membership).scatter(0, membership.topk(20, dim=0).indices, 1.0)

    def plain(rows: Tensor, pi: Tensor, distortion: float) -> Tensor:
        sums = pi.sum(0) + module.GROUP_OFFSET
        moments = torch.einsum("ij,ia,ib->jab", pi * kept, rows, rows)
        matrices = torch.eye(12) + (12 / (distortion * sums))[:, None, None] * moments
        return (sums / 80 * torch.logdet(matrices)).sum()

    wanted = evaluated(plain, z, membership)
    found = evaluated(compression_rate, z, membership, CompressionOptions(top=20, max_truncated=1.0))
    for part, reference in zip(found, wanted, strict=True):
        assert relative(part, reference) < 1e-10


def test_truncation_gives_way_where_it_would_leave_out_too_much():
    z, membership = problem(40, 12)
    exact = compression_rate(z, membership, 0.1)
    mass = 1 - float(membership.topk(10, dim=0).values.sum() / membership.sum())
    assert mass > 0.01
    found = [
        compression_rate(z, membership, 0.1, CompressionOptions(1 << 20, 10, mass * part)) for part in (0.99, 1.01)
    ]
    assert found[0] == exact != found[1]


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ShapeError, match="membership has 4 rows: 3 are needed"):
        compression_rate(torch.ones(3, 2), torch.ones(4, 4), 0.1)


@pytest.mark.parametrize(
    ("count", "width", "rows"), [(1024, 128, False), (1024, 1024, True), (1500, 1024, True), (4096, 1024, False)]
)
def test_the_cheaper_side_is_taken(count: int, width: int, rows: bool, monkeypatch: pytest.MonkeyPatch):
    taken: list[str] = []
    for name in ("by_rows", "by_width"):
        monkeypatch.setattr(module, name, lambda groups, *_, name=name: taken.append(name) or module.Terms(groups))
    compression_rate(torch.zeros(count, width), torch.ones(count, 1), 0.1)
    assert taken == ["by_rows" if rows else "by_width"]


def test_all_routes_find_the_same():
    z, membership = problem(21, 9)
    groups = Groups(z, membership, 90 / membership.sum(0), True)
    inverses = torch.linalg.inv(
        torch.eye(9) + groups.scales[:, None, None] * torch.einsum("ij,ia,ib->jab", membership, z, z)
    )
    found = [by_width(groups, 1 << 20, 0.0), by_rows(groups, 1 << 20, 0.0), by_top(21, groups, 1 << 20, 0.0)]
    for one in found:
        torch.testing.assert_close(one.logs, -torch.logdet(inverses))
        torch.testing.assert_close(one.forms, torch.einsum("ia,jab,ib->ij", z, inverses, z))
        torch.testing.assert_close(one.pulls, torch.einsum("ij,jab,ib->ia", membership, inverses, z))


def matrices(count: int, width: int) -> Tensor:
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
    products = outer_products(z.T.contiguous(), slice(0, 10))
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


def test_inverse_and_determinant_worked_by_hand():
    given = torch.tensor([[[4.0, 2.0], [2.0, 3.0]], [[1.0, 0.0], [0.0, 2.0]]])
    inverse, logs = inverse_and_log_determinant(given)
    torch.testing.assert_close(inverse[0], torch.tensor([[3.0, -2.0], [-2.0, 4.0]]) / 8.0)
    torch.testing.assert_close(logs, torch.tensor([8.0, 2.0]).log())


@pytest.mark.parametrize("width", [17, 32, 40])
def test_float32_inverses_are_near_those_of_float64(width: int):
    given = matrices(20, width)
    inverse, logs = inverse_and_log_determinant(given.float())
    eye = torch.eye(width, dtype=torch.float64).expand_as(given)
    torch.testing.assert_close(inverse.double() @ given, eye, rtol=0.0, atol=1e-4)
    torch.testing.assert_close(logs.double(), torch.logdet(given), rtol=1e-6, atol=1e-5)


def rows(count: int = 5, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_rectangle_holds_each_pair_once():
    z = torch.tensor([[2.0, 3.0, 5.0, 7.0]])
    packed = outer_products(z.T.contiguous(), slice(0, 2))[:, 0]
    assert len(packed) == 10
    assert sorted(packed.tolist()) == sorted(float(a * b) for i, a in enumerate(z[0]) for b in z[0][i:])


def test_the_gradient_of_outer_products_slab_by_slab():
    columns = rows().T.contiguous().requires_grad_()
    whole = outer_products(columns.detach(), slice(0, 3))
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros_like(columns)
    for first, last in ((0, 2), (2, 3)):
        some = slice(first * 7, last * 7)
        torch.testing.assert_close(outer_products(columns.detach(), slice(first, last)), whole[some])
        outer_products_backward(weights[some].clone(), columns.detach(), slice(first, last), total)

    def plain(z: Tensor) -> Tensor:
        parts = []
        for b in range(3):
            parts += [z[3 + b] * z[3 + a] if a <= b else z[b] * z[a - 1] for a in range(7)]
        return torch.stack(parts)

    (plain(columns) * weights).sum().backward()
    torch.testing.assert_close(total, columns.grad)
