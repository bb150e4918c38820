"""TURTLE: the loss and its gradients by hand and by autograd, keyed rows, score, workers, resume, planted clusters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from rayclust import methods
from rayclust.distributed import DeviceMesh, data_parallel, own_slice
from rayclust.errors import ArtefactError
from rayclust.methods import turtle
from rayclust.methods.base import CheckpointInterval
from rayclust.methods.turtle import (
    Adam,
    Runs,
    SpaceMap,
    Turtle,
    balance,
    generalization_score,
    keyed_rows,
    labels_of,
    logit_gradient,
    sparsemax,
    task_weights,
)
from rayclust.methods.turtle_settings import TurtleConfig, TurtleSetting
from rayclust.metrics.external import accuracy
from rayclust.training.loop import Trainer
from rayclust.training.sampling import ArrayRows
from tests.stores import MemoryStore
from tests.workers import on_workers

LIKE = torch.zeros(0, dtype=torch.float64)
LN = math.log


def runs_of(widths: tuple[int, ...], clusters: int, seed: int = 0, like: Tensor = LIKE, **settings: Any) -> Runs:
    config = TurtleConfig(clusters=clusters, preset="published", **settings)
    return Runs(config, config.runs(), widths, seed, like)


def with_ones(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 1), value=1.0)


def set_logits(runs: Runs, space: int, weights: Tensor) -> None:
    """Give a task encoder the linear map Float[C d+1]."""
    v, b = weights[:, :-1], weights[:, -1:]
    runs.theta[space] = Adam.of(torch.cat([v, v.norm(dim=1, keepdim=True), b], dim=1)[None].double())


def classified_by(runs: Runs, *weights: Tensor) -> None:
    """Fix the classifiers at linear maps Float[C d+1] each."""
    runs.w = [Adam.of(w[None].double()) for w in weights]


FIXED: dict[str, Any] = {"inner_steps": 0, "start": "warm", "outer_rate": 1e-12}
"""Classifiers that stay as they are, and labels that do: the loss of a step is that of the state given."""


# 1. The loss at labels whose value is known; identity rows make any logits possible.
@pytest.mark.parametrize(
    ("labels", "perfect", "wanted"),
    [("uniform", False, -41.4465317), ("balanced", True, -46.0517019), ("collapsed", True, 0.0)],
)
def test_loss_of_uniform_balanced_and_collapsed_labels(labels: str, perfect: bool, wanted: float):
    eye, sharp = with_ones(torch.eye(10).double()), 1e3
    map_of = {"uniform": torch.zeros(10, 11), "balanced": functional.pad(sharp * torch.eye(10), (0, 1))}
    map_of["collapsed"] = functional.pad(torch.zeros(10, 10), (0, 1))
    map_of["collapsed"][0, -1] = sharp
    runs = runs_of((10, 10), 10, **FIXED)
    for space in range(2):
        set_logits(runs, space, map_of[labels])
    chosen = map_of[labels] if perfect else torch.zeros(10, 11)
    classified_by(runs, chosen, chosen)
    runs.step([eye, eye], 10)
    assert float(runs.loss) == pytest.approx(wanted, abs=1e-6)


def test_classifiers_of_zero_weights_cost_ln_c_whatever_the_labels():
    generator = torch.Generator().manual_seed(0)
    z = with_ones(torch.randn(7, 4, generator=generator).double())
    runs = runs_of((4,), 5, gamma=0.0, **FIXED)
    classified_by(runs, torch.zeros(5, 5))
    before = runs.theta[0].value.clone()
    runs.step([z], 7)
    assert float(runs.loss) == pytest.approx(LN(5), abs=1e-12)
    assert runs.theta[0].first.abs().max() < 1e-15  # only the entropy has a gradient, and γ is 0
    assert runs.theta[0].value.allclose(before)


def test_two_rows_and_two_clusters_by_hand():
    logits = torch.tensor([[[LN(3), 0.0], [0.0, 0.0]]]).double()  # [R C B]
    labels = labels_of(logits, "softmax")
    assert labels[0].T.allclose(torch.tensor([[0.75, 0.25], [0.5, 0.5]]).double())
    shares = labels.mean(-1)
    term, slope = balance(shares, None)
    assert float(term) == pytest.approx(-0.6615632, abs=1e-7)
    gradient = logit_gradient(labels, LN(2) + 10 * slope[:, :, None], "softmax") / 2
    wanted = torch.tensor([[0.4788990, -0.4788990], [0.6385320, -0.6385320]]).double()
    assert gradient[0].T.allclose(wanted, atol=1e-6)
    runs = runs_of((2,), 2, **FIXED)
    set_logits(runs, 0, torch.tensor([[LN(3), 0.0, 0.0], [0.0, 0.0, 0.0]]))
    classified_by(runs, torch.zeros(2, 3))
    shares = runs.step([with_ones(torch.eye(2).double())], 2)
    assert shares[0, 0].tolist() == pytest.approx([0.625, 0.375])
    assert float(runs.loss) == pytest.approx(-5.9224852, abs=1e-6)


def test_the_entropy_is_of_each_space_and_not_of_the_mean_label():
    runs = runs_of((1, 1), 2, gamma=1.0, **FIXED)
    for space, bias in ((0, [LN(3), 0.0]), (1, [0.0, LN(3)])):
        set_logits(runs, space, torch.tensor([[0.0, bias[0]], [0.0, bias[1]]]))
    classified_by(runs, torch.zeros(2, 2), torch.zeros(2, 2))
    z = with_ones(torch.zeros(4, 1).double())
    assert torch.stack(runs.labels([z, z])).mean(0).allclose(torch.full((1, 2, 4), 0.5).double())
    runs.step([z, z], 4)
    assert float(runs.loss) == pytest.approx(2 * LN(2) - 1.1246703, abs=1e-6)


def test_inner_steps_of_one_dimension_by_hand():
    z = with_ones(torch.tensor([1.0, -1.0, 1.0, -1.0]).double()[:, None])
    for steps in (1, 10):
        runs = runs_of((1,), 2, gamma=0.0, start="warm", inner_steps=steps, inner_rate=1e-3, outer_rate=1e-12)
        set_logits(runs, 0, torch.tensor([[1e3, 0.0], [-1e3, 0.0]]))
        classified_by(runs, torch.zeros(2, 2))
        runs.step([z], 4)
        if steps == 1:
            assert runs.w[0].value[0, :, 0].tolist() == pytest.approx([1e-3, -1e-3], rel=1e-6)
            assert runs.w[0].value[0, :, 1].abs().max() < 1e-12
            assert float(runs.loss) == pytest.approx(0.6921477, abs=1e-6)
        else:
            assert float(runs.loss) >= 0.6831972 - 1e-7
    # A step of gradient descent at rate 1 instead: the gradient is that of the mean over rows.
    labels = (z[:, 0] > 0).double()
    labels = torch.stack([labels, 1 - labels])
    weights = -((torch.full((2, 4), 0.5).double() - labels) @ z / 4)
    assert weights.tolist() == [[0.5, 0.0], [-0.5, 0.0]]
    assert float(-(labels * (weights @ z.T).log_softmax(0)).sum() / 4) == pytest.approx(0.3132617, abs=1e-7)


def test_weight_normalisation():
    runs = runs_of((3,), 4)
    theta = runs.theta[0].value
    weights = task_weights(theta)
    assert weights.allclose(torch.cat([theta[..., :3], theta[..., 4:]], dim=-1))  # at the start W is v
    scaled = theta.clone()
    scaled[..., :3] *= 7
    assert task_weights(scaled).allclose(weights)


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
@pytest.mark.parametrize("prior", ["uniform", 1.0])
def test_the_step_follows_autograd(kind: Any, prior: Any):
    """The first moment of Adam after one step is a tenth of the gradient."""
    generator = torch.Generator().manual_seed(1)
    z = [with_ones(torch.randn(12, d, generator=generator).double()) for d in (3, 5)]
    runs = runs_of((3, 5), 4, labels=kind, prior=prior, **FIXED)
    theta = [adam.value.clone().requires_grad_() for adam in runs.theta]
    tau = [labels_of(task_weights(t) @ x.T, kind) for t, x in zip(theta, z, strict=True)]
    label = (tau[0] + tau[1]) / 2
    loss = torch.zeros((), dtype=torch.float64)
    for own, w, x in zip(tau, runs.w, z, strict=True):
        m = own.mean(-1)
        if prior == "uniform":
            term = (m * m.log()).sum()
        else:
            wanted = torch.tensor([0.48, 0.24, 0.16, 0.12], dtype=torch.float64)
            term = (wanted * (wanted / m.sort(descending=True).values)[0].log()).sum()
        loss = loss - (label * (w.value @ x.T).log_softmax(1)).sum() / 12 + 10 * term
    loss.backward()
    runs.step(z, 12)
    assert float(runs.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    for adam, t in zip(runs.theta, theta, strict=True):
        assert t.grad is not None
        assert (10 * adam.first).allclose(t.grad, atol=1e-12)


def test_our_adam_is_torchs():
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(2, 3, 4, generator=generator).double()
    ours, theirs = Adam.of(value.clone()), value.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=1e-2)
    rates = torch.full((2, 1, 1), 1e-2).double()
    for step in range(5):
        theirs.grad = torch.randn(2, 3, 4, generator=generator).double()
        optimizer.step()
        ours.step(theirs.grad, rates, torch.full((2, 1, 1), step + 1.0).double())
    assert ours.value.allclose(theirs.detach(), atol=1e-14)


def test_constants_in_the_logits_change_nothing_and_gradients_sum_to_zero():
    generator = torch.Generator().manual_seed(3)
    logits, gradient = torch.randn(2, 1, 5, 6, generator=generator).double()
    for kind in ("softmax", "sparsemax"):
        labels = labels_of(logits, kind)
        assert labels_of(logits + torch.randn(1, 1, 6), kind).allclose(labels)
        assert logit_gradient(labels, gradient, kind).sum(1).abs().max() < 1e-12


def test_classes_and_spaces_may_be_permuted_and_a_space_given_twice_doubles_the_loss():
    generator = torch.Generator().manual_seed(4)
    z = [with_ones(torch.randn(9, d, generator=generator).double()) for d in (3, 4)]
    runs = runs_of((3, 4), 5, **FIXED)
    runs.step(z, 9)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = runs_of((3, 4), 5, **FIXED)
    permuted.theta = [Adam.of(each.value[:, order]) for each in permuted.theta]
    permuted.w = [Adam.of(each.value[:, order]) for each in permuted.w]
    swapped = runs_of((3, 4), 5, **FIXED)
    swapped.theta, swapped.w = swapped.theta[::-1], swapped.w[::-1]
    permuted.step(z, 9)
    swapped.step(z[::-1], 9)
    assert float(permuted.loss) == pytest.approx(float(runs.loss), rel=1e-12)
    assert float(swapped.loss) == pytest.approx(float(runs.loss), rel=1e-12)
    once, twice = runs_of((3,), 5, **FIXED), runs_of((3, 3), 5, **FIXED)
    twice.theta = [Adam.of(once.theta[0].value.clone()) for _ in range(2)]
    twice.w = [Adam.of(once.w[0].value.clone()) for _ in range(2)]
    once.step(z[:1], 9)
    twice.step([z[0], z[0]], 9)
    assert float(twice.loss) == pytest.approx(2 * float(once.loss), rel=1e-12)


def test_a_cold_start_forgets_the_classifiers_and_a_warm_one_goes_on():
    generator = torch.Generator().manual_seed(5)
    z = [with_ones(torch.randn(8, 3, generator=generator).double())]
    for start in ("cold", "warm"):
        states = []
        for disturbed in (False, True):
            runs = runs_of((3,), 4, start=start, inner_rate=1e-2, outer_rate=1e-2)
            runs.step(z, 8)
            if disturbed:
                runs.w[0].value += 1.0
                runs.w[0].first += 1.0
            runs.step(z, 8)
            states.append(runs.theta[0].value)
        assert states[0].equal(states[1]) == (start == "cold")


# 10. Keyed rows.
@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (5, 3), (64, 64), (65, 65), (1000, 1000), (10**12, 5000)])
def test_keyed_rows_are_distinct(count: int, size: int):
    rows = keyed_rows(count, size, 7, 3)
    assert len(rows.unique()) == size
    assert 0 <= int(rows.min()) <= int(rows.max()) < count
    assert rows.equal(keyed_rows(count, size, 7, 3))
    assert len(keyed_rows(count, 10 * size, 7)) <= count
    if count > 64:
        assert not rows.equal(keyed_rows(count, size, 7, 4))


def test_keyed_rows_are_even():
    """Each of 100 rows is drawn as often as chance has it: χ² of 99 degrees of freedom within six deviations."""
    counts = torch.bincount(torch.cat([keyed_rows(100, 10, 1, step) for step in range(2000)]), minlength=100)
    chi = float(((counts - 200) ** 2 / (200 * 0.9)).sum())
    assert abs(chi - 99) < 6 * math.sqrt(2 * 99)
    order = keyed_rows(5000, 5000, 0, 0).double()
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.06


def test_score():
    generator = torch.Generator().manual_seed(6)
    truth = torch.arange(400) % 2
    x = torch.where(truth == 0, -4.0, 4.0)[:, None] + torch.randn(400, 3, generator=generator)
    constant, random = torch.zeros(400, dtype=torch.long), torch.randint(0, 2, (400,), generator=generator)
    score = generalization_score([with_ones(x)], torch.stack([truth, constant, random]), 2)
    assert score[:2].tolist() == [1.0, 1.0]
    assert float(score[2]) == pytest.approx(0.5, abs=0.1)


def test_score_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(150, 4, generator=generator)
    y = (x[:, :3] + 0.7 * torch.randn(150, 3, generator=generator)).argmax(1)
    hits = 0
    for fold in range(10):
        test = np.arange(150) % 10 == fold
        fitted = LogisticRegression(tol=1e-9, max_iter=1000).fit(x[~test], y[~test])
        hits += int((fitted.predict(x[test]) == y[test].numpy()).sum())
    assert float(generalization_score([with_ones(x)], y[None], 3)) == pytest.approx(hits / 150, abs=1 / 150)


def test_prior_and_sparsemax():
    shares, uniform = torch.tensor([[0.75, 0.25]]).double(), torch.tensor([0.5, 0.5]).double()
    assert float(balance(shares, uniform)[0]) == pytest.approx(0.1438410, abs=1e-7)
    ascending = balance(torch.tensor([[0.25, 0.75]]).double(), torch.tensor([0.75, 0.25]).double())
    assert float(ascending[0]) == pytest.approx(0.0, abs=1e-12)  # the largest share goes with the largest cluster
    rows = torch.tensor([[1.0, 0.5, -1.0], [2.0, 0.0, 0.0]]).T[None]
    assert sparsemax(rows)[0].T.tolist() == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]
    assert runs_of((1,), 4, prior=1.0)._prior.tolist() == pytest.approx([0.48, 0.24, 0.16, 0.12])  # type: ignore[union-attr]


def planted(count: int = 2000, clusters: int = 10, width: int = 32, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Gaussian clusters at a mean distance of 5.5 deviations, mean square 1, seen by two rotations."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, clusters, count)
    x = rng.normal(size=(clusters, width))[labels] * 5.5 / math.sqrt(2 * width) + rng.normal(size=(count, width))
    x = (x - x.mean(0)) / np.sqrt(np.square(x - x.mean(0)).mean())
    turned = [x @ np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(2)]
    return [torch.from_numpy(each).float() for each in turned], torch.from_numpy(labels)


def fitted(x: list[Tensor], seed: int = 0, trainer: Trainer | None = None, **settings: Any) -> Turtle:
    rows = ArrayRows(dict(zip("ab", x, strict=False)))
    method = methods.build(TurtleConfig(**{"clusters": 10} | settings), rows.dimensions, rows.count, seed)
    assert isinstance(method, Turtle)
    method.fit(rows, trainer or Trainer(seed))
    return method


def labels_by(method: Turtle, x: list[Tensor]) -> Tensor:
    return method.predict_proba(dict(zip("ab", x, strict=False))).argmax(1)


def test_planted_clusters_seen_twice_are_found_at_rates_that_lead_somewhere():
    x, truth = planted()
    settings = {"preset": "published", "steps": 150, "outer_rate": 1e-2, "seeds": 2}
    assert accuracy(truth, labels_by(fitted(x, **settings, inner_rate=1e-2), x)) > 0.93
    slow = fitted(x, preset="published", steps=150)
    assert accuracy(truth, labels_by(slow, x)) < 0.7


@pytest.mark.parametrize("spaces", [1, 2])
def test_the_default_finds_planted_clusters_and_reports_its_runs(spaces: int):
    x, truth = planted(count=800, clusters=4)
    x = [functional.normalize(each, dim=1) for each in x[:spaces]]
    trainer = Trainer(0)
    method = fitted(x, trainer=trainer, clusters=4, steps=100)
    assert accuracy(truth, labels_by(method, x)) > 0.95
    table = [row for row in trainer.history if "candidate" in row]
    assert [row["chosen"] for row in table] == [0, 0, 0, 0, 1]
    assert [row["score"] for row in table] == sorted(row["score"] for row in table)
    assert table[-1]["score"] > 0.9
    assert [row["step"] for row in trainer.history if "candidate" not in row] == [20, 40, 60, 80, 100]


def test_a_stacked_run_is_the_run_alone():
    generator = torch.Generator().manual_seed(8)
    z = [with_ones(torch.randn(30, d, generator=generator).double()) for d in (3, 4)]
    pairs = [(1e-2, "cold"), (1e-2, "warm"), (3e-2, "cold"), (3e-2, "warm")]
    settings = [{"inner_rate": rate, "outer_rate": 1e-2, "start": start} for rate, start in pairs]
    sweep = [TurtleSetting.model_validate(setting) for setting in settings]
    together = runs_of((3, 4), 5, sweep=sweep, seeds=2)
    for _ in range(3):
        together.step(z, 30)
    for number, setting in enumerate(sweep):
        alone = runs_of((3, 4), 5, sweep=[setting], seeds=2)
        for _ in range(3):
            alone.step(z, 30)
        for whole, part in zip(together.theta, alone.theta, strict=True):
            assert whole.value[2 * number : 2 * number + 2].allclose(part.value, atol=1e-12)


def _shared_steps() -> dict[str, Tensor]:
    """Five steps and a score on rows that workers divide."""
    generator = torch.Generator().manual_seed(9)
    x = [torch.randn(50, d, generator=generator).double() for d in (3, 4)]
    z = [SpaceMap.of(each, TurtleConfig(clusters=4).resolved(50, [3, 4]), 0, n)(each) for n, each in enumerate(x)]
    runs = runs_of((3, 4), 4, inner_rate=1e-2, outer_rate=1e-2, start="warm", seeds=2)
    losses = []
    for step in range(5):
        batch = keyed_rows(50, 31, 0, step)
        runs.step([each[batch[own_slice(31)]] for each in z], 31)
        losses.append(runs.loss)
    labels = torch.stack(runs.labels(z)).mean(0).argmax(1)
    score = generalization_score(z, labels, 4)
    return {"losses": torch.stack(losses), "score": score} | {str(n): each.value for n, each in enumerate(runs.theta)}


def _on_four_and_on_two(rank: int, world: int) -> list[dict[str, Tensor]]:
    """The same on all four workers, and on each pair of them."""
    with data_parallel(DeviceMesh.of(2).data):
        pair = _shared_steps()
    return [_shared_steps(), pair]


def test_any_number_of_workers_takes_the_same_steps():
    alone = _shared_steps()
    for found in on_workers(4, _on_four_and_on_two):
        for each in found:
            for name, value in alone.items():
                assert each[name].allclose(value, rtol=0, atol=1e-10), name


def _whole_fit(rank: int, world: int) -> dict[str, Tensor]:
    """A fit of three runs, one of them warm: the last checkpoint, the model, and the table of runs."""
    x, _ = planted(count=200, clusters=3)
    sweep = [{"inner_rate": 1e-2, "start": "warm"}, {"inner_rate": 1e-2}, {"inner_rate": 3e-2}]
    store = MemoryStore()
    trainer = Trainer(0, store=store, every=CheckpointInterval(epochs=1))
    method = fitted(x, trainer=trainer, clusters=3, steps=20, seeds=1, batch_size=50, sweep=sweep)
    tensors, checkpoint = method.state().tensors, store.latest()
    assert checkpoint is not None
    scores = torch.tensor([row["score"] for row in method.report])
    return tensors | checkpoint[0] | {"scores": scores, "loss": torch.tensor(trainer.history[0]["loss"])}


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_divide_the_runs_keep_what_one_keeps(workers: int):
    """Two workers have one run and two; of four, each pair has one or two, and divides the rows."""
    alone = _whole_fit(0, 1)
    for found in on_workers(workers, _whole_fit):
        assert set(found) == set(alone)
        for name, value in alone.items():
            assert found[name].allclose(value, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_a_resumed_training_ends_at_the_same_bits(start: str):
    x, _ = planted(count=300, clusters=3)
    settings: dict[str, Any] = {"clusters": 3, "steps": 60, "batch_size": 100, "start": start, "inner_rate": 1e-2}
    settings |= {"outer_rate": 1e-2, "seeds": 2}
    whole = fitted(x, **settings)
    store = MemoryStore(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        fitted(x, trainer=Trainer(0, store=store, every=CheckpointInterval(epochs=1)), **settings)
    trainer = Trainer(0, store=store)
    resumed = fitted(x, trainer=trainer, **settings)
    assert [row["step"] for row in trainer.history] == [20, 40, 60, 60, 60]
    for name, value in whole.state().tensors.items():
        assert resumed.state().tensors[name].equal(value), name
    with pytest.raises(ArtefactError, match="checkpoint does not hold"):
        fitted(x, trainer=Trainer(0, store=store), **settings | {"clusters": 4})


def test_labels_of_a_row_alone_and_after_a_round_trip():
    x, _ = planted(count=200, clusters=3)
    method = fitted(x, clusters=3, steps=20, seeds=1, sweep=[{"inner_rate": 1e-2}, {"start": "warm"}])
    rows = dict(zip("ab", x, strict=True))
    whole = method.predict_proba(rows)
    assert whole.sum(1).allclose(torch.ones(200))
    alone = [method.predict_proba({name: each[[i]] for name, each in rows.items()}) for i in range(200)]
    assert torch.cat(alone).allclose(whole, atol=1e-5)
    again = methods.load(method.state())
    assert again.predict_proba(dict(reversed(rows.items()))).equal(whole)
    assert method.prototypes().shape == (3, 64)


def test_rows_beyond_memory_are_mapped_batch_by_batch(monkeypatch: pytest.MonkeyPatch):
    x, _ = planted(count=200, clusters=3)
    held = fitted(x, clusters=3, steps=20)
    monkeypatch.setattr(turtle, "HELD_BYTES", 0)
    read = fitted(x, clusters=3, steps=20)
    for name, value in held.state().tensors.items():
        assert read.state().tensors[name].allclose(value, atol=1e-4), name


def test_runs_whose_clusters_have_collapsed_are_refused():
    """Without the entropy and with rates that overshoot all rows go to few clusters, whose score is high."""
    x, _ = planted(count=300, clusters=6)
    sweep = [{"inner_rate": rate, "outer_rate": rate} for rate in (0.1, 1e-9)]
    method = fitted(x, clusters=6, steps=200, gamma=0.0, seeds=1, sweep=sweep)
    collapsed, kept = method.report
    assert collapsed["candidate"].endswith("(collapsed)")
    assert collapsed["score"] > kept["score"]
    assert kept["chosen"] == 1


def test_settings_without_effect_are_refused():
    sweep = [{"inner_rate": 1e-2}]
    with pytest.raises(ValidationError, match=r"outer_rate = 0\.1: sweep holds the settings"):
        TurtleConfig.model_validate({"clusters": 3, "sweep": sweep, "outer_rate": 0.1})
    with pytest.raises(ValidationError, match="components = 5: rows are taken as they come, set scale: auto"):
        TurtleConfig.model_validate({"clusters": 3, "preset": "published", "components": 5})
    swept = TurtleConfig.model_validate({"clusters": 3, "sweep": sweep}).resolved(100, [8])
    assert swept.runs()[0][0].inner_rate == 1e-2


def test_what_auto_chooses():
    c = TurtleConfig(clusters=10).resolved(3000, [1280, 512])
    assert (c.scale, c.components, c.steps, c.batch_size, c.seeds, c.start) == ("auto", 64, 300, 1000, 5, "cold")
    # The reach of the published rate at 768 components.
    assert c.inner_rate * 64 == pytest.approx(1e-3 * 768)
    assert c.resolved(3000, [1280, 512]) == c
    assert TurtleConfig(clusters=100).resolved(9000, [1280]).components == 200


def test_unit_rows_at_the_published_scale_are_warned_of(caplog: pytest.LogCaptureFixture):
    x, _ = planted(count=200, clusters=3)
    fitted([functional.normalize(each, dim=1) for each in x], clusters=3, preset="published", steps=2)
    assert "rows have length 1" in caplog.text
    caplog.clear()
    fitted(x, clusters=3, preset="published", steps=2)
    assert not caplog.text
