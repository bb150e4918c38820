"""Alone everything is the identity; two workers give what one would have on the union."""

from __future__ import annotations

from typing import Any

import torch

from rayclust import collectives
from tests.workers import on_two_workers, on_workers

X = torch.arange(12, dtype=torch.float64).reshape(4, 3) / 7


def test_alone_nothing_changes():
    x = torch.ones(2, requires_grad=True)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.all_sum(x) is x
    torch.testing.assert_close(collectives.all_mean(x.detach()), torch.ones(2))
    assert collectives.differentiable_sum(x) is x
    collectives.barrier()


def loss_of(mean: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Depends on every row through the mean of all, and on each row by itself; a mean over rows."""
    return ((rows - mean) ** 4).sum(1).mean() + (mean**3).sum()


def _half(rank: int, world: int) -> dict[str, Any]:
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rows = X[2 * rank : 2 * rank + 2] * weight
    mean = collectives.differentiable_sum(rows.sum(0)) / 4
    loss = loss_of(mean, rows)
    loss.backward()
    collectives.barrier()
    own = torch.tensor([rank + 1.0])
    return {
        "place": (collectives.rank(), collectives.world_size()),
        "sum": collectives.all_sum(own),
        "own": own,
        "mean": collectives.all_mean(own),
        "requires_grad": collectives.all_sum(weight * own).requires_grad,
        "loss": collectives.all_mean(loss.detach()),
        "gradient": collectives.all_mean(weight.grad),
    }


def test_two_workers_have_the_value_and_the_averaged_gradient_of_one_on_the_union():
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rows = X * weight
    loss = loss_of(rows.mean(0), rows)
    loss.backward()
    both = on_two_workers(_half)
    assert [found["place"] for found in both] == [(0, 2), (1, 2)]
    for found in both:
        assert found["sum"].item() == 3
        assert found["mean"].item() == 1.5
        assert not found["requires_grad"]
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found["gradient"], weight.grad, rtol=1e-12, atol=0)
    assert [found["own"].item() for found in both] == [1, 2], "a sum changed what it was given"


def _in_a_grid(rank: int, world: int) -> dict[str, Any]:
    grid = collectives.Grid.of(2)
    own = torch.full((rank // 2 + 1, 2), float(rank))  # the first row holds one part in three, the second two
    found: dict[str, Any] = {"all": collectives.all_sum(torch.tensor(rank))}
    with collectives.sharing_rows(grid.row):
        found["place"] = (collectives.rank(), collectives.world_size(), collectives.is_first())
        found["row"] = collectives.all_sum(torch.tensor(rank))
        found["everyone"] = collectives.everyone().all_sum(torch.tensor(rank))
        collectives.barrier()
    found["column"] = grid.column.all_sum(torch.tensor(rank))
    found["joined"] = grid.column.joined(own, 3)
    return found


def test_four_workers_in_a_grid():
    for rank, found in enumerate(on_workers(4, _in_a_grid)):
        assert found["all"] == found["everyone"] == 6
        assert found["place"] == (rank % 2, 2, rank == 0)
        assert found["row"] == (1 if rank < 2 else 5)
        assert found["column"] == (2 if rank % 2 == 0 else 4)
        assert found["joined"][:, 0].tolist() == [rank % 2, rank % 2 + 2, rank % 2 + 2]


GRIDS = ((1, 1), (1, 2), (2, 2), (1, 4), (4, 1))
"""Parts of the heads, and of the clusters."""


def _in_three_axes(rank: int, world: int) -> list[dict[str, list[int]]]:
    own = torch.tensor(rank)
    grids = [collectives.Grid.of(*parts) for parts in GRIDS]
    return [{name: getattr(grid, name).gathered(own).tolist() for name in ("row", "column", "stack")} for grid in grids]


def test_four_workers_in_grids_of_three_axes():
    """By the numbers of the workers along each axis; a row's are consecutive."""
    for rank, (alone, halves, both, stack, column) in enumerate(on_workers(4, _in_three_axes)):
        first, second = 2 * (rank // 2), rank % 2
        assert alone == {"row": [0, 1, 2, 3], "column": [rank], "stack": [rank]}
        assert halves == {"row": [first, first + 1], "column": [rank], "stack": [second, second + 2]}
        assert both == {"row": [rank], "column": [second, second + 2], "stack": [first, first + 1]}
        assert stack == {"row": [rank], "column": [rank], "stack": [0, 1, 2, 3]}
        assert column == {"row": [rank], "column": [0, 1, 2, 3], "stack": [rank]}


def _in_columns(rank: int, world: int) -> dict[str, torch.Tensor]:
    """(Σ over all columns of tanh(w)·x)², where each worker sums its own columns."""
    team = collectives.everyone()
    weight = torch.tensor([1.0, -2.0, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    own = X[:, collectives.stretches(3, world)[rank]].clone().requires_grad_()
    loss = team.total((team.spread(weight.tanh()) @ own).sum()).square()
    loss.backward()
    assert weight.grad is not None
    assert own.grad is not None
    first = team.first_one(torch.tensor(rank + 5.0))
    return {"loss": loss.detach(), "weight": weight.grad, "own": own.grad, "first": first}


def test_a_loss_made_of_parts_has_the_gradients_of_the_whole():
    alone, found = _in_columns(0, 1), on_two_workers(_in_columns)
    for one in (alone, *found):
        assert one["first"] == 5
        torch.testing.assert_close(one["loss"], alone["loss"], rtol=1e-12, atol=0)
        torch.testing.assert_close(one["weight"], alone["weight"], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([one["own"] for one in found], 1), alone["own"], rtol=1e-12, atol=0)


def test_stretches_are_as_even_as_can_be():
    assert collectives.stretches(5, 2) == [slice(0, 2), slice(2, 5)]
    assert collectives.stretches(2, 3) == [slice(0, 0), slice(0, 1), slice(1, 2)]
    alone = collectives.Grid.of(1)
    assert (alone.row.size, alone.column.size) == (1, 1)


def _gathered(rank: int, world: int) -> dict[str, Any]:
    own = [slice(0, 3), slice(3, 4)][rank]
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rows = collectives.differentiable_gather(X[own] * weight)
    (rows @ rows.T).pow(3).sum().backward()
    return {"rows": rows.detach(), "gradient": collectives.all_mean(weight.grad)}


def test_gathered_rows_of_any_number_have_the_gradient_of_the_union():
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    rows = collectives.differentiable_gather(X * weight)
    (rows @ rows.T).pow(3).sum().backward()
    for found in on_two_workers(_gathered):
        assert torch.equal(found["rows"], rows)
        torch.testing.assert_close(found["gradient"], weight.grad, rtol=1e-12, atol=0)
