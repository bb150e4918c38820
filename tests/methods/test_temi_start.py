from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rayclust.clustering.neighborhood import modularity, modularity_terms
from rayclust.methods import graph, temi_start
from rayclust.methods.base import BaseTrainer, Method
from rayclust.methods.temi import Heads
from rayclust.methods.temi_settings import HeadShape, TemiConfig
from rayclust.methods.temi_start import StartedTemi, best_by_modularity, start_from_kmeans
from rayclust.search.knn import top_k
from rayclust.training.sampling import ArrayRows
from tests.workers import on_two_workers

K = 4
CONFIG = TemiConfig(clusters=K, start_restarts=6, start_neighbors=5, start_rounds=2)


def planted(count: int = 240, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ArrayRows]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % K
    x = torch.eye(K, 8, dtype=dtype)[labels] + 0.2 * torch.randn(count, 8, generator=generator, dtype=dtype)
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    ids = torch.arange(count)
    neighbors, _ = top_k(x, x, 5, query_ids=ids, database_ids=ids)
    return labels, ArrayRows(x, neighbors)


def new_heads(layers: int = 2, **parts: bool) -> Heads:
    return Heads(HeadShape(3, 8, K, hidden=32, bottleneck=16, layers=layers, **parts), seed=0).double()


def agreement(labels: Tensor, found: Tensor) -> float:
    """Share of pairs of rows on which two partitions agree."""
    same, alike = labels[:, None] == labels, found[:, None] == found
    return float((same == alike).double().mean())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_head_says_what_k_means_says_and_keeps_its_last_layer_and_length(layers: int):
    labels, rows = planted()
    heads = new_heads(layers)
    before = heads.direction.detach().clone(), heads.weights[-1].detach().norm(dim=(1, 2))
    start_from_kmeans(heads, rows, CONFIG, seed=0)
    for found in heads(rows.tensor()).argmax(-1):
        assert agreement(labels, found) > 0.97
    assert heads.direction.equal(before[0])
    assert heads.weights[-1].norm(dim=(1, 2)).allclose(before[1])


@pytest.mark.parametrize("part", ["batch_norm", "final_gelu"])
def test_heads_with_other_parts_start_too(part: str):
    _, rows = planted()
    heads = new_heads(**{part: True})
    start_from_kmeans(heads, rows, CONFIG, seed=0)
    assert heads(rows.tensor()).isfinite().all()


def test_heads_start_from_the_partitions_of_highest_modularity(monkeypatch: pytest.MonkeyPatch):
    """Two partitions, the true one and one that cuts across it; the one head takes the first."""
    labels, rows = planted()
    found = [torch.arange(len(labels)).flip(0) % 7 % K, labels]
    monkeypatch.setattr(temi_start.kmeans, "assign", lambda x, centers: (found.pop(0), x.new_zeros(len(x))))
    heads = Heads(HeadShape(1, 8, K, hidden=32, bottleneck=16), seed=0).double()
    start_from_kmeans(heads, rows, CONFIG.model_copy(update={"start_restarts": 2}), seed=0)
    assert not found
    assert agreement(labels, heads(rows.tensor())[0].argmax(-1)) > 0.97


def test_large_sets_start_from_a_sample_with_its_own_neighbours(monkeypatch: pytest.MonkeyPatch):
    labels, rows = planted(400)
    monkeypatch.setattr(graph, "SAMPLE_ROWS", 100)
    monkeypatch.setattr(graph, "SAMPLE_ROWS_PER_CLUSTER", 1)
    heads = new_heads()
    start_from_kmeans(heads, rows, CONFIG, seed=0)
    assert agreement(labels, heads(rows.tensor())[0].argmax(-1)) > 0.97
    best, values = best_by_modularity(heads, rows, 5, seed=0)
    assert values[best] == values.max() > 0.6


def test_choice_is_the_modularity_of_all_rows_when_they_are_few():
    _, rows = planted()
    heads = new_heads()
    found = heads(rows.tensor()).argmax(-1)
    terms = modularity_terms(found, found[:, rows.neighbors()], K)
    best, values = best_by_modularity(heads, rows, 5, seed=0)
    assert values.allclose(modularity(terms))
    assert best == int(values.argmax())


class StartAlone(BaseTrainer):
    """Starts a method where asked for, and takes no step."""

    def __init__(self, starts: bool) -> None:
        super().__init__(0)
        self.starts = starts

    def fit(self, method: Method, data: Any, start: Callable[[], None] | None = None) -> None:
        if self.starts and start is not None:
            start()


