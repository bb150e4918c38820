from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust import collectives
from rayclust.errors import ConfigError, RayclustError
from rayclust.methods import Temi, TemiConfig, build
from rayclust.methods.base import BaseMethodConfig, Batch, Method
from rayclust.training import loop
from rayclust.training.checkpoints import Every
from rayclust.training.loop import Trainer
from rayclust.training.pairs import ArrayRows, PairBatches
from rayclust.training.schedules import learning_rate
from tests import references
from tests.workers import on_two_workers, on_workers

N, D, K = 40, 6, 3


class MemoryStore:
    """Keeps every checkpoint; stops the training after the one whose number is `stop_after`."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.kept: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
        self.stop_after = stop_after

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.kept.append((tensors, {**state, "history": list(state["history"])}))
        if len(self.kept) == self.stop_after:
            raise KeyboardInterrupt

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.kept[-1] if self.kept else None


def _rows() -> ArrayRows:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ArrayRows(x, (torch.arange(N)[:, None] + torch.arange(1, 6)) % N)


def _method(**settings: Any) -> Temi:
    written = {"clusters": K, "preset": "none", "heads": 2, "hidden": 8, "bottleneck": 5, "batch_size": 9, "epochs": 3}
    written |= {
        "learning_rate": 0.3,
        "min_learning_rate": 0.1,
        "warmup_epochs": 1,
        "neighbors": 5,
        "weight_decay": 0.05,
        "final_weight_decay": 0.05,
    }
    method = build(TemiConfig.model_validate(written | settings), D, N, seed=0).double()
    assert isinstance(method, Temi)
    return method


def _without_clock(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "rows_per_second")} for row in history]


def test_training_equals_single_heads_trained_by_torchs_adamw():
    """Two epochs against a plain loop: torch's layers and AdamW head by head, the last layer frozen in the first."""
    method, rows = _method(epochs=2), _rows()
    heads = [references.ClusteringHead(method.student.state_dict(), head) for head in range(2)]
    teachers = [references.ClusteringHead(method.student.state_dict(), head) for head in range(2)]
    optimizers = [_decaying_adamw(head) for head in heads]
    shares = method.marginal.shares.clone()
    batches = PairBatches(rows, method.plan, method.pairing, 7, rows.tensor())
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            a, b = batch.views
            targets = [(t(a).div(0.1).softmax(-1).detach(), t(b).div(0.1).softmax(-1).detach()) for t in teachers]
            shares = 0.9 * shares + 0.1 * torch.stack([torch.cat(pair).mean(0) for pair in targets])
            trust = torch.stack([(ta * tb).sum(-1) for ta, tb in targets]).mean(0)
            for h, (head, (ta, tb)) in enumerate(zip(heads, targets, strict=True)):
                sa, sb = (head(view).div(0.1).softmax(-1) for view in (a, b))
                both = (((sb * ta) ** 0.6 / shares[h]).sum(-1).log(), ((sa * tb) ** 0.6 / shares[h]).sum(-1).log())
                optimizers[h].zero_grad()
                (-(trust * (both[0] + both[1]) / 2).mean() / 2).backward()
                _step_head(head, optimizers[h], learning_rate(method.config, method.plan, batch.step), epoch == 0)
                with torch.no_grad():
                    for mine, theirs in zip(teachers[h].parameters(), head.parameters(), strict=True):
                        mine.mul_(0.996).add_(0.004 * theirs)
    Trainer(7).fit(method, rows)
    x = rows.tensor()
    for h in range(2):
        assert method.teacher(x)[h].allclose(teachers[h](x), rtol=0, atol=1e-9)
        assert method.student(x)[h].allclose(heads[h](x), rtol=0, atol=1e-9)
    assert method.marginal.shares.allclose(shares, rtol=0, atol=1e-9)


def _decaying_adamw(head: torch.nn.Module) -> torch.optim.AdamW:
    biases = [p for name, p in head.named_parameters() if name.endswith("bias")]
    others = [p for name, p in head.named_parameters() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.05}, {"params": biases, "weight_decay": 0.0}])


