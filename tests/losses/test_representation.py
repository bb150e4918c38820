"""Losses of representations: values by hand, invariances, and the same result on any number of workers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.losses.representation import (
    alignment,
    class_prototypes,
    concentration,
    nt_xent,
    prototype_contrast,
    prototype_scattering,
    queue_contrast,
)
from tests.workers import on_two_workers

ALL = torch.ones(4, dtype=torch.bool)


def unit_rows(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def test_scattering_of_orthogonal_prototypes() -> None:
    e = torch.eye(4, dtype=torch.float64)
    assert prototype_scattering(e, e, ALL, 0.5).item() == pytest.approx(0.3407530, abs=1e-7)  # ln(1 + 3e⁻²)


def test_absent_clusters_take_no_part() -> None:
    e = torch.eye(5, dtype=torch.float64)
    present = torch.tensor([True, True, True, True, False])
    assert prototype_scattering(e, e, present, 0.5).item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), abs=1e-12)


def test_scattering_of_opposite_and_of_equal_prototypes() -> None:
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert prototype_scattering(two, two, ALL[:2], 0.5).item() == pytest.approx(0.0181499, abs=1e-7)  # ln(1 + e⁻⁴)
    equal = two[:1].expand(4, 2)
    assert prototype_scattering(equal, equal, ALL, 0.5).item() == pytest.approx(math.log(4), abs=1e-12)


def test_only_the_positive_is_the_targets() -> None:
    online, target = unit_rows(4, 8, 1), unit_rows(4, 8, 2)
    by_hand = 0.0
    for c in range(4):
        positive = float(online[c] @ target[c]) / 0.5
        others = sum(math.exp(float(online[c] @ online[j]) / 0.5) for j in range(4) if j != c)
        by_hand += (math.log(math.exp(positive) + others) - positive) / 4
    assert prototype_scattering(online, target, ALL, 0.5).item() == pytest.approx(by_hand, abs=1e-12)


def test_a_prototype_is_the_direction_of_the_mean_of_unit_rows() -> None:
    z = functional.normalize(torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64), dim=1)
    prototypes, present = class_prototypes(z, torch.tensor([1, 1]), 3)
    assert prototypes[1].tolist() == pytest.approx([1 / math.sqrt(2)] * 2)
    assert present.tolist() == [False, True, False]
    assert not prototypes[0].any()


def test_rows_of_the_queue_count_in_prototypes() -> None:
    z, queued = unit_rows(6, 4, 3), unit_rows(5, 4, 4)
    labels, ids = torch.tensor([0, 1, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 3])
    with_queue = class_prototypes(z, labels, 5, (queued, ids))
    together = class_prototypes(torch.cat([z, queued]), torch.cat([labels, ids]), 5)
    assert torch.allclose(with_queue[0], together[0])
    assert torch.equal(with_queue[1], together[1])


def test_scattering_does_not_depend_on_order_names_or_copies() -> None:
    q, k = unit_rows(12, 6, 5), unit_rows(12, 6, 6)
    labels = torch.arange(12) % 4

    def loss(q: Tensor, k: Tensor, labels: Tensor) -> float:
        online, present = class_prototypes(q, labels, 5)
        return float(prototype_scattering(online, class_prototypes(k, labels, 5)[0], present, 0.5))

    expected, order = loss(q, k, labels), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert loss(q[order], k[order], labels[order]) == pytest.approx(expected, abs=1e-12)
    assert loss(q, k, torch.tensor([4, 2, 0, 1])[labels]) == pytest.approx(expected, abs=1e-12)
    assert loss(q.repeat(2, 1), k.repeat(2, 1), labels.repeat(2)) == pytest.approx(expected, abs=1e-12)


def test_alignment() -> None:
    p = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    assert alignment(p, p).item() == pytest.approx(-1)
    assert alignment(p, 3 * p).item() == pytest.approx(-1)
    assert 2 + 2 * alignment(p, p.flip(1)).item() == pytest.approx(2)


def test_nt_xent_of_two_orthogonal_images() -> None:
    z = torch.eye(2, 4, dtype=torch.float64)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(0.2395448, abs=1e-7)  # ln(1 + 2e⁻²)


def test_queue_contrast_with_an_orthogonal_queue() -> None:
    q = torch.eye(1, 2, dtype=torch.float64)
    queue = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(65_536, 2)
    assert queue_contrast(q, q, queue, 0.07).item() == pytest.approx(0.0401355, abs=1e-7)  # ln(1 + 65536 e^(−1/.07))


def test_concentration_before_clipping() -> None:
    # Three clusters alike: the percentiles are the value itself, and the mean is the temperature.
    labels = torch.arange(9) // 3
    assert torch.allclose(concentration(torch.ones(9), labels, 3, 1 / math.log(13)), torch.full((3,), 0.3898712))


def test_concentrations_are_clipped_and_scaled() -> None:
    distances = torch.tensor([0.1, 0.1, 1.0, 1.0, 2.0, 2.0, 5.0])
    phi = concentration(distances, torch.tensor([0, 0, 1, 1, 2, 2, 3]), 5, 0.2)
    assert phi.mean().item() == pytest.approx(0.2)
    assert phi[0] < phi[1] < phi[2]
    assert phi[3] == phi[4] == phi.max()  # one row, and none: the largest


def test_prototype_contrast() -> None:
    q, centers = torch.eye(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    phi = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    loss = prototype_contrast(q, torch.tensor([0]), centers, phi, torch.tensor([1, 2, 2]))
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), abs=1e-12)


def test_without_negatives_nothing_is_lost() -> None:
    q, centers = torch.eye(1, 2), torch.eye(2)
    assert (
        prototype_contrast(q, torch.tensor([0]), centers, torch.ones(2), torch.zeros(0, dtype=torch.long)).item() == 0
    )


def _part_of_the_losses(rank: int, world: int) -> list[Any]:
    """Losses of a batch of 8 rows, averaged over workers, and the gradient of their sum by this worker's rows."""
    q, k = unit_rows(8, 5, 7)[rank::world].requires_grad_(), unit_rows(8, 5, 8)[rank::world]
    labels = (torch.arange(8) % 3)[rank::world]
    online, present = class_prototypes(q, labels, 4)
    scattering = prototype_scattering(online, class_prototypes(k, labels, 4)[0], present, 0.5)
    queue, centers, negatives = unit_rows(6, 5, 9), unit_rows(4, 5, 10), torch.tensor([3, 3])
    with_queue, present = class_prototypes(q, labels, 4, (queue, torch.arange(6) % 4))
    losses = [
        scattering,
        prototype_scattering(with_queue, class_prototypes(k, labels, 4)[0], present, 0.5),
        nt_xent(q, k, 0.5),
        2 + 2 * alignment(q, k),
        queue_contrast(q, k, queue, 0.2),
        prototype_contrast(q, labels, centers, torch.full((4,), 0.5, dtype=torch.float64), negatives),
    ]
    (gradient,) = torch.autograd.grad(sum(losses), q)
    return [[float(loss.detach()) for loss in losses], gradient / world]


def test_value_and_gradient_are_those_of_one_worker() -> None:
    expected, whole = _part_of_the_losses(0, 1)
    parts = on_two_workers(_part_of_the_losses)
    means = torch.tensor([losses for losses, _ in parts]).double().mean(0)
    assert means.tolist() == pytest.approx(expected, abs=1e-6)
    for rank, (_, gradient) in enumerate(parts):
        assert torch.allclose(gradient, whole[rank::2], atol=1e-12)