@pytest.mark.parametrize("starts", [True, False])
def test_a_head_replaces_the_start_unless_the_graph_speaks_against_it(starts: bool, caplog: pytest.LogCaptureFixture):
    """Heads say what the start says; left at chance they cut through neighbours, and the start comes back."""
    labels, rows = planted()
    config = TemiConfig(clusters=K, preset="none", heads=3, warm_start="auto", start_neighbors=5)
    method = StartedTemi(config, 8, rows.count, seed=0).double()
    method.fit(rows, StartAlone(starts))
    assert ("the start is kept" in caplog.text) is not starts
    assert agreement(labels, method.predict_proba(rows.tensor()).argmax(1)) > 0.97
    assert all(agreement(labels, found) > 0.97 for found in method.predict_heads(rows.tensor()))


def test_rows_that_are_all_alike_leave_heads_as_they_are():
    x = torch.ones(20, 8, dtype=torch.float64)
    rows = ArrayRows(x, torch.arange(20).roll(1)[:, None])
    heads = new_heads()
    before = {name: p.detach().clone() for name, p in heads.named_parameters()}
    start_from_kmeans(heads, rows, CONFIG, seed=0)
    assert all(p.equal(before[name]) for name, p in heads.named_parameters())


def _started(rank: int, world: int) -> list[Tensor]:
    _, rows = planted()
    heads = new_heads()
    start_from_kmeans(heads, rows, CONFIG, seed=0)
    return [*(p.detach() for p in heads.parameters()), best_by_modularity(heads, rows, 5, seed=0)[1]]


def test_two_workers_start_as_one():
    alone = _started(0, 1)
    for both in on_two_workers(_started):
        for one, other in zip(alone, both, strict=True):
            assert other.allclose(one, rtol=0, atol=1e-10)


def test_a_choice_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch):
    _, rows = planted()
    heads = new_heads()
    best, values = best_by_modularity(heads, rows, 5, seed=0)
    monkeypatch.setattr(temi_start, "_MAX_LOGITS", 7 * 3 * K)  # seven rows at once
    found, others = best_by_modularity(heads, rows, 5, seed=0)
    assert best == found
    torch.testing.assert_close(values, others, rtol=0, atol=1e-10)


def test_the_best_partitions_start_the_heads(monkeypatch: pytest.MonkeyPatch):
    """Of k-means partitions with one good among bad ones, as many heads as there are good ones get it first."""
    labels, rows = planted()
    bad = torch.arange(len(labels)) // (len(labels) // K)  # cuts through all planted clusters
    partitions = iter([bad, bad, labels, bad, bad.flip(0), bad])
    monkeypatch.setattr(temi_start.kmeans, "assign", lambda x, centers: (next(partitions), x.new_zeros(len(x))))
    chosen: list[Tensor] = []
    monkeypatch.setattr(temi_start, "solve_last_hidden", lambda heads, x, labels: chosen.append(labels))
    start_from_kmeans(new_heads(), rows, CONFIG, seed=0)
    assert chosen[0][0].equal(labels)
    assert all(not one.equal(labels) for one in chosen[0][1:])


@torch.no_grad()
def test_the_solved_layer_is_that_of_a_plain_ridge_regression():
    """With one layer its input is the rows: weight and bias from the normal equations, at the length they had."""
    labels, rows = planted()
    heads, x = new_heads(layers=1), rows.tensor() + 0.5  # a mean far from zero, so that the bias counts
    length = heads.weights[0][0].norm()
    temi_start.solve_last_hidden(heads, x, labels.expand(3, -1))
    centered, members = x - x.mean(0), torch.nn.functional.one_hot(labels, K).double()
    gram = centered.mT @ centered / len(x)
    ridge = temi_start.RIDGE * gram.diagonal().mean() * torch.eye(8, dtype=x.dtype)
    scores = torch.linalg.solve(gram + ridge, centered.mT @ (members - members.mean(0)) / len(x))
    weight = torch.nn.functional.normalize(heads.direction[0], dim=1).mT @ scores.mT
    weight = weight * length / weight.norm()
    torch.testing.assert_close(heads.weights[0][0], weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(heads.biases[0][0], -weight @ x.mean(0), rtol=1e-6, atol=1e-8)
