from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rayclust.errors import ConfigError
from rayclust.methods import Temi, TemiConfig, build, temi_losses, temi_plan, temi_steps
from rayclust.methods.base import Plan
from rayclust.methods.heads import Heads, HeadShape
from rayclust.methods.temi_plan import Layout, Load, choose, estimate, layouts
from rayclust.training.checkpoints import Every
from rayclust.training.loop import Trainer
from rayclust.training.pairs import ArrayRows
from tests.workers import on_two_workers, on_workers

D, K, B, H, STEPS = 6, 4, 9, 5, 5
KINDS = ("autograd", "chunks", "written out")
IMAGENET = Load(HeadShape(heads=16, dimension=768, clusters=25_000), Plan(1024, 1250, 1250, 0))


class MemoryStore:
    def __init__(self, first: tuple[dict[str, Tensor], dict[str, Any]] | None = None) -> None:
        self.first, self.kept = first, list[tuple[dict[str, Tensor], dict[str, Any]]]()

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.kept.append((tensors, {**state, "history": list(state["history"])}))

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.first is None:
            return None
        # Spawned workers are given tensors in memory that they share.
        return {name: tensor.clone() for name, tensor in self.first[0].items()}, self.first[1]


Kept = tuple[dict[str, Tensor], dict[str, Any]]


def trained(kind: str, parallel: str, start: Kept | None = None, **settings: Any) -> dict[str, Any]:
    """Five epochs of one step each: what every step said, all checkpoints, and the fitted heads."""
    temi_losses.LEAST_LOGITS = 0 if kind == "chunks" else 1 << 60
    temi_steps.LEAST_WORK = 0.0 if kind == "written out" else float("inf")
    written = {"clusters": K, "preset": "none", "heads": H, "hidden": 8, "bottleneck": 5, "batch_size": B}
    written |= {"epochs": STEPS, "neighbors": 3, "learning_rate": 0.3, "warmup_epochs": 1, "weight_decay": 0.1}
    config = TemiConfig.model_validate({**written, "teacher_momentum": 0.5, "parallel": parallel, **settings})
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method, store = build(config, D, B, seed=0).double(), MemoryStore(start)
    assert isinstance(method, Temi)
    trainer = Trainer(3, store=store, every=Every(epochs=2))
    method.fit(ArrayRows(x, (torch.arange(B)[:, None] + torch.arange(1, 4)) % B), trainer)
    history = [{k: v for k, v in row.items() if "second" not in k} for row in trainer.history]
    return {"history": history, "kept": store.kept, "export": method.export(all_heads=True).tensors}


def _all(rank: int, world: int, starts: dict[str, Any], grids: tuple[str, ...]) -> dict[str, Any]:
    found = {(kind, grid): trained(kind, grid) for kind in KINDS for grid in grids}
    return found | {(kind, "resumed"): trained(kind, grids[-1], starts[kind]) for kind in KINDS}


def _assert_close(found: Any, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=1e-10, atol=1e-10, msg=what
    )


