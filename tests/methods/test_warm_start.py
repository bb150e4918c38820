from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rayclust import collectives
from rayclust.clustering.neighborhood import modularity, modularity_terms
from rayclust.methods import warm_start
from rayclust.methods.heads import Heads, HeadShape
from rayclust.methods.warm_start import StartOptions, best_by_modularity, start_from_kmeans
from rayclust.search.knn import top_k
from rayclust.training.pairs import ArrayRows
from tests.workers import on_two_workers

K = 4
OPTIONS = StartOptions(clusters=K, restarts=6, columns=5, rounds=2)


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
    start_from_kmeans(heads, rows, OPTIONS, seed=0)
    for found in heads(rows.tensor()).argmax(-1):
        assert agreement(labels, found) > 0.97
    assert heads.direction.equal(before[0])
    assert heads.weights[-1].norm(dim=(1, 2)).allclose(before[1])


@pytest.mark.parametrize("part", ["batch_norm", "final_gelu"])
def test_heads_with_other_parts_start_too(part: str):
    _, rows = planted()
    heads = new_heads(**{part: True})
    start_from_kmeans(heads, rows, OPTIONS, seed=0)
    assert heads(rows.tensor()).isfinite().all()


def test_large_sets_start_from_a_sample_with_its_own_neighbours(monkeypatch: pytest.MonkeyPatch):
    labels, rows = planted(400)
    monkeypatch.setattr(warm_start, "SAMPLE_ROWS", 100)
    monkeypatch.setattr(warm_start, "SAMPLE_ROWS_PER_CLUSTER", 1)
    heads = new_heads()
    start_from_kmeans(heads, rows, OPTIONS, seed=0)
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


def test_rows_that_are_all_alike_leave_heads_as_they_are():
    x = torch.ones(20, 8, dtype=torch.float64)
    rows = ArrayRows(x, torch.arange(20).roll(1)[:, None])
    heads = new_heads()
    before = {name: p.detach().clone() for name, p in heads.named_parameters()}
    start_from_kmeans(heads, rows, OPTIONS, seed=0)
    assert all(p.equal(before[name]) for name, p in heads.named_parameters())


def _started(rank: int, world: int) -> list[Tensor]:
    _, rows = planted()
    heads = new_heads()
    start_from_kmeans(heads, rows, OPTIONS, seed=0)
    return [*(p.detach() for p in heads.parameters()), best_by_modularity(heads, rows, 5, seed=0)[1]]


def test_two_workers_start_as_one():
    alone = _started(0, 1)
    for both in on_two_workers(_started):
        for one, other in zip(alone, both, strict=True):
            assert other.allclose(one, rtol=0, atol=1e-10)


def _parts_of_heads(rank: int, world: int) -> dict[str, list[Tensor]]:
    """A start and a choice where workers divide the clusters, and a choice where they divide the heads."""
    _, rows = planted()
    everyone, found = collectives.everyone(), {}
    clusters, few = collectives.stretches(K, world)[rank], collectives.stretches(3, world)[rank]
    shape = HeadShape(3, 8, K, hidden=32, bottleneck=16)
    some = replace(shape, clusters=clusters.stop - clusters.start, first_cluster=clusters.start, all_clusters=K)
    with collectives.sharing_rows(collectives.Team()):
        heads = Heads(some, seed=0).double()
        start_from_kmeans(heads, rows, OPTIONS, seed=0, stack=everyone)
        _, values = best_by_modularity(heads, rows, 5, seed=0, stack=everyone)
        found["clusters"] = [*(p.detach() for p in (*heads.weights, *heads.biases)), values]
        heads = Heads(replace(shape, heads=few.stop - few.start, first=few.start), seed=0).double()
        best, values = best_by_modularity(heads, rows, 5, seed=0, column=everyone)
    return found | {"heads": [torch.tensor(best), values]}


def test_two_workers_with_parts_of_heads_start_and_choose_as_one(monkeypatch: pytest.MonkeyPatch):
    alone = _parts_of_heads(0, 1)
    monkeypatch.setattr(warm_start, "_LOGITS", 7 * 3 * K)  # seven rows at once
    in_blocks = _parts_of_heads(0, 1)
    for found in (*on_two_workers(_parts_of_heads), in_blocks):
        for name, wanted in alone.items():
            for one, other in zip(wanted, found[name], strict=True):
                assert other.allclose(one, rtol=0, atol=1e-10), name
