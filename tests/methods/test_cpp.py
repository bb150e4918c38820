from __future__ import annotations

from typing import Any

import pytest
import torch

from rayclust.clustering import sinkhorn
from rayclust.errors import ArtefactError, ConfigError, ShapeError
from rayclust.losses.coding_rate import coding_rate
from rayclust.methods import Cpp, build, load
from rayclust.methods.base import Batch
from rayclust.methods.cpp import CppConfig
from rayclust.metrics.external import accuracy
from rayclust.training.arrays import fit_arrays
from rayclust.training.loop import Trainer
from rayclust.training.pairs import ArrayRows
from tests import references
from tests.workers import on_workers

D, B, K = 10, 14, 3
SMALL = {"clusters": K, "preset": "none", "hidden": 16, "width": 6, "batch_size": B, "expansion_steps": 1}


def method(**settings: Any) -> Cpp:
    """A small CPP in float64."""
    made = build(CppConfig.model_validate({**SMALL, **settings}), D, 50, seed=0).double()
    assert isinstance(made, Cpp)
    return made


def batch(step: int, rank: int = 0, world: int = 1) -> Batch:
    x = torch.randn(1, B, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[:, rank::world]
    return Batch(x, torch.arange(B)[rank::world], step, 0, share=world * x.shape[1] / B)


def planted(count: int = 240) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows near K directions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % K
    x = torch.randn(K, D, generator=generator)[labels] + 0.4 * torch.randn(count, D, generator=generator)
    return torch.nn.functional.normalize(x, dim=1), labels


def trained(rank: int, world: int, variant: str) -> dict[str, Any]:
    """Losses of some steps through both phases, the first joint gradient, and the parameters in the end."""
    made = method(variant=variant, learning_rate=0.5, min_learning_rate=0.5)
    steps = made.own_steps()
    assert steps is not None
    losses = [steps.take(batch(step, rank, world), 0.1, 1e-2)["loss"] for step in range(5)]
    return {"losses": torch.stack(losses), "state": made.state_dict(), "steps": steps.state()}


@pytest.mark.parametrize(("variant", "workers"), [("two_head", 2), ("two_head", 4), ("single_head", 2)])
def test_many_workers_train_as_one_does(variant: str, workers: int):
    alone = trained(0, 1, variant)
    for found in on_workers(workers, trained, variant):
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=0, atol=1e-9)
        for part in ("state", "steps"):
            assert found[part].keys() == alone[part].keys()
            for name, tensor in alone[part].items():
                torch.testing.assert_close(found[part][name], tensor, rtol=0, atol=1e-9, msg=f"{part} {name}")


def test_the_loss_is_rate_reduction_with_the_published_membership():
    made, x = method(variant="two_head", membership_weight=0.3, compression_weight=0.7), batch(2)
    z, codes = made.network(x.views[0], training=True)
    pi = sinkhorn.membership(codes, 0.175, 5)
    losses = made.losses(x)
    wanted = -coding_rate(z, 0.1) + 0.7 * references.compression_rate(z, pi, 0.1) + 0.15 * pi.square().sum()
    assert losses["loss"].item() == pytest.approx(wanted.item(), rel=1e-10)
    assert made.losses(batch(1))["loss"].item() == pytest.approx(-made.losses(batch(1))["rate"].item())
    ours, plain = (torch.autograd.grad(value, list(made.network.parameters())) for value in (losses["loss"], wanted))
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)


def test_expansion_leaves_the_cluster_head_alone_and_then_copies_the_feature_head():
    made = method(variant="two_head", expansion_steps=2)
    steps, network = made.own_steps(), made.network
    assert steps is not None
    assert network.codes is not None
    start = network.codes.weight.clone()
    for step in range(2):
        steps.take(batch(step), 0.1, 1e-2)
        assert torch.equal(network.codes.weight, start)
    steps.take(batch(2), 0.1, 1e-2)  # W + 1
    assert torch.equal(network.codes.weight, network.features.weight)
    assert torch.equal(network.codes.bias, network.features.bias)
    steps.take(batch(3), 0.1, 1e-2)
    assert not torch.equal(network.codes.weight, network.features.weight)


def test_expansion_can_take_exactly_the_steps_asked_for():
    assert method(expansion_steps=2).config.last_expansion_step == 2
    assert method(expansion_steps=2, extra_expansion_step=False).config.last_expansion_step == 1
    assert method(expansion_steps=0, extra_expansion_step=False).losses(batch(0))["compressed"] > 0


