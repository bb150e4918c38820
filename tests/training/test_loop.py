from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust import distributed
from rayclust.clustering.candidates import leading_components
from rayclust.errors import ArtefactError, ConfigError, DataError, RayclustError
from rayclust.methods import build, load
from rayclust.methods.base import Batch, CheckpointInterval, Method
from rayclust.methods.graph import DerivedRows
from rayclust.methods.settings import EMBEDDINGS, BaseMethodConfig, Plan, TrainedConfig
from rayclust.methods.temi import Temi
from rayclust.methods.temi_settings import TemiConfig
from rayclust.training import loop
from rayclust.training.loop import (
    Lars,
    Stepper,
    Trainer,
    build_optimizer,
    fit_arrays,
)
from rayclust.training.sampling import ArrayRows, RowSource
from tests import references
from tests.stores import MemoryStore
from tests.workers import on_two_workers, on_workers

N, D, K = 40, 6, 3


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
    source = RowSource(rows, method.pairing, 7, torch.device("cpu"), torch.float64)
    for batch in source.batches(method.plan, 0):
        a, b = batch.x
        targets = [(t(a).div(0.1).softmax(-1).detach(), t(b).div(0.1).softmax(-1).detach()) for t in teachers]
        shares = 0.9 * shares + 0.1 * torch.stack([torch.cat(pair).mean(0) for pair in targets])
        trust = torch.stack([(ta * tb).sum(-1) for ta, tb in targets]).mean(0)
        for h, (head, (ta, tb)) in enumerate(zip(heads, targets, strict=True)):
            sa, sb = (head(view).div(0.1).softmax(-1) for view in (a, b))
            both = (((sb * ta) ** 0.6 / shares[h]).sum(-1).log(), ((sa * tb) ** 0.6 / shares[h]).sum(-1).log())
            optimizers[h].zero_grad()
            (-(trust * (both[0] + both[1]) / 2).mean() / 2).backward()
            _step_head(head, optimizers[h], method.config.rate_at(batch.step, method.plan), batch.epoch == 0)
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
    compute = method.training_step

    def watched(batch: Batch) -> dict[str, Tensor]:
        found = compute(batch)
        losses.append(float(distributed.all_reduce(found["loss"].detach() * batch.weight)) / world)
        return found

    method.training_step = watched  # type: ignore[method-assign]


CHANCY: dict[str, Any] = {"dropout": 0.3, "noise": 0.1, "batch_norm": True, "final_teacher_momentum": 1.0}


def _fit(
    store: MemoryStore, every: CheckpointInterval, **settings: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    method = _method(**{**CHANCY, **settings}).float()
    trainer = Trainer(7, store=store, every=every)
    trainer.fit(method, _rows())
    return method.state_dict(), _without_clock(trainer.history)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_training_stopped_at_any_checkpoint_goes_on_to_the_same_bits(optimizer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "CLOCK_STEPS", 1)
    every = CheckpointInterval(epochs=1, seconds=0.0)
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


def test_heads_on_components_are_heads_on_rows_that_do_without_the_others(monkeypatch: pytest.MonkeyPatch):
    def fitted(store: MemoryStore | None = None) -> Temi:
        method = _method(components=4).float()
        method.fit(_rows(), Trainer(7, store=store, every=CheckpointInterval(epochs=1)))
        return method

    method, x = fitted(), _rows().tensor().float()
    assert method.student.weights[0].shape == (2, 8, D)
    axes = leading_components(x, 4)
    assert method.predict_proba(x).allclose(method.predict_proba(x @ axes @ axes.T), rtol=0, atol=1e-5)
    assert load(method.state()).predict_proba(x).equal(method.predict_proba(x))
    # 2. The same to the bit after a stop, on the axes of the checkpoint.
    store = MemoryStore(1)
    with pytest.raises(KeyboardInterrupt):
        fitted(store)
    monkeypatch.setattr("rayclust.methods.temi_start.leading_components", None)
    assert fitted(store).predict_proba(x).equal(method.predict_proba(x))


def test_all_components_of_rows_of_low_rank_lose_nothing():
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(1)) @ torch.randn(3, D)
    rows = ArrayRows(x, (torch.arange(N)[:, None] + torch.arange(1, 6)) % N)
    axes = leading_components(x, 3)
    on_axes = DerivedRows(rows, axes)
    assert (on_axes.count, on_axes.dimension) == (N, 3)
    assert (on_axes.tensor() @ axes.T).allclose(x, rtol=0, atol=1e-5)
    assert torch.cat(list(on_axes.blocks())).equal(on_axes.tensor())
    assert on_axes.neighbors().equal(rows.neighbors())


