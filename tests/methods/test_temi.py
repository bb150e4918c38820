from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rayclust.errors import ConfigError, ShapeError
from rayclust.methods import AnyMethodConfig, build, load, temi_start
from rayclust.methods.base import Batch
from rayclust.methods.settings import EMBEDDINGS, Plan
from rayclust.methods.temi import Heads, Temi
from rayclust.methods.temi_settings import HeadShape, Layout, TemiConfig, auto_settings, choose_layout, estimate_cost
from rayclust.methods.temi_start import StartedTemi
from rayclust.metrics.external import accuracy
from rayclust.search.knn import top_k
from rayclust.settings import format_error
from rayclust.training.loop import Stepper, Trainer, fit_arrays
from rayclust.training.sampling import ArrayRows
from tests.references import ClusteringHead
from tests.workers import on_two_workers

D, K, B = 6, 4, 9


def _resolved(count: int, dimension: int, clusters: int, **written: Any) -> TemiConfig:
    return TemiConfig.model_validate({"clusters": clusters, **written}).resolved(count, dimension)


def test_what_is_written_wins_over_the_preset():
    resolved = TemiConfig(clusters=10, preset="paper", heads=3).resolved(50_000, 768)
    assert (resolved.heads, resolved.preset, resolved.batch_size) == (3, "none", 512)


@pytest.mark.parametrize("wrong", ["rows", "2x", "0x4", "2x2x2x2", ""])
def test_a_layout_is_a_word_or_a_mesh(wrong: str):
    with pytest.raises(ValidationError):
        TemiConfig(clusters=4, parallel=wrong)


@pytest.mark.parametrize("removed", ["clusters", "1x2x2"])
def test_divided_clusters_are_refused_with_what_to_use(removed: str):
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(AnyMethodConfig).validate_python({"name": "temi", "clusters": 4, "parallel": removed})
    assert format_error(caught.value, []) == (
        f"parallel = '{removed}': clusters are no longer divided over workers; use auto, data, heads or RxC"
    )


def test_cut_gradients_need_all_heads_on_every_worker():
    config = TemiConfig(clusters=1000, preset="none", clip_norm=1.0, batch_size=64)
    assert config.layout(5000, 768, 4) == Layout(1, 4)
    assert config.model_copy(update={"clip_norm": None}).layout(5000, 768, 4) == Layout(4, 1)
    with pytest.raises(ConfigError, match="clip_norm needs every head's gradient"):
        config.model_copy(update={"parallel": "heads"}).layout(5000, 768, 4)


def test_a_head_that_does_not_fit_is_refused_in_gigabytes():
    config = TemiConfig(clusters=10_000_000, preset="none", heads=1, batch_size=1024)
    with pytest.raises(ConfigError, match=r"a worker has 24; use fewer clusters, or raise method\.worker_memory"):
        config.layout(20_000_000, 768, 8)
    larger = config.model_copy(update={"worker_memory": 141.0})
    assert larger.layout(20_000_000, 768, 8) == Layout(1, 8)
    assert config.layout(20_000_000, 768, 1) == Layout(1, 1)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ("data", "rows of a batch over 6 workers"),
        ("heads", "heads over 6 workers"),
        ("2x3", "heads over 2 and rows of a batch over 3 workers"),
    ],
)
def test_a_plan_is_described_by_its_layout_and_costs(parallel: str, words: str):
    text = TemiConfig(clusters=1000, parallel=parallel).describe_plan(200_000, 768, 6)
    assert text.startswith(words + ": ")
    assert "GB of weights and optimiser" in text
    assert TemiConfig(clusters=1000).describe_plan(200_000, 768, 4).startswith("heads over 4 workers: ")
    assert TemiConfig(clusters=1000).describe_plan(200_000, 768, 1).startswith("one worker: ")


