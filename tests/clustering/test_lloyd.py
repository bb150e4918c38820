from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.clustering import lloyd
from rayclust.clustering.lloyd import Partitions, half_squares, in_parts, nearest

ZERO = torch.zeros(4, dtype=torch.float64)


def rows_and_centers(restarts: int = 3, clusters: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 4, generator=generator), torch.randn(restarts, clusters, 4, generator=generator)


def slow_sums(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    members = torch.nn.functional.one_hot(labels, clusters).double()  # [N R K]
    return torch.einsum("nrk,nd->rkd", members, x.double()), members.sum(0).long()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_is_the_least_distance(offset: float):
    x, centers = rows_and_centers()
    origin = torch.full((4,), offset, dtype=torch.float64)
    far = x + offset
    scores, labels = nearest(far, centers, half_squares(centers, origin))
    distances = (x[:, None, None].double() - centers.double()).square().sum(-1)
    assert torch.equal(labels, distances.argmin(-1))
    squares = x.double().square().sum(1, keepdim=True)
    assert torch.allclose(squares - 2 * scores, distances.min(-1)[0], atol=1e-2 if offset else 1e-5)


def test_ties_go_to_the_smaller_id():
    centers = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]])
    bias = half_squares(centers, torch.zeros(2, dtype=torch.float64))
    assert nearest(torch.tensor([[0.0, 3.0], [2.0, 0.0], [-2.0, 0.0]]), centers, bias)[1].tolist() == [[0], [0], [1]]


@pytest.mark.parametrize("always", ["_add_rows", "_add_product", None])
@pytest.mark.parametrize("block", [1, 33, 300])
def test_sums_stay_right_while_centres_move(always: str | None, block: int, monkeypatch: pytest.MonkeyPatch):
    if always is not None:
        for name in ("_add_rows", "_add_product"):
            monkeypatch.setattr(Partitions, name, getattr(Partitions, always))
    monkeypatch.setattr(lloyd, "_MOVED_AT_ONCE", 7)
    monkeypatch.setattr(lloyd, "_MULTIPLIED_AT_ONCE", 50)
    x, centers = rows_and_centers()
    partitions = Partitions(centers)
    for step in range(4):
        moved = centers + 0.3 * step
        sums, counts, total = partitions.assign_and_sum(lambda: x.split(block), moved, ZERO)
        scores, labels = nearest(x, moved, half_squares(moved, ZERO))
        expected = slow_sums(x, labels, 5)
        assert torch.allclose(sums, expected[0], atol=1e-12)
        assert torch.equal(counts, expected[1])
        assert torch.allclose(total, scores.double().sum(0), rtol=1e-5)
        assert torch.equal(torch.cat(partitions.labels).long(), labels)


def test_both_ways_to_add_agree_and_are_both_taken(monkeypatch: pytest.MonkeyPatch):
    taken = []
    for name in ("_add_rows", "_add_product"):
        way = getattr(Partitions, name)
        monkeypatch.setattr(Partitions, name, lambda *a, way=way, name=name: (taken.append(name), way(*a)))
    x, centers = rows_and_centers()
    partitions = Partitions(centers)
    for step in (0.0, 0.01):
        sums, _, _ = partitions.assign_and_sum(lambda: [x], centers + step, ZERO)
    assert taken == ["_add_product", "_add_rows"]
    labels = nearest(x, centers + 0.01, half_squares(centers + 0.01, ZERO))[1]
    assert torch.allclose(sums, slow_sums(x, labels, 5)[0], atol=1e-12)


def test_dropped_partitions_leave_the_others_as_they_were():
    x, centers = rows_and_centers()
    partitions = Partitions(centers)
    partitions.assign_and_sum(lambda: x.split(60), centers, ZERO)
    chosen = torch.tensor([True, False, True])
    partitions.keep(chosen)
    sums, counts, _ = partitions.assign_and_sum(lambda: x.split(60), centers[chosen] + 0.2, ZERO)
    labels = nearest(x, centers[chosen] + 0.2, half_squares(centers[chosen] + 0.2, ZERO))[1]
    expected = slow_sums(x, labels, 5)
    assert torch.allclose(sums, expected[0], atol=1e-12)
    assert torch.equal(counts, expected[1])


def test_parts_hold_all_rows_in_order_as_wide_floats():
    x = torch.arange(20_000, dtype=torch.float64)[:, None]
    parts = list(in_parts(lambda: x.split(9000), columns=2000))
    assert torch.equal(torch.cat(parts), x)
    assert max(len(part) for part in parts) * 2000 <= max(2**20, 256 * 2000)
    assert [part.dtype for part in in_parts(lambda: [x[:5].half()], 1)] == [torch.float32]
    assert np.array_equal([len(part) for part in in_parts(lambda: [x[:0]], 1)], [0])