def _stopped_and_resumed(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    loop.CLOCK_STEPS = 1
    every = CheckpointInterval(seconds=0.0)
    whole, _ = _fit(MemoryStore(), every, dropout=0.0)
    store = MemoryStore(stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        _fit(store, every, dropout=0.0)
    resumed, _ = _fit(store, every, dropout=0.0)
    return whole, resumed


def _trained_and_resumed(rank: int, world: int) -> tuple[Any, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return _trained(rank, world), _stopped_and_resumed(rank, world)


def test_two_workers_train_as_one_does_and_resume_to_the_same_bits():
    alone = _trained(0, 1)
    for found, (whole, resumed) in on_two_workers(_trained_and_resumed):
        for loss, (losses, epochs, state) in alone.items():
            assert len(losses) == 5
            assert np.ptp(losses) > 1e-3
            worker_losses, worker_epochs, worker_state = found[loss]
            assert worker_losses == pytest.approx(losses, rel=0, abs=1e-10)
            assert worker_epochs == pytest.approx(epochs, rel=0, abs=1e-10)
            for name, value in state.items():
                assert worker_state[name].allclose(value, rtol=0, atol=1e-8), name
        for name, value in whole.items():
            assert resumed[name].equal(value), name


def _with_some_workers(
    rank: int, world: int, parallel: str, store: MemoryStore
) -> tuple[MemoryStore, dict[str, Tensor], list[dict[str, Any]]]:
    """Checkpoints in every step, up to the store's end or the training's."""
    loop.CLOCK_STEPS = 1
    method = _method(parallel=parallel, steps=10, noise=0.1, batch_norm=True)
    trainer = Trainer(7, store=store, every=CheckpointInterval(seconds=0.0))
    with contextlib.suppress(KeyboardInterrupt):
        method.fit(_rows(), trainer)
    store.stop_after = None
    return store, method.state_dict(), _without_clock(trainer.history)


def _apart(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max(float((some[name].double() - value).abs().max()) for name, value in others.items())


def test_a_training_goes_on_with_another_number_of_workers_to_the_same_end(monkeypatch: pytest.MonkeyPatch):
    """Stopped in the second epoch of four steps: state and rows of metrics, that epoch's means among them."""
    monkeypatch.setattr(loop, "CLOCK_STEPS", loop.CLOCK_STEPS)
    _, state, history = _with_some_workers(0, 1, "auto", MemoryStore())
    store = on_workers(4, _with_some_workers, "2x2", MemoryStore(stop_after=6))[0][0]
    assert store.kept[-1][1]["step"] == 6
    for _, found, rows in on_two_workers(_with_some_workers, "heads", store):
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
        assert [at["workers"] for _, at in kept.kept] == [1] * 6 + [2] * (len(kept.kept) - 6)


def test_epochs_between_checkpoints_are_counted_and_the_end_is_always_kept():
    store = MemoryStore()
    _fit(store, CheckpointInterval(epochs=2), epochs=5)
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
    assert rows[-1]["learning_rate"] == method.config.rate_at(9, method.plan)
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
        pass

    with pytest.raises(ConfigError, match="Closed: is not trained by gradient"):
        Trainer(7).fit(Closed(BaseMethodConfig(name="closed", clusters=2), D, N, 0), _rows())


def test_a_stop_ends_the_training_and_a_resume_does_not_go_on():
    store, histories = MemoryStore(), []
    for _ in range(2):
        method = _method(epochs=3)
        method.on_epoch_end = lambda metrics, method=method: setattr(method, "stop", True) or {}  # type: ignore
        trainer = Trainer(7, store=store)
        trainer.fit(method, _rows())
        histories.append([row["epoch"] for row in trainer.history])
    assert histories == [[0], [0]]
    assert len(store.kept) == 1


def _rates(count: int, **settings: float) -> list[float]:
    config = TrainedConfig.model_validate({"name": "any", "clusters": 2, **settings})
    plan = Plan.of(config, count)
    return [config.rate_at(step, plan) for step in range(plan.steps)]


def test_the_published_rate_rises_from_zero_to_four_times_its_base_and_stays():
    rates = _rates(4096, batch_size=1024, epochs=100, learning_rate=1e-4, min_learning_rate=1e-4, warmup_epochs=20)
    assert len(rates) == 400
    assert rates[0] == 0
    assert rates[1] == pytest.approx(4e-4 / 79)
    assert rates[79] == pytest.approx(4e-4)
    assert rates[80:] == pytest.approx([4e-4] * 320)


def test_a_cosine_falls_from_the_peak_to_the_minimum():
    rates = _rates(256, batch_size=256, steps=101, warmup_steps=1, learning_rate=1.0, min_learning_rate=0.1)
    assert rates[:2] == [0.0, 1.0]
    assert rates[51] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[1:]))


def test_a_batch_cut_to_the_rows_scales_the_rate_by_what_is_left():
    assert _rates(64, batch_size=1024, epochs=2, warmup_epochs=0)[0] == pytest.approx(1e-4 * 64 / 256)


def test_a_warm_up_longer_than_the_training_is_cut():
    rates = _rates(100, batch_size=50, epochs=3, warmup_epochs=20)
    assert len(rates) == 6
    assert rates[-1] == pytest.approx(1e-4 * 50 / 256)


class Tiny(Method):
    """Two weights in groups of their own, whose gradients are 1 in every step."""

    def __init__(self, **settings: Any) -> None:
        written = {"name": "tiny", "clusters": 2, "batch_size": 4, "warmup_steps": 0, "steps": 4, **settings}
        super().__init__(TrainedConfig.model_validate(written), D, 4, 0)
        self.plan = Plan.of(self.config, 4)  # type: ignore[arg-type]
        self.first = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.options: dict[str, Any] = {}

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.first + self.second}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.first]}, {"params": [self.second], **self.options}]


