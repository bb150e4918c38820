from __future__ import annotations

from typing import Any

import pytest
import torch

from rayclust.errors import ConfigError, ShapeError
from rayclust.methods import Temi, TemiConfig, build, load
from rayclust.methods.base import Batch
from rayclust.training.pairs import ArrayRows
from tests.workers import on_two_workers

D, K, B = 6, 4, 9


def _method(**settings: Any) -> Temi:
    """A small TEMI in float64 whose student and teacher are far apart and far from their start."""
    written = {"clusters": K, "preset": "none", "heads": 3, "hidden": 8, "bottleneck": 5, "batch_size": B, **settings}
    method = build(TemiConfig.model_validate(written), D, 50, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    assert isinstance(method, Temi)
    return method


def _batch(rank: int = 0, world: int = 1, views: int = 2, epoch: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(views, B, D, generator=generator, dtype=torch.float64)[:, rank::world]
    return Batch(x, torch.arange(B)[rank::world], 0, epoch, share=world * x.shape[1] / B)


def _means(losses: list[float]) -> dict[str, torch.Tensor]:
    return {"head_loss": torch.tensor(losses), "head_agreement": torch.full((len(losses),), 0.5)}


def _gradients(rank: int, world: int) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Of each loss: what the workers' mean loss is, and each parameter's mean gradient."""
    found = {}
    for loss in ("temi", "pmi", "wmi", "scan"):
        method = _method(loss=loss, entropy_weight=3.0)
        batch = _batch(rank, world)
        value = method.losses(batch)["loss"] * batch.share
        value.backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        for tensor in (value, *gradients.values()) if world > 1 else ():
            torch.distributed.all_reduce(tensor.data)
        mean = {name: gradient / world for name, gradient in gradients.items()}
        found[loss] = (value.detach() / world, {**mean, "shares": method.marginal.shares})
    return found


def test_two_workers_have_the_loss_gradients_and_marginal_of_one():
    alone, together = _gradients(0, 1), on_two_workers(_gradients)
    for loss, (value, tensors) in alone.items():
        assert {"student.weights.0", "student.scale", "student.direction", "shares"} <= tensors.keys()
        for found in together:
            assert found[loss][0].item() == pytest.approx(value.item(), rel=0, abs=1e-10)
            for name, tensor in tensors.items():
                assert found[loss][1][name].allclose(tensor, rtol=0, atol=1e-10), (loss, name)


def test_loss_is_the_mean_of_the_heads_and_the_teacher_gets_no_gradient():
    method = _method()
    losses = method.losses(_batch())
    assert losses["loss"].item() == pytest.approx(losses["head_loss"].mean().item())
    losses["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


@pytest.mark.parametrize("loss", ["temi", "pmi", "wmi", "scan"])
def test_one_head_works_with_every_loss(loss: str):
    losses = _method(loss=loss, heads=1).losses(_batch())
    assert losses["head_loss"].shape == (1,)
    assert losses["loss"].isfinite()


def test_four_views_are_the_mean_of_their_pairs():
    method = _method(marginal_momentum=0.0)
    batch = _batch(views=4)
    value = method.losses(batch)["loss"]
    shares = method.marginal.shares.clone()
    method.marginal.update = lambda _: shares.log()  # type: ignore[method-assign]
    # with full trust the pairs' losses only average; TEMI's own weights average as well, so PMI is what to compare
    pmi = _method(loss="pmi", marginal_momentum=0.0)
    pmi.marginal.update = method.marginal.update  # type: ignore[method-assign]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    singles = [pmi.losses(Batch(batch.views[list(pair)], batch.rows, 0, 0))["loss"] for pair in pairs]
    assert pmi.losses(batch)["loss"].item() == pytest.approx(torch.stack(singles).mean().item())
    assert value.isfinite()


def test_student_and_teacher_start_equal_and_the_teacher_follows_by_its_momentum():
    method = build(TemiConfig(clusters=K, preset="none", heads=2), D, 50, seed=0)
    assert isinstance(method, Temi)
    start = method.teacher.direction.clone()
    assert start.equal(method.student.direction)
    with torch.no_grad():
        method.student.direction.zero_()
    method.after_step(0)
    assert method.teacher.direction.allclose(0.996 * start)


def test_momentum_and_temperature_follow_their_schedules_even_for_few_epochs():
    method = _method(
        epochs=4,
        final_teacher_momentum=1.0,
        warmup_teacher_temperature=0.4,
        warmup_teacher_temperature_epochs=4,
    )
    assert [method.teacher_temperature(epoch) for epoch in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])
    assert method.teacher_momentum(0) == pytest.approx(0.996)
    assert method.teacher_momentum(method.plan.steps // 2) == pytest.approx(0.998)
    assert _method(epochs=3).teacher_temperature(2) == pytest.approx(0.1)
    assert _method(warmup_teacher_temperature_epochs=0).teacher_temperature(0) == 0.1


def test_the_last_layer_is_frozen_in_the_first_epoch_only():
    method = _method()
    assert {id(p) for p in method.frozen(_batch(epoch=0))} == {id(method.student.direction), id(method.student.scale)}
    assert method.frozen(_batch(epoch=1)) == []


def test_decay_acts_on_matrices_and_on_the_scale():
    method = _method(batch_norm=True)
    decayed = {name for name, p in method.named_parameters() if p.requires_grad and method.is_decayed(name, p)}
    assert decayed == {f"student.{name}" for name in ("weights.0", "weights.1", "direction", "scale")}


def test_the_best_head_is_the_one_with_the_lowest_mean_loss_and_its_teacher_assigns():
    method = _method()
    row = method.after_epoch(_means([0.3, -0.2, 0.1]))
    assert row["best_head"] == 1
    assert row["head_losses"] == pytest.approx([0.3, -0.2, 0.1])
    assert 1 <= row["live_clusters"] <= K
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = (method.teacher(x)[1] / 0.1).softmax(-1)
    assert method.assign(x).allclose(expected)
    assert method.assign(x).sum(1).allclose(torch.ones(20, dtype=torch.float64))
    assert method.assign_all(x)[1].allclose(expected)
    with pytest.raises(ShapeError, match="width 5: 6 is needed"):
        method.assign(x[:, :5])


@pytest.mark.parametrize("all_heads", [False, True])
def test_an_export_assigns_as_the_method_did(all_heads: bool):
    method = _method(batch_norm=True).float()
    method.after_epoch(_means([0.3, 0.4, -0.1]))
    export = method.export(all_heads)
    loaded = load(export)
    assert isinstance(loaded, Temi)
    x = torch.randn(8, D, generator=torch.Generator().manual_seed(4))
    assert loaded.assign(x).allclose(method.assign(x), rtol=0, atol=1e-6)
    assert export.tensors["weights.0"].shape[0] == (3 if all_heads else 1)
    assert loaded.config.heads == (3 if all_heads else 1)
    if all_heads:
        assert loaded.assign_all(x).allclose(method.assign_all(x), rtol=0, atol=1e-6)


def test_the_noise_and_neighbour_settings_reach_the_batches():
    pairing = _method(neighbors=7, noise=0.1, repeats=2).pairing
    assert (pairing.columns, pairing.noise, pairing.repeats) == (7, 0.1, 2)


def test_a_kmeans_start_turns_every_head_to_the_partition():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % K
    x = 5 * torch.eye(K, D)[labels] + 0.1 * torch.randn(200, D, generator=generator)

    class Stopped:
        seed = 0

        def fit(self, method: Any, rows: Any, start: Any) -> None:
            start()

        def report(self, row: Any) -> None:
            pass

    method = Temi(TemiConfig(clusters=K, preset="none", heads=2, warm_start="kmeans"), D, 200, seed=0)
    neighbors = torch.stack([torch.arange(200).roll(K * shift) for shift in range(1, 6)], dim=1)  # of the same cluster
    method.fit(ArrayRows(x, neighbors), Stopped())
    for head in method.assign_all(x).argmax(-1):
        assert len({(int(a), int(b)) for a, b in zip(head, labels, strict=True)}) == K


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(ConfigError, match=r"method.clusters = 60: must be at most the number of rows, 50"):
        build(TemiConfig(clusters=60), D, 50, seed=0)
