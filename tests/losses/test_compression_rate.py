"""The fast compression term against the published form: value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rayclust.errors import ShapeError
from rayclust.losses import compression_rate as module
from rayclust.losses.compression_rate import CompressionOptions, compression_rate, truncated_mass
from tests import references
from tests.losses.test_coding_rate import unit_rows

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
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_both_routes_agree_in_any_amount_of_memory(rows: bool, count: int, width: int, monkeypatch: pytest.MonkeyPatch):
    z, membership = problem(count, width)
    wanted = evaluated(references.compression_rate, z, membership)
    monkeypatch.setattr(module, "prefers_rows", lambda *shape: rows)
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
    assert truncated_mass(membership, 5).item() == pytest.approx(0.0, abs=1e-12)
    assert relative(found[0], wanted[0]) < 1e-12
    assert relative(found[1], wanted[1]) < 1e-12
    inside = membership > 0
    assert relative(found[2][inside], wanted[2][inside]) < 1e-12


def test_truncation_is_the_plain_form_of_the_kept_entries():
    z, membership = problem(40, 12, temperature=0.05)
    membership = membership / membership.sum(0)
    kept = torch.zeros_like(membership).scatter(0, membership.topk(20, dim=0).indices, 1.0)
    mass = truncated_mass(membership, 20).item()
    assert mass == pytest.approx(1 - (membership * kept).sum().item() / 40)

    def plain(rows: Tensor, pi: Tensor, distortion: float) -> Tensor:
        sums = pi.sum(0) + module.GROUP_OFFSET
        moments = torch.einsum("ij,ia,ib->jab", pi * kept, rows, rows)
        matrices = torch.eye(12) + (12 / (distortion * sums))[:, None, None] * moments
        return (sums / 80 * torch.logdet(matrices)).sum()

    wanted = evaluated(plain, z, membership)
    found = evaluated(compression_rate, z, membership, CompressionOptions(top=20, most_truncated=1.0))
    for part, reference in zip(found, wanted, strict=True):
        assert relative(part, reference) < 1e-10


def test_truncation_gives_way_where_it_would_leave_out_too_much():
    z, membership = problem(40, 12)
    exact = compression_rate(z, membership, 0.1)
    assert truncated_mass(membership, 10) > 0.01
    assert compression_rate(z, membership, 0.1, CompressionOptions(top=10, most_truncated=0.01)) == exact


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ShapeError, match="membership has 4 rows: 3 are needed"):
        compression_rate(torch.ones(3, 2), torch.ones(4, 4), 0.1)