def test_more_workers_than_rows_in_a_batch_are_refused():
    with (
        distributed.data_parallel(distributed.ProcessGroup(12)),
        pytest.raises(ConfigError, match="workers = 12: a batch has only 9 rows, use no more workers"),
    ):
        Stepper(_method())


def _step(stepper: Stepper, step: int, epoch: int = 0) -> None:
    stepper.step(Batch({EMBEDDINGS: torch.zeros(1, 4, D)}, torch.arange(4), step, epoch))


def test_sgd_by_hand_has_momentum_and_rates_and_decays_of_the_groups():
    """v ← 0.9 v + 1 + decay·w; w ← w − rate·v. The schedule's rate is 0.1, halved in the second group."""
    method = Tiny(optimizer="sgd", learning_rate=6.4, min_learning_rate=6.4, weight_decay=0.0, final_weight_decay=0.0)
    method.options = {"lr_scale": 0.5, "weight_decay": 0.5, "final_weight_decay": 0.1}
    stepper = Stepper(method)
    _step(stepper, 0)
    assert (method.first.item(), method.second.item()) == pytest.approx((0.9, 1 - 0.05 * 1.5))
    _step(stepper, 1)
    assert method.first.item() == pytest.approx(0.9 - 0.1 * 1.9)
    decay = 0.1 + 0.2 * (1 + math.cos(math.pi / 4))
    assert method.second.item() == pytest.approx(0.925 - 0.05 * (0.9 * 1.5 + 1 + decay * 0.925))


