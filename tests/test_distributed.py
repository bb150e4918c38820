"""For one worker everything is the identity; several give what one would have on the union."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rayclust import distributed
from tests.workers import on_two_workers, on_workers

X = torch.arange(12, dtype=torch.float64).reshape(4, 3) / 7


def test_one_worker_changes_nothing():
    x = torch.ones(2, requires_grad=True)
    assert distributed.data_group() == distributed.world() == distributed.ProcessGroup(1, 0)
    assert distributed.all_reduce(x) is x
    assert distributed.differentiable_all_reduce(x) is x
    assert distributed.differentiable_all_gather(x) is x
    assert distributed.data_group().broadcast(x) is x
    assert distributed.own_slice(3) == slice(0, 3)
    mesh = distributed.DeviceMesh.of(1)
    assert (mesh.data.size, mesh.heads.size) == (1, 1)
    distributed.barrier()


def test_even_slices_differ_by_one_at_most():
    assert distributed.even_slices(5, 2) == [slice(0, 2), slice(2, 5)]
    assert distributed.even_slices(2, 3) == [slice(0, 0), slice(0, 1), slice(1, 2)]


def _loss(mean: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Depend on every row through the mean of all, and on each row by itself; a mean over rows."""
    return ((rows - mean) ** 4).sum(1).mean() + (mean**3).sum()


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def _on_half(rank: int, world: int) -> dict[str, Any]:
    own = torch.tensor([rank + 1.0])
    group = distributed.data_group()
    found: dict[str, Any] = {"place": (group.rank, group.size)}
    found |= {"sum": distributed.all_reduce(own), "own": own}
    found["first"] = distributed.data_group().broadcast(own)
    # 1. A loss through the sum over workers: its value and its averaged gradient.
    weight, unused = _weight(), _weight()
    found["requires_grad"] = distributed.all_reduce(weight * own).requires_grad
    rows = X[2 * rank : 2 * rank + 2] * weight
    loss = _loss(distributed.differentiable_all_reduce(rows.sum(0)) / 4, rows)
    loss.backward()
    distributed.average_gradients([unused, weight])
    found["loss"], found["gradient"], found["unused"] = (
        distributed.all_reduce(loss.detach()) / 2,
        weight.grad,
        unused.grad,
    )
    # 2. A loss of the rows of all workers, of which they have different numbers.
    weight = _weight()
    rows = distributed.differentiable_all_gather(X[[slice(0, 3), slice(3, 4)][rank]] * weight)
    (rows @ rows.T).pow(3).sum().backward()
    distributed.average_gradients([weight])
    found["rows"], found["gathered_gradient"] = rows.detach(), weight.grad
    distributed.barrier()
    return found


def test_two_workers_have_value_and_gradient_of_one_on_the_union():
    weight = _weight()
    loss = _loss((X * weight).mean(0), X * weight)
    loss.backward()
    gathered = _weight()
    rows = X * gathered
    (rows @ rows.T).pow(3).sum().backward()
    both = on_two_workers(_on_half)
    assert [found["place"] for found in both] == [(0, 2), (1, 2)]
    for rank, found in enumerate(both):
        assert (found["sum"].item(), found["first"].item()) == (3, 1)
        assert found["own"].item() == rank + 1, "a sum changed its argument"
        assert not found["requires_grad"]
        assert found["unused"] is None
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found["gradient"], weight.grad, rtol=1e-12, atol=0)
        assert torch.equal(found["rows"], rows)
        torch.testing.assert_close(found["gathered_gradient"], gathered.grad, rtol=1e-12, atol=0)


def _in_meshes(rank: int, world: int) -> dict[str, Any]:
    mesh = distributed.DeviceMesh.of(2)
    own = torch.full((rank // 2 + 1, 2), float(rank))  # the first two workers hold one row in three, the others two
    number = torch.tensor(rank)
    found: dict[str, Any] = {"all": distributed.all_reduce(number)}
    with distributed.data_parallel(mesh.data):
        group = distributed.data_group()
        found["place"] = (group.rank, group.size, distributed.world().rank, distributed.own_slice(6))
        found["data"], found["world"] = distributed.all_reduce(number), distributed.world().all_reduce(number)
        found["first"] = distributed.data_group().broadcast(number)
        distributed.barrier()
    found["heads"] = mesh.heads.all_gather(number)
    found["joined"] = mesh.heads.all_gather_cat(own, 3)
    found["all heads"] = distributed.DeviceMesh.of(4).heads.all_gather(number)
    return found


def test_four_workers_in_a_mesh():
    for rank, found in enumerate(on_workers(4, _in_meshes)):
        assert found["all"] == found["world"] == 6
        assert found["place"] == (rank % 2, 2, rank, slice(3 * (rank % 2), 3 * (rank % 2) + 3))
        assert found["data"] == (1 if rank < 2 else 5)
        assert found["first"] == 2 * (rank // 2)
        assert found["heads"].tolist() == [rank % 2, rank % 2 + 2]
        assert found["joined"][:, 0].tolist() == [rank % 2, rank % 2 + 2, rank % 2 + 2]
        assert found["all heads"].tolist() == [0, 1, 2, 3]