@pytest.mark.parametrize(
    ("clusters", "count", "expected"),
    [
        (10, 50_000, (50, 50, 200, 512, 20, 0.6)),  # CIFAR-10
        (20, 50_000, (50, 50, 200, 512, 20, 0.55)),  # CIFAR-20
        (100, 50_000, (50, 50, 200, 512, 20, 0.6)),  # CIFAR-100
        (10, 5_000, (50, 50, 800, 512, 20, 0.6)),  # STL-10
        (50, 64_274, (50, 25, 200, 1024, 10, 0.6)),  # ImageNet-50
        (1_000, 1_281_167, (50, 25, 200, 1024, 10, 0.6)),  # ImageNet
        (25_000, 1_281_167, (50, 25, 200, 1024, 10, 1.0)),  # over-clustering
    ],
)
def test_paper_settings_by_the_size_of_its_data_sets(clusters: int, count: int, expected: tuple[Any, ...]):
    c = _resolved(count, 768, clusters, preset="paper")
    assert (c.heads, c.neighbors, c.epochs, c.batch_size, c.warmup_epochs, c.beta) == expected


@pytest.mark.parametrize(
    ("clusters", "count", "expected"),
    [
        (10, 50_000, (16, 50, 100, 1024, 20, 0.6)),
        (1_000, 1_281_167, (16, 25, 100, 1024, 20, 0.6)),
        (25_000, 1_281_167, (16, 25, 100, 128, 20, 1.0)),
    ],
)
def test_readme_settings(clusters: int, count: int, expected: tuple[Any, ...]):
    c = _resolved(count, 768, clusters, preset="readme")
    assert (c.heads, c.neighbors, c.epochs, c.batch_size, c.warmup_epochs, c.beta) == expected


@pytest.mark.parametrize("preset", ["readme", "paper"])
def test_published_rates_and_momenta(preset: str):
    c = _resolved(50_000, 768, 10, preset=preset)
    assert (c.learning_rate, c.min_learning_rate) == (1e-4, 1e-4)
    assert (c.teacher_momentum, c.final_teacher_momentum) == (0.996, 0.996)
    assert (c.student_temperature, c.teacher_temperature, c.marginal_momentum) == (0.1, 0.1, 0.9)
    assert (c.optimizer, c.weight_decay, c.freeze_last_layer, c.steps) == ("adamw", 1e-4, 1, None)


@pytest.mark.parametrize("preset", ["auto", "readme", "paper", "none"])
def test_what_is_written_wins_over_every_preset_and_resolving_twice_changes_nothing(preset: str):
    c = _resolved(50_000, 768, 10, preset=preset, heads=3, beta=0.77, batch_size=64)
    assert (c.heads, c.beta, c.batch_size, c.preset) == (3, 0.77, 64, "none")
    assert c.resolved(7, 7) == c
    assert TemiConfig.model_validate(c.model_dump(mode="json")) == c


def test_short_trainings_start_warm_unless_told_otherwise():
    assert _resolved(3_000, 768, 10, preset="readme", epochs=200, batch_size=512).warm_start == "kmeans"
    assert _resolved(3_000, 768, 10, preset="readme", warm_start="none").warm_start == "none"
    assert _resolved(3_000, 768, 10, preset="readme", steps=5_000).warm_start == "none"
    assert {_resolved(50_000, 768, 10, preset=preset).warm_start for preset in ("readme", "paper")} == {"none"}


GRID = [
    (count, dimension, clusters)
    for count, dimension, clusters in itertools.product(
        [2, 3, 50, 500, 3_000, 10_000, 50_000, 1_281_167], [1, 64, 768, 1280], [2, 3, 10, 100, 1_000, 25_000]
    )
    if clusters <= count
]


@pytest.mark.parametrize(("count", "dimension", "clusters"), GRID)
def test_settings_are_possible_for_every_size(count: int, dimension: int, clusters: int):
    c = _resolved(count, dimension, clusters)
    plan = Plan.of(c, count)
    assert 200 <= plan.steps <= max(3_000, 200 * count)
    assert plan.warmup_steps < plan.steps
    assert 1 <= c.neighbors <= 50
    assert c.start_neighbors <= c.neighbors
    assert 0.5 < c.beta <= 1.0
    assert 2e-4 <= c.learning_rate * c.batch_size / 256 * 1.0001 <= 2.1e-3
    assert 0.98 <= c.teacher_momentum <= 0.996