@pytest.mark.parametrize("variant", ["single_head", "two_head"])
def test_finds_planted_clusters_and_new_rows_of_them(variant: str):
    x, labels = planted(360)
    settings = {"batch_size": 120, "steps": 80, "learning_rate": 0.05, "min_learning_rate": 0.05, "hidden": 64}
    config = CppConfig.model_validate({**SMALL, **settings, "width": 12, "expansion_steps": 20, "variant": variant})
    fitted = fit_arrays(x[:240], None, config, seed=0)
    assert isinstance(fitted, Cpp)
    probabilities = fitted.assign(x)
    assert probabilities.sum(1).allclose(torch.ones(360))
    assert accuracy(labels[:240].numpy(), probabilities[:240].argmax(1).numpy()) > 0.9
    assert accuracy(labels[240:].numpy(), probabilities[240:].argmax(1).numpy()) > 0.85
    assert fitted.represent(x).norm(dim=1).allclose(torch.ones(360))
    assert fitted.own_space == fitted.represent(x).shape[1] == 12
    torch.testing.assert_close(fitted.represent(x[:1]), fitted.represent(x)[:1], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def fitted() -> Cpp:
    x, _ = planted()
    found = fit_arrays(x, None, CppConfig.model_validate({**SMALL, "clusters": 5, "steps": 6}), seed=3)
    assert isinstance(found, Cpp)
    return found


def test_an_export_assigns_as_the_method_did(fitted: Cpp):
    x, _ = planted()
    loaded = load(fitted.export())
    torch.testing.assert_close(loaded.assign(x), fitted.assign(x))
    torch.testing.assert_close(loaded.represent(x), fitted.represent(x))
    torch.testing.assert_close(loaded.prototypes(), fitted.prototypes())


def test_another_number_of_clusters_needs_no_other_fit(fitted: Cpp):
    x, _ = planted()
    assert not fitted.refits_for_clusters
    other = fitted.repartition(2)
    assert other.assign(x).shape == (240, 2)
    assert fitted.assign(x).shape == (240, 5)
    assert load(other.export()).assign(x).allclose(other.assign(x))
    assert load(fitted.export()).repartition(2).assign(x).allclose(other.assign(x))
    again = fitted.repartition(5, seed=9)
    assert load(again.export()).assign(x).allclose(again.assign(x))
    with pytest.raises(ConfigError, match="clusters = 6: from 1 to 5"):
        fitted.repartition(6)


def test_running_statistics_are_those_of_all_rows(fitted: Cpp):
    x, _ = planted()
    units = fitted.network.first(x)
    torch.testing.assert_close(fitted.network.norm.running_mean[0], units.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fitted.network.norm.running_var[0], units.var(0), atol=1e-5, rtol=1e-4)
    assert fitted.membership(x[:9]).sum(0).allclose(torch.ones(9), atol=1e-4)


def test_training_ends_where_the_loss_no_longer_falls():
    x, _ = planted()
    settings = {"steps": 400, "patience": 4, "learning_rate": 1e-9, "batch_size": 120, "expansion_steps": 0}
    made = build(CppConfig.model_validate({**SMALL, **settings}), D, 240, seed=0)
    trainer = Trainer(0)
    made.fit(ArrayRows(x), trainer)
    assert made.finished_early
    assert trainer.history[-1]["step"] == 8
    assert not build(CppConfig.model_validate({**SMALL, **settings}), D, 240, seed=0).finished_early


class Store:
    """Keeps checkpoints in memory and fails after one."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.fails = False

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.kept.append((tensors, {**state, "history": list(state["history"])}))
        if self.fails:
            raise KeyboardInterrupt

    def latest(self) -> Any:
        return self.kept[-1] if self.kept else None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_training_stopped_and_gone_on_with_ends_in_the_same_bits(precision: str):
    x, _ = planted()
    settings = {"steps": 12, "batch_size": 120, "variant": "two_head", "patience": 4, "precision": precision}

    def run(store: Store) -> Cpp:
        made = build(CppConfig.model_validate({**SMALL, **settings}), D, 240, seed=0)
        assert isinstance(made, Cpp)
        made.fit(ArrayRows(x), Trainer(0, store=store))
        return made

    whole, store = run(Store()), Store()
    store.fails = True
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(store)
    assert [state["step"] for _, state in store.kept] == [2, 4]
    store.fails = False
    gone_on = run(store)
    for name, value in whole.export().tensors.items():
        assert torch.equal(gone_on.export().tensors[name], value), name


def stopped(rank: int, world: int, x: torch.Tensor, store: Store) -> Store:
    with pytest.raises(KeyboardInterrupt):
        method_of(x).fit(ArrayRows(x), Trainer(0, store=store))
    store.fails = False
    return store


def method_of(x: torch.Tensor) -> Cpp:
    made = build(CppConfig.model_validate({**SMALL, "steps": 6, "batch_size": 120}), D, len(x), seed=0).double()
    assert isinstance(made, Cpp)
    return made


def test_one_worker_goes_on_where_two_were():
    x, store = planted()[0].double(), Store()
    store.fails = True
    alone, gone_on = method_of(x), method_of(x)
    alone.fit(ArrayRows(x), Trainer(0))
    gone_on.fit(ArrayRows(x), Trainer(0, store=on_workers(2, stopped, x, store)[0]))
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(gone_on.network.state_dict()[name], value, rtol=0, atol=1e-8, msg=name)


def test_a_set_smaller_than_the_batch_is_taken_whole():
    x, _ = planted(9)
    found = fit_arrays(x, None, CppConfig(clusters=2, hidden=8, width=4, steps=3), seed=0)
    assert found.plan.batch_size == 9
    assert found.assign(x).shape == (9, 2)


def test_refusals():
    made = method()
    with pytest.raises(ArtefactError, match="has no clusters yet"):
        made.assign(torch.zeros(2, D))
    with pytest.raises(ShapeError, match="width 3: 10 is needed"):
        made.represent(torch.zeros(2, 3))