def _step_head(head: torch.nn.Module, optimizer: torch.optim.AdamW, rate: float, frozen: bool) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.param_groups[0]["weight_decay"] = 0.05
    for parameter in head.last.parameters() if frozen else ():
        parameter.grad = None
    optimizer.step()


def _trained(rank: int, world: int) -> dict[str, tuple[list[float], list[float], dict[str, Tensor]]]:
    """Of two losses: five steps' losses, the epochs' mean losses, and the state they end in."""
    found = {}
    for loss in ("temi", "scan"):
        method = _method(loss=loss, steps=5, batch_norm=True, noise=0.05)
        losses: list[float] = []
        _watch(method, losses, world)
        trainer = Trainer(7)
        trainer.fit(method, _rows())
        found[loss] = (losses, [row["loss"] for row in trainer.history], method.state_dict())
    return found


def _watch(method: Temi, losses: list[float], world: int) -> None:
    compute = method.losses

    def watched(batch: Batch) -> dict[str, Tensor]:
        found = compute(batch)
        losses.append(float(collectives.all_sum(found["loss"].detach() * batch.share)) / world)
        return found

    method.losses = watched  # type: ignore[method-assign]


def test_two_workers_train_as_one_does():
    alone, together = _trained(0, 1), on_two_workers(_trained)
    for loss, (losses, epochs, state) in alone.items():
        assert len(losses) == 5
        assert np.ptp(losses) > 1e-3
        for found in together:
            worker_losses, worker_epochs, worker_state = found[loss]
            assert worker_losses == pytest.approx(losses, rel=0, abs=1e-10)
            assert worker_epochs == pytest.approx(epochs, rel=0, abs=1e-10)
            for name, value in state.items():
                assert worker_state[name].allclose(value, rtol=0, atol=1e-8), name


CHANCY: dict[str, Any] = {"dropout": 0.3, "noise": 0.1, "batch_norm": True, "final_teacher_momentum": 1.0}