def test_more_clusters_or_rows_never_take_fewer_steps():
    for dimension in (64, 1280):
        by_clusters = [_resolved(100_000, dimension, k).steps for k in (2, 10, 100, 1_000)]
        by_rows = [_resolved(n, dimension, 100).steps for n in (500, 5_000, 50_000, 500_000)]
        assert by_clusters == sorted(by_clusters)
        assert by_rows == sorted(by_rows)


def test_large_trainings_come_near_to_the_published_one():
    c = _resolved(1_281_167, 768, 1_000)
    assert (c.batch_size, c.teacher_momentum) == (1024, 0.996)
    assert c.learning_rate == pytest.approx(2e-4 * 256 / 1024)
    fine = _resolved(1_281_167, 768, 25_000)
    assert (fine.warm_start, fine.beta, fine.freeze_last_layer) == ("none", 1.0, 1)


def test_what_is_written_is_heeded_by_what_depends_on_it():
    c = _resolved(3_000, 1280, 10, batch_size=128, steps=6_000)
    assert (c.batch_size, c.steps) == (128, 6_000)
    assert (c.learning_rate, c.teacher_momentum) == (pytest.approx(4e-4), 0.996)
    assert auto_settings(3_000, 1280, 10, TemiConfig(clusters=10))["beta"] == 0.8