def assert_same(found: dict[str, Any], alone: dict[str, Any], what: str) -> None:
    assert len(found["history"]) == STEPS
    for row, wanted in zip(found["history"], alone["history"], strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            _assert_close(row[name], value, f"{what}: {name}")
    for name, tensor in alone["export"].items():
        _assert_close(found["export"][name], tensor, f"{what}: {name}")
    tensors, wanted = found["kept"][-1][0], alone["kept"][-1][0]
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        _assert_close(tensors[name], tensor, f"{what}: checkpoint: {name}")


def test_four_workers_divide_rows_heads_or_both_and_train_as_one(monkeypatch: pytest.MonkeyPatch):
    """Loss of each step, health, checkpoints and heads to 1e-10; heads and rows do not divide evenly."""
    monkeypatch.setattr(temi_losses, "LEAST_LOGITS", 0)  # put back what `trained` sets
    monkeypatch.setattr(temi_steps, "LEAST_WORK", 0.0)
    alone = {kind: trained(kind, "auto") for kind in KINDS}
    grids = ("data", "heads", "2x2")
    starts = {kind: alone[kind]["kept"][0] for kind in KINDS}
    for worker in on_workers(4, _all, starts, grids):
        for (kind, grid), found in worker.items():
            assert_same(found, alone[kind], f"{kind}, {grid}")


def _by_lars(rank: int = 0, world: int = 1) -> dict[str, Any]:
    return trained("autograd", "heads", optimizer="lars", learning_rate=30.0)


def test_lars_takes_the_same_steps_where_heads_are_divided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(temi_losses, "LEAST_LOGITS", 0)  # put back what `trained` sets
    monkeypatch.setattr(temi_steps, "LEAST_WORK", 0.0)
    alone = _by_lars()
    for worker in on_two_workers(_by_lars):
        assert_same(worker, alone, "lars")


def test_parameters_and_operations_are_those_of_the_heads():
    shape = HeadShape(heads=2, dimension=7, clusters=11, hidden=5, bottleneck=3)
    load = Load(shape, Plan(4, 1, 1, 0))
    assert 2 * load.head_parameters == sum(p.numel() for p in Heads(shape, seed=0).parameters())
    # two views; forward twice and back twice, but no gradient of the rows that come in
    assert load.pair_operations == 2 * 2 * (3 * 7 * 5 + 4 * 5 * 3 + 4 * 3 * 11)


def test_the_published_overclustering_has_the_sizes_of_its_paper():
    assert IMAGENET.head_parameters == pytest.approx(6.95e6, rel=0.001)
    alone = estimate(IMAGENET, Layout(1, 1))
    assert alone.state_bytes == pytest.approx(5 * 4 * 16 * 6.95e6, rel=0.001)
    assert alone.sent_bytes == 0
    assert alone.operations == pytest.approx(1.8e12, rel=0.02)
    data, heads = estimate(IMAGENET, Layout(1, 8)), estimate(IMAGENET, Layout(8, 1))
    assert data.sent_bytes == pytest.approx(2 * 7 / 8 * 4 * 16 * 6.95e6, rel=0.01)
    assert heads.sent_bytes < 10_000
    assert heads.state_bytes == alone.state_bytes / 8


def test_large_heads_are_divided_and_small_ones_left_together():
    assert choose(IMAGENET, 1) == Layout(1, 1)
    assert choose(IMAGENET, 8) == Layout(8, 1)
    assert choose(IMAGENET, 32) == Layout(16, 2)  # no more parts than heads
    assert choose(Load(HeadShape(heads=2, dimension=6, clusters=4), Plan(9, 1, 1, 0)), 2) == Layout(1, 2)
    few = Load(HeadShape(heads=5, dimension=768, clusters=25_000), Plan(1024, 1, 1, 0))
    assert choose(few, 4) in layouts(few, 4)


def test_a_layout_can_be_asked_for():
    assert choose(IMAGENET, 4, "data") == Layout(1, 4)
    assert choose(IMAGENET, 4, "heads") == Layout(4, 1)
    assert choose(IMAGENET, 4, "2x2") == Layout(2, 2)
    assert choose(IMAGENET, 4, "clusters") == Layout(1, 1, 4)
    assert choose(IMAGENET, 12, "2x2x3") == Layout(2, 2, 3)
    with pytest.raises(ConfigError, match=r"method\.parallel = 2x3: is for 6 workers, there are 4"):
        choose(IMAGENET, 4, "2x3")
    with pytest.raises(ConfigError, match="16 heads cannot be divided over 32 workers"):
        choose(IMAGENET, 32, "heads")


def _large(heads: int, clusters: int = 10_000_000) -> Load:
    return Load(HeadShape(heads=heads, dimension=768, clusters=clusters), Plan(1024, 1, 1, 0))


def test_clusters_are_divided_only_where_a_head_does_not_fit_and_into_as_few_parts_as_fit():
    assert estimate(_large(1), Layout(1, 1)).held_bytes > 80e9
    for workers in (6, 8, 16, 64):
        found = choose(_large(1), workers, memory=24e9)
        assert found.cluster_parts > 1
        assert estimate(_large(1), found).held_bytes <= 24e9
        for parts in range(1, found.cluster_parts):
            fewer = layouts(_large(1), workers, parts) if workers % parts == 0 else []
            assert all(estimate(_large(1), layout).held_bytes > 24e9 for layout in fewer)
    assert choose(_large(16), 128, memory=24e9) == Layout(16, 1, 8)
    assert choose(_large(1), 8, memory=100e9) == Layout(1, 8)
    assert choose(_large(16), 1, memory=24e9) == Layout(1, 1)  # one worker has nothing to choose
    assert choose(_large(16, 1_000_000), 2, memory=24e9) == Layout(2, 1)  # a head fits, though eight do not


def test_a_part_of_a_head_has_its_share_of_parameters_and_the_whole_of_the_layers_before():
    alone, divided = (estimate(_large(1), layout) for layout in (Layout(1, 1), Layout(1, 1, 8)))
    inner = 768 * 512 + 512 + 512 * 256 + 256
    assert divided.state_bytes == 5 * 4 * (inner + 10_000_000 // 8 * 257)
    assert divided.sent_bytes < 4e6  # features' gradient and numbers of each pair, no logits
    assert divided.operations == pytest.approx(alone.operations / 8, rel=0.01)
    rows = estimate(_large(1), Layout(1, 2, 4))
    assert rows.sent_bytes == pytest.approx(4 * (inner + 2_500_000 * 258) + 4 * 512 * (2 * 256 * 1.5 + 7 * 3))


@pytest.mark.parametrize(
    ("load", "workers", "wanted", "whole_for", "message"),
    [
        (IMAGENET, 4, "1x2x3", None, "method.parallel = 1x2x3: is for 6 workers, there are 4; set resources.workers"),
        (_large(1, 3), 4, "clusters", None, "3 clusters cannot be divided over 4 workers; use fewer, or data"),
        (IMAGENET, 4, "1x2x2", "clip_norm", "clip_norm needs whole heads on every worker, set data"),
        (_large(1), 8, "auto", "optimizer = lars", "optimizer = lars needs whole heads; do without it"),
        (_large(1), 2, "auto", None, "a worker has 24, and 2 workers cannot hold H = 1 of them; use more workers"),
    ],
)
def test_divisions_that_cannot_be_are_refused_in_a_line(
    load: Load, workers: int, wanted: str, whole_for: str | None, message: str
):
    with pytest.raises(ConfigError) as caught:
        choose(load, workers, wanted, 24e9, whole_for)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_layout_gives_each_worker_a_head_and_a_pair():
    small = Load(HeadShape(heads=3, dimension=8, clusters=4), Plan(2, 1, 1, 0))
    assert layouts(small, 6) == [Layout(3, 2)]
    assert layouts(small, 2) == [Layout(1, 2), Layout(2, 1)]
    assert layouts(small, 7) == []
    assert layouts(small, 4, 2) == [Layout(1, 2, 2), Layout(2, 1, 2)]
    assert choose(small, 7) == Layout(1, 7)  # refused later, where the batch is known to be too small


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(1, 1), "one worker"),
        (Layout(1, 4), "rows of a batch over 4 workers"),
        (Layout(4, 1), "heads over 4 workers"),
        (Layout(2, 3), "heads over 2 and rows of a batch over 3 workers"),
        (Layout(1, 1, 4), "clusters over 4 workers"),
        (Layout(1, 2, 4), "rows of a batch over 2 and clusters over 4 workers"),
        (Layout(2, 3, 2), "heads over 2, rows of a batch over 3 and clusters over 2 workers"),
    ],
)
def test_an_outlook_says_the_layout_and_its_load(layout: Layout, words: str):
    text = temi_plan.outlook(IMAGENET, layout, "cuda")
    assert text.startswith(words + ": ")
    assert "GB of weights and optimiser" in text