def test_the_configs_decay_is_a_cosine_and_a_groups_own_is_constant():
    method = Tiny(weight_decay=0.0, final_weight_decay=1.0)
    method.options = {"weight_decay": 0.3}
    stepper, decays = Stepper(method), []
    for step in (0, 2, 4):
        _step(stepper, step)
        decays.append([group["weight_decay"] for group in stepper.optimizer.param_groups])
    assert decays == [pytest.approx([0.0, 0.3]), pytest.approx([0.5, 0.3]), pytest.approx([1.0, 0.3])]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_frozen_groups_do_not_move_and_have_no_state_until_they_do(optimizer: str):
    method = Tiny(optimizer=optimizer)
    method.options = {"frozen_epochs": 1}
    stepper = Stepper(method)
    for epoch, moved in [(0, False), (1, True)]:
        _step(stepper, epoch, epoch)
        assert (method.second.item() != 1.0) == moved
        assert {name.partition(".")[0] for name in stepper.state()} == ({"first", "second"} if moved else {"first"})
    assert method.first.item() != 1.0


def test_a_scaled_loss_takes_the_steps_of_a_plain_one_and_skips_gradients_that_are_not_finite():
    plain, scaled = Tiny(optimizer="sgd"), Tiny(optimizer="sgd")
    scaled.scales_loss = True
    steppers = Stepper(plain), Stepper(scaled)
    for step in range(2):
        for stepper in steppers:
            _step(stepper, step)
    assert scaled.first.item() == pytest.approx(plain.first.item(), rel=1e-12)
    state = steppers[1].state()
    assert state["loss_scale.scale"].item() == loop.LOSS_SCALE
    scaled.first.register_hook(lambda gradient: gradient * float("inf"))
    _step(steppers[1], 2)
    assert scaled.second.item() == pytest.approx(plain.second.item(), rel=1e-12)
    assert steppers[1].state()["loss_scale.scale"].item() == loop.LOSS_SCALE / 2
    again = Stepper(scaled)
    again.load(state)
    assert again.state()["loss_scale.scale"].item() == loop.LOSS_SCALE


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_parameter_without_gradient_is_passed_over(name: str):
    method = _method(optimizer=name)
    optimizer = build_optimizer(method.parameter_groups(), method.config)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.5
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    method.get_parameter("student.weights.0").grad = torch.ones_like(before["student.weights.0"])
    optimizer.step()
    changed = {key for key, p in method.named_parameters() if not p.equal(before[key])}
    assert changed == {"student.weights.0"}


def test_lars_scales_each_stacked_layer_by_its_own_norms():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    optimizer = Lars([{"params": [weight], "lr": 1.0, "stacked": True}], momentum=0.0, trust=0.1)
    weight.grad = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    optimizer.step()
    # step = trust · |w| · g/|g| : 0.1·5 and 0.1·0.5 along the second axis
    assert weight.flatten().tolist() == pytest.approx([3.0, 3.5, 0.3, 0.35])


def test_lars_leaves_what_is_exempt_at_the_plain_rate():
    adapted, exempt = (torch.nn.Parameter(torch.tensor([0.0, 2.0])) for _ in range(2))
    optimizer = Lars([{"params": [adapted], "lr": 1.0}, {"params": [exempt], "lr": 1.0, "adapts": False}])
    for parameter in (adapted, exempt):
        parameter.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    assert adapted.tolist() == pytest.approx([-0.002, 2.0])  # η · |w| / |g|
    assert exempt.tolist() == pytest.approx([-1.0, 2.0])


