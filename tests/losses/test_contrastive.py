"""Contrast of clusters, agreement and balance: closed forms, symmetries, and one worker against several."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.errors import ShapeError
from rayclust.losses.contrastive import agreement_loss, balance, cluster_contrast
from tests.workers import on_workers

BALANCED = torch.eye(10, dtype=torch.float64).repeat(6, 1)
UNIFORM = torch.full((40, 10), 0.1, dtype=torch.float64)


def random_partitions(rows: int = 13, clusters: int = 4) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, rows, clusters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, v = logits.softmax(2)
    return u, v


@pytest.mark.parametrize(
    ("clusters", "temperature", "wanted"), [(10, 0.5, 1.2343182), (10, 1.0, 2.0310165), (1000, 5.0, 7.4005131)]
)
def test_equal_certain_partitions_have_the_least_contrast(clusters: int, temperature: float, wanted: float):
    u = torch.eye(clusters, dtype=torch.float64)
    found = float(cluster_contrast(u, u, temperature))
    assert found == pytest.approx(wanted, abs=5e-8)
    assert found == pytest.approx(math.log(1 + (2 * clusters - 2) * math.exp(-1 / temperature)), abs=1e-12)


def test_rows_that_are_all_alike_have_the_most():
    assert float(cluster_contrast(UNIFORM, UNIFORM, 0.5)) == pytest.approx(math.log(19), abs=1e-9)


def test_contrast_is_symmetric_and_blind_to_orders():
    u, v = random_partitions()
    whole = cluster_contrast(u, v, 0.5)
    rows, clusters = torch.randperm(13), torch.randperm(4)
    for other in (
        cluster_contrast(v, u, 0.5),
        cluster_contrast(u[rows], v[rows], 0.5),
        cluster_contrast(u[:, clusters], v[:, clusters], 0.5),
    ):
        torch.testing.assert_close(other, whole, rtol=1e-12, atol=0)


def test_products_of_columns_equal_the_slow_form_with_gathered_unit_columns():
    u, v = random_partitions()
    columns = functional.normalize(torch.cat([u, v], 1), dim=0)
    logits = (columns.T @ columns / 0.3).fill_diagonal_(-torch.inf)
    slow = torch.stack([logits[k].logsumexp(0) - logits[k, (k + 4) % 8] for k in range(8)]).mean()
    torch.testing.assert_close(cluster_contrast(u, v, 0.3), slow, rtol=1e-6, atol=0)


def test_a_cluster_that_no_row_has_is_no_error():
    u = torch.zeros(6, 3)
    u[:, 0] = 1.0
    u.requires_grad_()
    loss = cluster_contrast(u, u, 0.5)
    loss.backward()
    assert u.grad is not None
    assert bool(loss.isfinite())
    assert bool(u.grad.isfinite().all())


def test_shapes_are_checked():
    with pytest.raises(ShapeError, match=r"v has shape \(3, 2\)"):
        cluster_contrast(torch.ones(3, 3), torch.ones(3, 2), 1.0)


def test_agreement_of_equal_uniform_and_disjoint_rows():
    assert float(agreement_loss(BALANCED, BALANCED)) == 0.0
    assert float(agreement_loss(UNIFORM, UNIFORM)) == pytest.approx(math.log(10), abs=1e-12)
    assert float(agreement_loss(BALANCED, BALANCED.roll(1, 1))) == 100.0
    p = BALANCED.clone().requires_grad_()
    agreement_loss(p, BALANCED.roll(1, 1)).backward()
    assert p.grad is not None
    assert bool(p.grad.isfinite().all())


def test_balance_of_even_and_collapsed_partitions():
    assert 2 * float(balance(BALANCED)) == pytest.approx(4.6051702, abs=5e-8)
    assert float(balance(torch.eye(10)[:1].repeat(5, 1))) == pytest.approx(0.0, abs=1e-6)


def test_the_ideal_solution_of_ten_clusters_has_the_least_loss():
    distillation = 2 * cluster_contrast(BALANCED, BALANCED, 0.5)
    total = distillation + agreement_loss(BALANCED, BALANCED) - 5 * 2 * balance(BALANCED)
    assert float(total) == pytest.approx(-20.5572145, abs=5e-8)


def _part(rank: int, world: int) -> dict[str, Tensor]:
    """The loss of one worker's rows, every W-th, and its gradient as the training loop averages it."""
    u, v = random_partitions()
    shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    own_u, own_v = ((x[rank::world].log() + shift * sign).softmax(1) for x, sign in ((u, 1.0), (v, -0.5)))
    loss = cluster_contrast(own_u, own_v, 0.5) + agreement_loss(own_u, own_v) - 5 * (balance(own_u) + balance(own_v))
    weight = world * len(own_u) / len(u)
    (loss * weight).backward()
    assert shift.grad is not None
    return {"loss": loss.detach() * weight / world, "gradient": shift.grad / world}


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_with_unequal_parts_have_value_and_gradient_of_one(workers: int):
    alone, parts = _part(0, 1), on_workers(workers, _part)
    for name in ("loss", "gradient"):
        torch.testing.assert_close(sum(part[name] for part in parts), alone[name], rtol=1e-10, atol=1e-12)
