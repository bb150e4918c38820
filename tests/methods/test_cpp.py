"""CPP's config, presets, network and training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rayclust.clustering import spectral
from rayclust.clustering.candidates import choose, make_candidates
from rayclust.errors import ArtefactError, ConfigError, ShapeError
from rayclust.losses.coding_rate import coding_rate
from rayclust.methods import build, cpp, cpp_settings, load
from rayclust.methods.base import Batch, Membership, Prototypes, Recuttable, Transform
from rayclust.methods.cpp import Cpp, CppNetwork
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.settings import EMBEDDINGS, Plan
from rayclust.metrics.external import accuracy
from rayclust.search.knn import nearest_others
from rayclust.training.loop import LOSS_SCALE, Stepper, Trainer, fit_arrays
from rayclust.training.sampling import ArrayRows
from tests import references
from tests.stores import MemoryStore
from tests.workers import on_workers


def test_written_keys_win_over_the_preset():
    config = CppConfig(clusters=10, preset="cifar100", temperature=0.3, learning_rate=1e-3).resolved(50_000)
    assert (config.temperature, config.batch_size, config.epochs) == (0.3, 1500, 50)
    assert config.learning_rate == config.min_learning_rate == 1e-3
    assert config.preset == "none"
    assert config.resolved(10) == config


@pytest.mark.parametrize(("preset", "count", "wanted"), [
    ("cifar10", 50_000, (4096, 128, 1024, 0.175, 15 * 48, 50)),
    ("cifar20", 50_000, (4096, 128, 1024, 0.13, 15 * 48, 48)),
    ("cifar100", 50_000, (4096, 128, 1500, 0.10, 50 * 33, 33)),
    ("imagenet", 1_281_167, (2048, 1024, 1024, 0.12, 20 * 1251, 2000)),
])  # fmt: skip
def test_published_settings(preset: str, count: int, wanted: tuple[float, ...]):
    c = CppConfig(clusters=10, preset=preset).resolved(count)
    plan = Plan.of(c, count)
    assert (c.hidden, c.width, plan.batch_size, c.temperature, plan.steps, c.expansion_steps) == wanted
    assert c.learning_rate * plan.batch_size / 256 == pytest.approx(1e-4)
    assert c.min_learning_rate == c.learning_rate
    assert (c.distortion, c.compression_weight, c.membership_weight, c.half_steps) == (0.1, 1.0, 0.05, 5)
    assert (c.weight_decay, c.final_weight_decay, c.code_weight_decay) == (1e-4, 1e-4, 5e-3)


@pytest.mark.parametrize("count", [5, 1_000, 100_000])
def test_auto_counts_steps_and_stops_on_the_loss(count: int):
    c = CppConfig(clusters=3).resolved(count)
    assert c.steps is not None
    assert c.patience is not None
    assert c.start == "principal"
    assert Plan.of(c, count).batch_size <= count


def test_auto_leaves_room_for_many_clusters_and_moves_the_slower_for_it():
    narrow, wide = (CppConfig(clusters=clusters).resolved(5_000) for clusters in (10, 40))
    assert (narrow.width, wide.width) == (32, 128)
    assert wide.learning_rate == pytest.approx(narrow.learning_rate / 4)
    assert CppConfig(clusters=1_000).resolved(5_000).width == 128


@pytest.mark.parametrize(("clusters", "noise"), [(2, 0.0), (2, 0.02), (3, 0.05)])
def test_auto_tells_tight_clusters_apart_that_lie_opposite_each_other_around_the_mean(clusters: int, noise: float):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20 * clusters) % clusters
    x = torch.randn(clusters, 16, generator=generator)[labels]
    x = x + noise * torch.randn(x.shape, generator=generator)
    found = fit_arrays(x, None, CppConfig(clusters=clusters)).predict_proba(x).argmax(1)
    assert accuracy(found.numpy(), labels.numpy()) == 1.0


def network(variant: str = "two_head", precision: str = "fp32") -> CppNetwork:
    settings = {"clusters": 2, "preset": "none", "hidden": 12, "width": 5, "variant": variant, "precision": precision}
    return CppNetwork(CppConfig.model_validate(settings), 7, seed=0)


def network_rows(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(0))


def test_is_the_published_network_in_torchs_own_layers():
    ours, x = network(), network_rows()
    trunk = nn.Sequential(ours.first, nn.BatchNorm1d(12), nn.ReLU(), ours.second, nn.ReLU())
    assert ours.codes is not None
    for training in (True, False):
        trunk.train(training)
        hidden = trunk(x)
        for found, head in zip(ours(x, training=training), (ours.features, ours.codes), strict=True):
            torch.testing.assert_close(found, nn.functional.normalize(head(hidden), dim=1))


def test_starts_within_torchs_default_bounds_and_by_the_seed():
    ours = network()
    assert ours.first.weight.abs().max() <= 1 / math.sqrt(7)
    assert ours.first.weight.abs().max() > 0.9 / math.sqrt(7)
    assert torch.equal(ours.second.bias, network().second.bias)


def test_one_head_gives_the_features_as_codes():
    ours = network("single_head")
    z, codes = ours(network_rows())
    assert codes is z
    ours.copy_features_to_codes()


@pytest.mark.parametrize("variant", ["single_head", "two_head"])
def test_the_principal_start_is_the_direction_of_the_rows_components(variant: str):
    ours, x = network(variant), network_rows(200) * torch.tensor([9.0, 7, 5, 3, 2, 1, 0.5]) + 4.0
    ours.start_from_principal(lambda: iter([x[:50], x[50:]]))
    centered = x - x.mean(0)
    components = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:5].T
    wanted = nn.functional.normalize(components, dim=1)
    for found in ours(x, training=True):
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-3, rtol=0)


def test_the_principal_start_bears_rows_of_fewer_dimensions_than_outputs():
    ours, x = network(), network_rows(40)
    x[:, 3:] = 1.0
    ours.start_from_principal(lambda: iter([x]))
    z, _ = ours(x, training=True)
    assert z.isfinite().all()
    assert z.norm(dim=1).allclose(torch.ones(40), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_products_give_float32_unit_rows_near_the_wide_ones(precision: str):
    z, _ = network(precision=precision)(network_rows(), training=True)
    wide, _ = network()(network_rows(), training=True)
    assert z.dtype == torch.float32
    assert z.norm(dim=1).allclose(torch.ones(20), atol=1e-6)
    torch.testing.assert_close(z, wide, atol=0.05, rtol=0)


D, B, K = 10, 14, 3
SMALL = {"clusters": K, "preset": "none", "hidden": 16, "width": 6, "batch_size": B, "expansion_steps": 1}
RATES = {"learning_rate": 0.1 * 256 / B, "weight_decay": 1e-2, "final_weight_decay": 1e-2}
"""A rate of 0.1 at the small batch."""


def method(**settings: Any) -> Cpp:
    """A small CPP in float64."""
    made = build(CppConfig.model_validate({**SMALL, **settings}), D, 50, seed=0).double()
    assert isinstance(made, Cpp)
    return made


def batch(step: int, rank: int = 0, world: int = 1) -> Batch:
    x = torch.randn(1, B, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[:, rank::world]
    return Batch({EMBEDDINGS: x}, torch.arange(B)[rank::world], step, 0, world * x.shape[1] / B)


def planted(count: int = 240) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows near K directions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % K
    x = torch.randn(K, D, generator=generator)[labels] + 0.4 * torch.randn(count, D, generator=generator)
    return torch.nn.functional.normalize(x, dim=1), labels


def trained(rank: int, world: int) -> list[dict[str, Any]]:
    """Of each variant: losses of some steps through both phases, and parameters and momenta in the end."""
    found = []
    for variant in ("two_head", "single_head"):
        made = method(variant=variant, **RATES, min_learning_rate=RATES["learning_rate"])
        steps = Stepper(made)
        losses = [steps.step(batch(step, rank, world))["loss"] for step in range(5)]
        found.append({"losses": torch.stack(losses), "state": made.state_dict(), "steps": steps.state()})
    return found


def test_workers_with_unequal_shares_train_as_one_does():
    alone = trained(0, 1)
    for worker in on_workers(3, trained):
        for found, wanted in zip(worker, alone, strict=True):
            torch.testing.assert_close(found["losses"], wanted["losses"], rtol=0, atol=1e-9)
            for part in ("state", "steps"):
                assert found[part].keys() == wanted[part].keys()
                for name, tensor in wanted[part].items():
                    torch.testing.assert_close(found[part][name], tensor, rtol=0, atol=1e-9, msg=f"{part} {name}")


def test_memory_and_truncation_reach_the_compression_term(monkeypatch: pytest.MonkeyPatch):
    found = []
    monkeypatch.setattr(cpp, "compression_rate", lambda z, *others: found.append(others[-1]) or z.sum())
    method(memory_gib=0.5, top_entries=7).training_step(batch(2))
    assert [(options.memory, options.top) for options in found] == [(2**29, 7)]


def test_the_loss_is_rate_reduction_with_the_published_membership():
    made, x = method(variant="two_head", membership_weight=0.3, compression_weight=0.7), batch(2)
    z, codes = made.network(x.x[0], training=True)
    pi = spectral.membership(codes, 0.175, 5)
    losses = made.training_step(x)
    wanted = -coding_rate(z, 0.1) + 0.7 * references.compression_rate(z, pi, 0.1) + 0.15 * pi.square().sum()
    assert losses["loss"].item() == pytest.approx(wanted.item(), rel=1e-10)
    assert made.training_step(batch(1))["loss"].item() == pytest.approx(-made.training_step(batch(1))["rate"].item())
    ours, plain = (torch.autograd.grad(value, list(made.network.parameters())) for value in (losses["loss"], wanted))
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)


def test_expansion_leaves_the_cluster_head_alone_and_then_copies_the_feature_head():
    made = method(variant="two_head", expansion_steps=2, **RATES)
    steps, network = Stepper(made), made.network
    assert network.codes is not None
    start = network.codes.weight.clone()
    for step in range(2):
        steps.step(batch(step))
        assert torch.equal(network.codes.weight, start)
    steps.step(batch(2))  # W + 1
    assert torch.equal(network.codes.weight, network.features.weight)
    assert torch.equal(network.codes.bias, network.features.bias)
    steps.step(batch(3))
    assert not torch.equal(network.codes.weight, network.features.weight)


def test_expansion_can_take_exactly_the_steps_asked_for():
    assert method(expansion_steps=2).config.last_expansion_step == 2
    assert method(expansion_steps=2, extra_expansion_step=False).config.last_expansion_step == 1
    assert method(expansion_steps=0, extra_expansion_step=False).training_step(batch(0))["compressed"] > 0


def test_trains_by_torchs_sgd_with_momentum_in_two_groups():
    ours = method(variant="two_head", code_rate=0.5, **RATES, min_learning_rate=RATES["learning_rate"])
    plain = method(variant="two_head")
    codes = list(plain.network.codes.parameters()) if plain.network.codes is not None else []
    others = [p for p in plain.parameters() if all(p is not c for c in codes)]
    groups = [{"params": others, "weight_decay": 1e-2}, {"params": codes, "lr": 0.05, "weight_decay": 5e-3}]
    optimizer, steps = torch.optim.SGD(groups, lr=0.1, momentum=0.9), Stepper(ours)
    for step in range(2, 5):
        steps.step(batch(step))
        optimizer.zero_grad()
        plain.training_step(batch(step))["loss"].backward()
        optimizer.step()
    for (name, own), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, msg=name)


def test_half_precision_scales_the_loss_and_skips_steps_that_overflow(monkeypatch: pytest.MonkeyPatch):
    made = method(precision="fp16").float()
    steps = Stepper(made)
    first = batch(2)
    steps.step(Batch({EMBEDDINGS: first.x.float()}, first.rows, 2, 0))
    assert steps.state()["loss_scale.scale"].item() == LOSS_SCALE
    before = [p.clone() for p in made.parameters()]
    infinite = {"loss": torch.inf * made.network.first.weight.sum()}
    monkeypatch.setattr(made, "training_step", lambda _: infinite)
    steps.step(first)
    assert steps.state()["loss_scale.scale"].item() == LOSS_SCALE / 2
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


@pytest.mark.parametrize("variant", ["single_head", "two_head"])
def test_finds_planted_clusters_and_new_rows_of_them(variant: str):
    x, labels = planted(360)
    settings = {"batch_size": 120, "steps": 80, "learning_rate": 0.05, "min_learning_rate": 0.05, "hidden": 64}
    config = CppConfig.model_validate({**SMALL, **settings, "width": 12, "expansion_steps": 20, "variant": variant})
    fitted = fit_arrays(x[:240], None, config, seed=0)
    assert isinstance(fitted, Cpp)
    probabilities = fitted.predict_proba(x)
    assert probabilities.sum(1).allclose(torch.ones(360))
    assert accuracy(labels[:240].numpy(), probabilities[:240].argmax(1).numpy()) > 0.9
    assert accuracy(labels[240:].numpy(), probabilities[240:].argmax(1).numpy()) > 0.85
    assert fitted.transform(x).norm(dim=1).allclose(torch.ones(360))
    assert isinstance(fitted, Transform)
    assert fitted.width == fitted.transform(x).shape[1] == 12
    torch.testing.assert_close(fitted.transform(x[:1]), fitted.transform(x)[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("is_supported", "gain", "least_rows"), [(True, -1, 80), (False, -1, 80), (True, 1, 80), (True, -1, 81)]
)
def test_the_final_clusters_go_on_from_autos_and_give_way_to_them_on_evidence(
    is_supported: bool, gain: float, least_rows: int, monkeypatch: pytest.MonkeyPatch
):
    x, labels = planted(240)
    is_right = is_supported and gain < 0 and least_rows == 80
    settings = {"steps": 3, "learning_rate": 0.05, "min_learning_rate": 0.05, "start": "principal", "clusters": 3}
    monkeypatch.setattr(cpp, "is_supported", lambda *_: is_supported)
    monkeypatch.setattr(cpp, "GAIN", gain)
    monkeypatch.setattr(cpp, "SPACE_ROWS", least_rows)
    made = fit_arrays(x, None, CppConfig.model_validate({**SMALL, **settings, "final_start": "auto"}))
    assert isinstance(made, Cpp)
    found = made.predict_proba(x)
    assert found.sum(1).allclose(torch.ones(240))
    assert accuracy(labels.numpy(), found.argmax(1).numpy()) > 0.9
    assert (made.start is None) == is_right
    assert load(made.state()).predict_proba(x).allclose(found, atol=1e-5)
    again = made.recut(3).predict_proba(x)
    assert again.equal(found)
    assert made.recut(2).predict_proba(x).shape == (240, 2)
    if not is_right:
        neighbors = nearest_others(x, 10)
        start = choose(make_candidates(x, neighbors, 3, 0))
        assert found.argmax(1).equal(start.labels)


def test_multiplications_by_hand():
    config = CppConfig(clusters=2, preset="none", hidden=4, width=2, batch_size=8, steps=3, dense_rows=5)
    weights = 6 * 4 + 4 * 4 + 4 * 2
    step = 3 * 8 * weights + 1.5 * 8 * 8 * 2 * 2 + 4 * 8 * 2**3
    wanted = 3 * step + 2 * 20 * weights + 5 * 5 * (2 + cpp_settings.KERNEL_PRODUCTS * 14)
    assert config.multiplications(20, 6) == wanted


@pytest.fixture(scope="module")
def fitted() -> Cpp:
    x, _ = planted()
    found = fit_arrays(x, None, CppConfig.model_validate({**SMALL, "clusters": 5, "steps": 6}), seed=3)
    assert isinstance(found, Cpp)
    return found


def test_an_export_assigns_as_the_method_did(fitted: Cpp):
    x, _ = planted()
    loaded = load(fitted.state())
    torch.testing.assert_close(loaded.predict_proba(x), fitted.predict_proba(x))
    torch.testing.assert_close(loaded.transform(x), fitted.transform(x))
    torch.testing.assert_close(loaded.prototypes(), fitted.prototypes())


def test_another_number_of_clusters_needs_no_other_fit(fitted: Cpp):
    x, _ = planted()
    assert all(isinstance(fitted, one) for one in (Recuttable, Membership, Prototypes))
    other = fitted.recut(2)
    assert other.predict_proba(x).shape == (240, 2)
    assert fitted.predict_proba(x).shape == (240, 5)
    assert load(other.state()).predict_proba(x).allclose(other.predict_proba(x))
    assert load(fitted.state()).recut(2).predict_proba(x).allclose(other.predict_proba(x))
    again = fitted.recut(5, seed=9)
    assert load(again.state()).predict_proba(x).allclose(again.predict_proba(x))
    with pytest.raises(ConfigError, match="clusters = 6: from 1 to 5"):
        fitted.recut(6)


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
    assert made.stop
    assert trainer.history[-1]["step"] == 8
    assert not build(CppConfig.model_validate({**SMALL, **settings}), D, 240, seed=0).stop


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_training_stopped_and_gone_on_with_ends_in_the_same_bits(precision: str):
    x, _ = planted()
    settings = {"steps": 12, "batch_size": 120, "variant": "two_head", "patience": 4, "precision": precision}

    def run(store: MemoryStore) -> Cpp:
        made = build(CppConfig.model_validate({**SMALL, **settings}), D, 240, seed=0)
        assert isinstance(made, Cpp)
        made.fit(ArrayRows(x), Trainer(0, store=store))
        return made

    whole, store = run(MemoryStore()), MemoryStore()
    for store.stop_after in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(store)
    assert [state["step"] for _, state in store.kept] == [2, 4]
    gone_on = run(store)
    for name, value in whole.state().tensors.items():
        assert torch.equal(gone_on.state().tensors[name], value), name


def stopped(rank: int, world: int, x: torch.Tensor) -> MemoryStore:
    store = MemoryStore(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        method_of(x).fit(ArrayRows(x), Trainer(0, store=store))
    return store


def method_of(x: torch.Tensor) -> Cpp:
    made = build(CppConfig.model_validate({**SMALL, "steps": 6, "batch_size": 120}), D, len(x), seed=0).double()
    assert isinstance(made, Cpp)
    return made


def test_one_worker_goes_on_where_two_were():
    x = planted()[0].double()
    alone, gone_on = method_of(x), method_of(x)
    alone.fit(ArrayRows(x), Trainer(0))
    gone_on.fit(ArrayRows(x), Trainer(0, store=on_workers(2, stopped, x)[0]))
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(gone_on.network.state_dict()[name], value, rtol=0, atol=1e-8, msg=name)


def test_a_set_smaller_than_the_batch_is_taken_whole():
    x, _ = planted(9)
    found = fit_arrays(x, None, CppConfig(clusters=2, hidden=8, width=4, steps=3), seed=0)
    assert found.plan.batch_size == 9
    assert found.predict_proba(x).shape == (9, 2)


def test_refusals():
    made = method()
    with pytest.raises(ArtefactError, match="has no clusters yet"):
        made.predict_proba(torch.zeros(2, D))
    with pytest.raises(ShapeError, match="width 3: 10 is needed"):
        made.transform(torch.zeros(2, 3))