def _fit(store: MemoryStore, every: Every, **settings: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    method = _method(**{**CHANCY, **settings}).float()
    trainer = Trainer(7, store=store, every=every)
    trainer.fit(method, _rows())
    return method.state_dict(), _without_clock(trainer.history)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_training_stopped_at_any_checkpoint_goes_on_to_the_same_bits(optimizer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "CLOCK_STEPS", 1)
    every = Every(epochs=1, seconds=0.0)
    whole = MemoryStore()
    state, history = _fit(whole, every, optimizer=optimizer)
    assert len(whole.kept) == 12  # every step of 3 epochs of 4
    for stop_after in range(1, 13):
        store = MemoryStore(stop_after)
        with pytest.raises(KeyboardInterrupt):
            _fit(store, every, optimizer=optimizer)
        resumed_state, resumed_history = _fit(store, every, optimizer=optimizer)
        assert resumed_history == history
        for name, value in state.items():
            assert resumed_state[name].equal(value), (stop_after, name)


def _stopped_and_resumed(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    loop.CLOCK_STEPS = 1
    every = Every(seconds=0.0)
    whole, _ = _fit(MemoryStore(), every, dropout=0.0)
    store = MemoryStore(stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        _fit(store, every, dropout=0.0)
    resumed, _ = _fit(store, every, dropout=0.0)
    return whole, resumed


def test_two_workers_resume_to_the_same_bits():
    for whole, resumed in on_two_workers(_stopped_and_resumed):
        for name, value in whole.items():
            assert resumed[name].equal(value), name


def _with_some_workers(
    rank: int, world: int, parallel: str, store: MemoryStore
) -> tuple[MemoryStore, dict[str, Tensor], list[dict[str, Any]]]:
    """Checkpoints in every step, up to the store's end or the training's."""
    store = copy.deepcopy(store)  # tensors handed to processes are in memory that these share
    loop.CLOCK_STEPS = 1
    method = _method(parallel=parallel, steps=10, noise=0.1, batch_norm=True)
    trainer = Trainer(7, store=store, every=Every(seconds=0.0))
    with contextlib.suppress(KeyboardInterrupt):
        method.fit(_rows(), trainer)
    store.stop_after = None
    return store, method.state_dict(), _without_clock(trainer.history)


def _apart(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max(float((some[name].double() - value).abs().max()) for name, value in others.items())


@pytest.mark.parametrize(
    ("workers", "parallel", "later", "later_parallel"),
    [(2, "data", 1, "heads"), (4, "2x2", 1, "data"), (3, "data", 2, "heads")],
)
def test_a_training_goes_on_with_another_number_of_workers_to_the_same_end(
    workers: int, parallel: str, later: int, later_parallel: str, monkeypatch: pytest.MonkeyPatch
):
    """Stopped in the second epoch of four steps: state and rows of metrics, that epoch's means among them."""
    monkeypatch.setattr(loop, "CLOCK_STEPS", loop.CLOCK_STEPS)
    _, state, history = _with_some_workers(0, 1, "auto", MemoryStore())
    store = on_workers(workers, _with_some_workers, parallel, MemoryStore(stop_after=6))[0][0]
    assert store.kept[-1][1]["step"] == 6
    for _, found, rows in on_workers(later, _with_some_workers, later_parallel, store):
        assert _apart(found, state) < 1e-8
        for row, expected in zip(rows, history, strict=True):
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=0, abs=1e-8), name


def test_a_training_that_grows_comes_to_the_same_end(monkeypatch: pytest.MonkeyPatch):
    """One worker up to the middle of an epoch, then two; when there are places for more is for Ray to say."""
    monkeypatch.setattr(loop, "CLOCK_STEPS", loop.CLOCK_STEPS)
    _, state, history = _with_some_workers(0, 1, "data", MemoryStore())
    store = _with_some_workers(0, 1, "data", MemoryStore(stop_after=6))[0]
    for kept, found, rows in on_two_workers(_with_some_workers, "data", store):
        assert _apart(found, state) < 1e-8
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in history], rel=0, abs=1e-8)
        assert [at["sharing"] for _, at in kept.kept] == [1] * 6 + [2] * (len(kept.kept) - 6)


def test_epochs_between_checkpoints_are_counted_and_the_end_is_always_kept():
    store = MemoryStore()
    _fit(store, Every(epochs=2), epochs=5)
    assert [state["step"] for _, state in store.kept] == [8, 16, 20]


def test_each_epoch_gives_a_row_of_metrics():
    rows: list[dict[str, Any]] = []
    method = _method(steps=10)
    trainer = Trainer(7, on_row=rows.append)
    trainer.fit(method, _rows())
    assert rows == trainer.history
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 4), (1, 8), (2, 10)]
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row["head_losses"]) / 2)
        assert 0 <= row["marginal_entropy"] <= math.log(K) + 1e-9
        assert row["rows_per_second"] > 0
    assert rows[-1]["learning_rate"] == learning_rate(method.config, method.plan, 9)
    assert method.best_head == int(np.argmin(rows[-1]["head_losses"]))


def test_the_start_is_called_before_the_first_step_and_not_on_a_resume():
    store, calls = MemoryStore(), []
    for _ in range(2):
        Trainer(7, store=store).fit(_method(), _rows(), start=lambda: calls.append(len(store.kept)))
    assert calls == [0]


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Trainer(7).fit(_method(dropout=0.5), _rows())
    assert torch.rand(3).equal(expected)


def test_a_clipped_gradient_changes_the_training():
    free, clipped = _method(optimizer="sgd"), _method(optimizer="sgd", clip_norm=1e-9)
    start = clipped.student.weights[0].detach().clone()
    Trainer(7).fit(free, _rows())
    Trainer(7).fit(clipped, _rows())
    assert (free.student.weights[0] - start).abs().max() > 1e-3
    assert (clipped.student.weights[0] - start).abs().max() < 1e-3


def test_a_loss_that_is_no_number_stops_the_training_with_one_line():
    x = _rows().tensor().clone()
    x[3] = float("nan")
    with pytest.raises(RayclustError, match="training loss = nan in epoch 0"):
        Trainer(7).fit(_method(), ArrayRows(x, _rows().neighbors()))


def test_a_method_that_fits_itself_is_refused():
    class Closed(Method):
        config = BaseMethodConfig(name="closed", clusters=2)

    with pytest.raises(ConfigError, match="Closed: is not trained by gradient"):
        Trainer(7).fit(Closed(), _rows())