def test_lars_takes_the_steps_of_each_head_alone():
    """All heads at once, and each as the only one of a method that begins where it does."""
    both, alone = _method(optimizer="lars"), [_method(optimizer="lars", heads=1) for _ in range(2)]
    gradients = {name: torch.randn_like(p) for name, p in both.named_parameters() if p.requires_grad}
    for head, method in enumerate(alone):
        for name, p in method.named_parameters():
            p.data.copy_(both.get_parameter(name)[head : head + 1])
            p.grad = gradients[name][head : head + 1].clone() if name in gradients else None
    for name, gradient in gradients.items():
        both.get_parameter(name).grad = gradient
    for method in (both, *alone):
        optimizer = build_optimizer(method.parameter_groups(), method.config)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.1, 0.5
        optimizer.step()
    for name in gradients:
        for head, method in enumerate(alone):
            torch.testing.assert_close(method.get_parameter(name)[0], both.get_parameter(name)[head])


def test_checkpoints_are_own_contiguous_copies_on_the_cpu_under_the_parameters_names():
    store, method = MemoryStore(), _method(epochs=1)
    Trainer(7, store=store).fit(method, _rows())
    tensors = store.kept[-1][0]
    before = tensors["method.student.weights.0"].clone()
    assert tensors["optimizer.student.weights.0.exp_avg"].shape == before.shape
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    assert tensors["method.student.weights.0"].equal(before)
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in tensors.values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop("method.student.scale"), "checkpoint does not fit the method"),
        (
            lambda tensors: tensors.update({"optimizer.0.exp_avg": torch.zeros(3)}),
            "does not fit the optimizer at 0.exp_avg",
        ),
        (
            lambda tensors: tensors.update({"optimizer.student.scale.exp_avg": torch.zeros(3)}),
            "does not fit the optimizer",
        ),
    ],
)
def test_a_checkpoint_of_another_method_is_refused_in_one_line(damage: Any, message: str):
    store = MemoryStore()
    Trainer(7, store=store).fit(_method(epochs=1), _rows())
    damage(store.kept[-1][0])
    with pytest.raises(ArtefactError, match=message) as error:
        Trainer(7, store=store).fit(_method(epochs=1), _rows())
    assert "\n" not in str(error.value)


def _planted(rows: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows around four corners, each row's neighbours among its own kind, and the kinds."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 4
    x = (np.eye(4, 16)[labels] + 0.1 * rng.standard_normal((rows, 16))).astype(np.float32)
    x -= x.mean(0)
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    return x, np.argsort(-similarity, axis=1)[:, :10].copy(), labels


@pytest.mark.parametrize("loss", ["temi", "pmi", "wmi", "scan"])
def test_every_loss_finds_planted_clusters(loss: str):
    x, neighbors, labels = _planted()
    settings = {"clusters": 4, "preset": "none", "loss": loss, "heads": 3, "hidden": 32, "batch_size": 120}
    settings |= {"steps": 150, "learning_rate": 5e-3, "warmup_steps": 10} | ({} if loss == "scan" else {"beta": 0.7})
    method = fit_arrays(x, neighbors, TemiConfig.model_validate(settings), seed=1)
    table = np.zeros((4, 4), dtype=int)
    np.add.at(table, (method.predict_proba(torch.from_numpy(x)).argmax(1).numpy(), labels), 1)
    assert table.max(1).sum() / len(labels) > 0.9


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    x, neighbors, _ = _planted(60)
    config = TemiConfig(clusters=4, preset="none", heads=2, steps=3, learning_rate=1e-2, warmup_steps=0)
    first, again, other = (
        fit_arrays(x, neighbors, config, seed).predict_proba(torch.from_numpy(x)) for seed in (0, 0, 1)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_a_method_of_pairs_needs_neighbours():
    with pytest.raises(DataError, match="neighbors = None"):
        fit_arrays(_planted(60)[0], None, TemiConfig(clusters=4, preset="none"))