def test_neighbours_and_steps_by_hand():
    """√(N / K) neighbours between 3 and 50; 30 steps a cluster, at least 200, at most 200 epochs."""
    sizes = ((10_000, 10), (3_000, 10), (50_000, 10), (60, 20), (3, 3), (2, 2))
    assert [_resolved(n, 64, k).neighbors for n, k in sizes] == [32, 17, 50, 3, 2, 1]
    assert [_resolved(n, 64, k).steps for n, k in ((3_000, 10), (3_000, 2), (50_000, 100))] == [300, 200, 3_000]
    assert _resolved(1_281_167, 768, 25_000).steps == 200 * (1_281_167 // 1024)


def test_few_heads_are_for_small_sets_in_few_clusters_that_start_warm():
    sizes = ((3_000, 1280, 10), (3_000, 64, 64), (3_000, 1280, 65), (70_000, 768, 10), (1_281_167, 768, 25_000))
    found = [_resolved(*size) for size in sizes]
    assert [(c.heads, c.components) for c in found] == [(2, 512), (2, 512), (16, 0), (16, 0), (16, 0)]
    assert [c.head_shape(size[1]).dimension for c, size in zip(found, sizes, strict=True)] == [512, 64, 1280, 768, 768]


PUBLISHED = HeadShape(heads=16, dimension=768, clusters=25_000), Plan(1024, 1250, 1250, 0)
"""The over-clustering of ImageNet."""


def test_parameters_and_operations_are_those_of_the_heads():
    shape = HeadShape(heads=2, dimension=7, clusters=11, hidden=5, bottleneck=3)
    cost = estimate_cost(shape, Plan(4, 1, 1, 0), Layout(1, 1))
    assert cost.state_bytes == 5 * 4 * sum(p.numel() for p in Heads(shape, seed=0).parameters())
    # two views; forward twice and back twice, but no gradient of the rows that come in
    assert cost.operations == 2 * 4 * 2 * 2 * (3 * 7 * 5 + 4 * 5 * 3 + 4 * 3 * 11)


def test_the_published_overclustering_has_the_sizes_of_its_paper():
    one = estimate_cost(*PUBLISHED, Layout(1, 1))
    assert one.state_bytes == pytest.approx(5 * 4 * 16 * 6.95e6, rel=0.001)
    assert one.sent_bytes == 0
    assert one.operations == pytest.approx(1.8e12, rel=0.02)
    data, heads = estimate_cost(*PUBLISHED, Layout(1, 8)), estimate_cost(*PUBLISHED, Layout(8, 1))
    assert data.sent_bytes == pytest.approx(2 * 7 / 8 * 4 * 16 * 6.95e6, rel=0.01)
    assert heads.sent_bytes < 10_000
    assert heads.state_bytes == one.state_bytes / 8


def test_large_heads_are_divided_and_small_ones_left_together():
    assert [choose_layout(*PUBLISHED, workers) for workers in (1, 8)] == [Layout(1, 1), Layout(8, 1)]
    assert choose_layout(*PUBLISHED, 32) == Layout(16, 2)  # no more parts than heads
    assert choose_layout(HeadShape(heads=2, dimension=6, clusters=4), Plan(9, 1, 1, 0), 2) == Layout(1, 2)
    # refused later, where the batch is known to be too small
    assert choose_layout(HeadShape(heads=3, dimension=8, clusters=4), Plan(2, 1, 1, 0), 7) == Layout(1, 7)


def test_a_layout_can_be_asked_for():
    asked = {"data": Layout(1, 4), "heads": Layout(4, 1), "2x2": Layout(2, 2)}
    assert {word: choose_layout(*PUBLISHED, 4, word) for word in asked} == asked
    with pytest.raises(ConfigError, match=r"method\.parallel = 2x3: is for 6 workers, there are 4; set resources.work"):
        choose_layout(*PUBLISHED, 4, "2x3")
    with pytest.raises(ConfigError, match="16 heads cannot be divided over 32 workers; use fewer, or data"):
        choose_layout(*PUBLISHED, 32, "heads")


def test_classes_of_very_different_size_are_no_collapse():
    method = build(TemiConfig(clusters=10, preset="none", heads=1), D, 50, seed=0)
    assert isinstance(method, Temi)
    method.marginal.shares[0], method.marginal.shares[0, 0] = 0.1 / 9, 0.9
    row = method.on_epoch_end({"head_loss": torch.tensor([0.1]), "head_agreement": torch.tensor([0.9])})
    assert row["marginal_entropy"] < 0.5 * math.log(10)
    assert (row["collapsed_heads"], row["live_clusters"]) == (0, 10)


@pytest.mark.parametrize(
    ("beta", "advice"), [(1.0, "method.beta below 1, such as 0.9"), (0.5, "lower method.learning_rate")]
)
def test_the_row_of_an_epoch_has_every_head_and_the_best_and_a_collapse_is_logged(
    beta: float, advice: str, caplog: pytest.LogCaptureFixture
):
    method = build(TemiConfig(clusters=20, preset="none", heads=2, beta=beta), D, 50, seed=0)
    assert isinstance(method, Temi)
    means = {"head_loss": torch.tensor([0.1, 0.2]), "head_agreement": torch.tensor([0.4, 0.98])}
    method.on_epoch_end(means)
    assert not caplog.records
    method.marginal.shares[1] = 0.01 / 19
    method.marginal.shares[1, 3] = 0.99
    row = method.on_epoch_end(means | {"head_loss": torch.tensor([0.2, 0.1])})
    assert row["best_head"] == 1
    assert row["head_losses"] == pytest.approx([0.2, 0.1])
    assert row["head_live_clusters"] == [20, 1]
    assert row["head_entropies"][0] == pytest.approx(math.log(20))
    assert row["head_largest_shares"] == pytest.approx([1 / 20, 0.99])
    assert (row["live_clusters"], row["collapsed_heads"], row["collapsed"]) == (1, 1, 1)
    assert (row["largest_share"], row["agreement"]) == pytest.approx((0.99, 0.98))
    assert "head 1 has 1 live clusters of 20" in caplog.text
    assert advice in caplog.text
    assert not method.stop


@pytest.mark.parametrize("stops", [False, True])
def test_training_ends_at_a_collapse_where_that_is_asked_for(stops: bool, caplog: pytest.LogCaptureFixture):
    settings = {"clusters": 20, "preset": "none", "heads": 2, "hidden": 8, "bottleneck": 5, "batch_size": 20}
    settings |= {"epochs": 4, "marginal_momentum": 0.0, "stop_on_collapse": stops}
    method = build(TemiConfig.model_validate(settings), 6, 20, seed=0)
    assert isinstance(method, Temi)
    with torch.no_grad():
        for heads in (method.student, method.teacher):
            heads.scale.zero_()
            heads.scale[:, 0] = 50.0  # one cluster takes all rows on its side, and nothing can take them away
            heads.direction[:, 0] = 0.0
            heads.direction[:, 0, 0] = 1.0
            heads.biases[-1].fill_(5.0)
    trainer = Trainer(0)
    method.fit(ArrayRows(torch.randn(20, 6), (torch.arange(20)[:, None] + torch.arange(1, 4)) % 20), trainer)
    assert trainer.history[0]["collapsed_heads"] == 2
    assert len(trainer.history) == (1 if stops else 4)
    assert caplog.text.count("clusters collapse") == 1, "one line a fit"


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
    return Batch({EMBEDDINGS: x}, torch.arange(B)[rank::world], 0, epoch, weight=world * x.shape[1] / B)


def _means(losses: list[float]) -> dict[str, torch.Tensor]:
    return {"head_loss": torch.tensor(losses), "head_agreement": torch.full((len(losses),), 0.5)}


def _gradients(rank: int, world: int) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Of each loss: what the workers' mean loss is, and each parameter's mean gradient."""
    found = {}
    for loss in ("temi", "pmi", "wmi", "scan"):
        method = _method(loss=loss, entropy_weight=3.0 if loss in ("wmi", "scan") else None)
        batch = _batch(rank, world)
        value = method.training_step(batch)["loss"] * batch.weight
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
    losses = method.training_step(_batch())
    assert losses["loss"].item() == pytest.approx(losses["head_loss"].mean().item())
    losses["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


@pytest.mark.parametrize("loss", ["temi", "pmi", "wmi", "scan"])
def test_one_head_works_with_every_loss(loss: str):
    losses = _method(loss=loss, heads=1).training_step(_batch())
    assert losses["head_loss"].shape == (1,)
    assert losses["loss"].isfinite()


def test_four_views_are_the_mean_of_their_pairs():
    method = _method(marginal_momentum=0.0)
    batch = _batch(views=4)
    value = method.training_step(batch)["loss"]
    shares = method.marginal.shares.clone()
    method.marginal.update = lambda *_: shares.log()  # type: ignore[method-assign]
    # with full trust the pairs' losses only average; TEMI's own weights average as well, so PMI is what to compare
    pmi = _method(loss="pmi", marginal_momentum=0.0)
    pmi.marginal.update = method.marginal.update  # type: ignore[method-assign]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    singles = [pmi.training_step(Batch({EMBEDDINGS: batch.x[list(pair)]}, batch.rows, 0, 0))["loss"] for pair in pairs]
    assert pmi.training_step(batch)["loss"].item() == pytest.approx(torch.stack(singles).mean().item())
    assert value.isfinite()


def test_student_and_teacher_start_equal_and_the_teacher_follows_by_its_momentum():
    method = build(TemiConfig(clusters=K, preset="none", heads=2), D, 50, seed=0)
    assert isinstance(method, Temi)
    start = method.teacher.direction.clone()
    assert start.equal(method.student.direction)
    with torch.no_grad():
        method.student.direction.zero_()
    method.on_step_end(0)
    assert method.teacher.direction.allclose(0.996 * start)


def test_steps_are_those_of_the_published_program():
    """Loss, marginal, warm-up, frozen last layer, decay, AdamW and teacher, from the same heads and batches."""
    shape = {"heads": 2, "hidden": 8, "bottleneck": 5, "batch_size": B, "epochs": 4, "warmup_epochs": 2}
    rates = {"learning_rate": 0.3, "min_learning_rate": 0.3, "weight_decay": 0.1, "final_weight_decay": 0.1}
    config = TemiConfig.model_validate({"clusters": K, "preset": "none", **shape, **rates})
    method = build(config, D, 2 * B, seed=0).double()
    stepper, state = Stepper(method), Heads(config.head_shape(D), 0).double().state_dict()
    students = torch.nn.ModuleList(ClusteringHead(state, head) for head in range(2))
    teachers, shares = copy.deepcopy(students), torch.full((2, K), 1 / K, dtype=torch.float64)
    matrices = [p for p in students.parameters() if p.dim() > 1]
    vectors = {"params": [p for p in students.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": matrices}, vectors], weight_decay=0.1)
    for step in range(8):
        x = torch.randn(2, B, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        found = stepper.step(Batch({EMBEDDINGS: x}, torch.arange(B), step, step // 2, weight=1.0))["loss"]
        with torch.no_grad():
            q_t = torch.stack([(head(x) / 0.1).softmax(-1) for head in teachers])
            shares = 0.9 * shares + 0.1 * q_t.mean((1, 2))
        q_s = torch.stack([(head(x) / 0.1).softmax(-1) for head in students])
        directed = -((q_s * q_t.flip(1)) ** 0.6 / shares[:, None, None]).sum(-1).log()
        loss = ((q_t[:, 0] * q_t[:, 1]).sum(-1).mean(0) * directed).mean()
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * B / 256 * min(step / 3, 1.0)
        optimizer.zero_grad()
        loss.backward()
        for parameter in students.parameters() if step < 2 else ():
            if any(parameter is own for head in students for own in head.last.parameters()):
                parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for follower, leader in zip(teachers.parameters(), students.parameters(), strict=True):
                follower.mul_(0.996).add_(leader, alpha=0.004)
        assert found.item() == pytest.approx(loss.item(), abs=1e-8)
    assert isinstance(method, Temi)
    assert method.teacher(x[0])[1].allclose(teachers[1](x[0]), atol=1e-8)
    assert not method.teacher.direction.equal(Heads(config.head_shape(D), 0).double().direction)


def test_momentum_and_temperature_follow_their_schedules_even_for_few_epochs():
    method = _method(
        epochs=4,
        final_teacher_momentum=1.0,
        warmup_teacher_temperature=0.4,
        warmup_teacher_temperature_epochs=4,
    )
    assert [method.teacher_temperature(epoch) for epoch in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])
    for step, momentum in ((0, 0.996), (method.plan.steps // 2, 0.998)):
        method.on_step_end(step)
        assert method.on_epoch_end(_means([0.3, -0.2, 0.1]))["teacher_momentum"] == pytest.approx(momentum)
    assert _method(epochs=3).teacher_temperature(2) == pytest.approx(0.1)
    assert _method(warmup_teacher_temperature_epochs=0).teacher_temperature(0) == 0.1


def test_groups_hold_every_trainable_parameter_once_the_last_layer_apart():
    method = _method(batch_norm=True, freeze_last_layer=3)
    names = {id(p): name.removeprefix("student.") for name, p in method.named_parameters() if p.requires_grad}
    last, matrices, others = [[names.pop(id(p)) for p in group["params"]] for group in method.parameter_groups()]
    assert (sorted(last), sorted(matrices)) == (["direction", "scale"], ["weights.0", "weights.1"])
    assert not names
    assert {name.partition(".")[0] for name in others} == {"biases", "norms"}
    groups = method.parameter_groups()
    assert [group.get("frozen_epochs", 0) for group in groups] == [3, 0, 0]
    assert [group.get("weight_decay") for group in groups] == [None, None, 0.0]
    assert all(group["stacked"] for group in groups)
    fixed = _method(learn_scale=False)
    assert all(p is not fixed.student.scale for group in fixed.parameter_groups() for p in group["params"])


def test_the_best_head_is_the_one_with_the_lowest_mean_loss_and_its_teacher_predicts():
    method = _method()
    row = method.on_epoch_end(_means([0.3, -0.2, 0.1]))
    assert row["best_head"] == 1
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = (method.teacher(x)[1] / 0.1).softmax(-1)
    assert method.predict_proba(x).allclose(expected)
    assert expected.sum(1).allclose(torch.ones(20, dtype=torch.float64))
    assert method.prototypes().allclose(torch.nn.functional.normalize(method.teacher.direction[1], dim=1))
    with pytest.raises(ShapeError, match="width 5: 6 is needed"):
        method.predict_proba(x[:, :5])


@pytest.mark.parametrize("loss", ["temi", "scan"])
def test_a_loaded_state_is_the_best_head_alone_and_predicts_as_the_method_did(loss: str):
    method = _method(batch_norm=True, loss=loss).float()
    method.on_epoch_end(_means([0.3, 0.4, -0.1]))
    state = method.state()
    loaded = load(state)
    assert isinstance(loaded, Temi)
    x = torch.randn(8, D, generator=torch.Generator().manual_seed(4))
    assert loaded.predict_proba(x).allclose(method.predict_proba(x), rtol=0, atol=1e-6)
    assert state.tensors["weights.0"].shape[0] == loaded.config.heads == 1


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

    method = StartedTemi(TemiConfig(clusters=K, preset="none", heads=2, warm_start="kmeans"), D, 200, seed=0)
    neighbors = torch.stack([torch.arange(200).roll(K * shift) for shift in range(1, 6)], dim=1)  # of the same cluster
    method.fit(ArrayRows(x, neighbors), Stopped())
    for head in method.teacher(x).argmax(-1):
        assert len({(int(a), int(b)) for a, b in zip(head, labels, strict=True)}) == K


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(ConfigError, match=r"method.clusters = 60: must be at most the number of rows, 50"):
        build(TemiConfig(clusters=60), D, 50, seed=0)


def _planted(sizes: list[int], width: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centers = rng.normal(size=(len(sizes), width)) / np.sqrt(width)
    x = centers[labels] + spread * rng.normal(size=(len(labels), width)) / np.sqrt(width)
    x -= x.mean(0)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("sizes", [[60] * 5, [150, 80, 40, 20]], ids=["even", "uneven"])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_clusters_are_found_whatever_their_sizes(sizes: list[int], seed: int):
    x, labels = _planted(sizes, 16, 0.35, seed)
    rows = torch.from_numpy(x)
    ids = torch.arange(len(rows))
    neighbors, _ = top_k(rows, rows, 20, query_ids=ids, database_ids=ids)
    config = TemiConfig(clusters=len(sizes), heads=4, steps=60, hidden=64, bottleneck=32, start_restarts=16)
    method = fit_arrays(rows, neighbors, config, seed)
    assert accuracy(labels, method.predict_proba(rows).argmax(1).numpy()) > 0.97


def test_a_training_that_goes_astray_leaves_the_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    x, labels = _planted([80, 40, 20], 16, 0.35, 0)
    rows, ids, made = torch.from_numpy(x), torch.arange(len(x)), list[int]()
    neighbors, _ = top_k(rows, rows, 20, query_ids=ids, database_ids=ids)
    fast = {"learning_rate": 30.0, "min_learning_rate": 30.0, "teacher_momentum": 0.0, "final_teacher_momentum": 0.0}
    config = TemiConfig(clusters=3, heads=2, steps=20, hidden=32, bottleneck=16, **fast)
    make = temi_start.make_candidates
    monkeypatch.setattr(temi_start, "make_candidates", lambda *a: made.append(1) or make(*a))
    method = fit_arrays(rows, neighbors, config, 0)
    assert "the start is kept" in caplog.text
    assert accuracy(labels, method.predict_proba(rows).argmax(1).numpy()) > 0.97
    assert len(made) == 1  # start, guard and return share the candidates
