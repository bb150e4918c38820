from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rayclust.clustering.duplicates import (
    Edges,
    Policy,
    cluster_pairs,
    components,
    decide,
    even_ranges,
    first_of_equal,
    kept_rows,
    near_pairs,
    ranks,
    recall,
    refine,
)
from rayclust.errors import ShapeError
from tests.references import greedy_kept, near_pairs_by_rows

POLICIES: tuple[Policy, ...] = ("component", "semdedup", "greedy")


def edges(*pairs: tuple[int, int, float]) -> Edges:
    i, j, cosine = zip(*pairs, strict=True)
    return Edges.merge([Edges(np.array(i), np.array(j), np.array(cosine, float))])


def random_rows(count: int, width: int, seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)


def found_by_brute_force(x: torch.Tensor, epsilon: float) -> Edges:
    ids = torch.arange(len(x))
    return Edges.merge([near_pairs(x, ids, x, ids, 1 - epsilon, most=None)])


def ordered(order: str) -> NDArray[np.int64]:
    return np.array([order.index(name) for name in "abc"])


@pytest.mark.parametrize(
    ("order", "component", "semdedup", "greedy"),
    [("abc", "a", "a", "ac"), ("acb", "a", "ac", "ac"), ("bac", "b", "b", "b")],
)
def test_three_rows_in_a_chain(order: str, component: str, semdedup: str, greedy: str):
    phi = math.acos(0.97)
    x = torch.tensor([[math.cos(k * phi), math.sin(k * phi)] for k in range(3)])
    near = found_by_brute_force(x, 0.05)
    np.testing.assert_allclose(near.cosine, [0.97, 0.97], atol=1e-6)
    assert float(x[0] @ x[2]) == pytest.approx(0.8818, abs=1e-6)
    for policy, wanted in zip(POLICIES, (component, semdedup, greedy), strict=True):
        kept = kept_rows(near, ordered(order), policy)
        assert "".join(name for name, keep in zip("abc", kept, strict=True) if keep) == wanted, policy


def test_kept_sets_are_nested_and_greedy_covers_what_it_removes():
    for seed in range(20):
        x = random_rows(120, 4, seed)
        near, rank = found_by_brute_force(x, 0.05), np.random.default_rng(seed).permutation(120)
        kept = {policy: kept_rows(near, rank, policy) for policy in POLICIES}
        assert not (kept["component"] & ~kept["semdedup"]).any()
        assert not (kept["semdedup"] & ~kept["greedy"]).any()
        greedy = kept["greedy"]
        np.testing.assert_array_equal(greedy, greedy_kept(near.first, near.second, rank))
        assert not (greedy[near.first] & greedy[near.second]).any()
        rows, none = np.arange(120), np.zeros(120, bool)
        decision = decide(x, near, rows, rank, none, policy="greedy", largest=0.05, epsilon=0.05)
        np.testing.assert_array_equal(decision.kept, greedy)
        keeper = decision.keeper
        assert greedy[keeper].all()
        for row in np.flatnonzero(~greedy):
            assert float(x[row] @ x[keeper[row]]) >= 0.95 - 1e-6


def test_a_long_chain_in_order_ends_and_keeps_every_other_row():
    count = 1001
    chain = Edges(np.arange(count - 1), np.arange(1, count), np.ones(count - 1))
    assert kept_rows(chain, np.arange(count), "greedy").nonzero()[0].tolist() == list(range(0, count, 2))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_chain_in_any_order_is_one_group_by_its_smallest_row(parts: int):
    count = 200
    names = np.random.default_rng(0).permutation(count)
    chain = Edges(names[:-1], names[1:], np.ones(count - 1))
    shuffled = np.random.default_rng(parts).permutation(count - 1)
    merged = Edges.merge(
        Edges(chain.first[some], chain.second[some], chain.cosine[some]) for some in np.array_split(shuffled, parts)
    )
    whole = Edges.merge([chain])
    assert all(getattr(merged, name).tobytes() == getattr(whole, name).tobytes() for name in vars(whole))
    assert (components(merged, count) == 0).all()


def by_clusters(x: torch.Tensor, epsilon: float, probes: int | None) -> tuple[Edges, float]:
    """Edges of rows by the 12 clusters of their nearest rows, and the clusters wanted for each row."""
    centers = x[:12]
    clusters = (x @ centers.T).argmax(1).numpy()
    order = np.argsort(clusters, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(clusters, minlength=12))])
    held = x[torch.from_numpy(order)]
    searches = [
        cluster_pairs(held, bounds, centers, some, epsilon=epsilon, probes=probes) for some in even_ranges(bounds, 100)
    ]
    pairs = [s.pairs for s in searches]
    renamed = Edges.merge(Edges(order[p.first], order[p.second], p.cosine) for p in pairs)
    return renamed, sum(s.wanted for s in searches) / len(x)


def test_probing_finds_every_pair_and_the_own_cluster_alone_does_not():
    x = random_rows(600, 6, 3)
    true = near_pairs_by_rows(x.numpy(), 0.97)
    exact, wanted = by_clusters(x, 0.03, None)
    assert set(zip(exact.first.tolist(), exact.second.tolist(), strict=True)) == true
    assert wanted > 1
    own, _ = by_clusters(x, 0.03, 1)
    missed = 1 - len(own.first) / len(true)
    assert 0.1 < missed < 0.4
    some = np.arange(600)
    assert recall(x, exact, some[::3], 0.03) == 1
    assert recall(x, own, some, 0.03) == pytest.approx(1 - missed)
    assert recall(x[:2], exact, np.array([0]), 1e-6) is None


def test_identical_rows_are_one_group_whatever_the_rounding():
    rows = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float16)
    rows[4] = rows[1]
    rows[5] = rows[1]
    assert first_of_equal([rows]).tolist() == [0, 1, 2, 3, 1, 1]
    assert first_of_equal([rows[:2], rows[2:2], rows[2:]]).tolist() == [0, 1, 2, 3, 1, 1]


def test_a_cosine_at_the_bound_counts_unless_it_is_as_published():
    near = edges((0, 1, 0.75), (1, 2, 0.8))
    assert len(near.within(0.25).first) == 2
    assert len(near.within(0.25, strict=True).first) == 1


def test_the_epsilon_of_a_target_share_is_found_by_bisection():
    # Ten rows, of which three fall out at 0.02, 0.04 and 0.06.
    near, rows, none = edges((0, 1, 0.98), (2, 3, 0.96), (4, 5, 0.94)), np.arange(10), np.zeros(10, bool)
    for share, epsilon in ((0.9, 0.02), (0.8, 0.04), (0.75, 0.06)):
        found = decide(torch.eye(10), near, rows, rows, none, policy="greedy", largest=0.1, keep_share=share)
        assert found.epsilon == pytest.approx(epsilon, abs=1e-6)
        assert found.kept.mean() <= share
    least = decide(torch.eye(10), near, rows, rows, none, policy="greedy", largest=0.1, keep_share=0.4)
    assert least.epsilon == 0.1
    assert least.kept.sum() == 7


def test_the_cap_on_near_rows_is_mended_among_kept_rows(monkeypatch: pytest.MonkeyPatch):
    x = random_rows(1, 16, 0) + 0.01 * random_rows(300, 16, 1)
    x = torch.nn.functional.normalize(x, dim=1)
    ids = torch.arange(300)
    held = near_pairs(x, ids, x, ids, 0.95, most=5)
    assert np.bincount(held.first).max() == 5
    capped, rank = Edges.merge([held]), np.random.default_rng(0).permutation(300)
    assert kept_rows(capped, rank, "greedy").sum() > 1
    mended = refine(x, capped, rank, np.ones(300, bool), policy="greedy", epsilon=0.05)
    assert kept_rows(mended, rank, "greedy").sum() == 1


def test_the_order_of_rows_and_who_stands_for_whom():
    assert ranks(np.array([0.1, 0.3, 0.3, 0.2]), 4).tolist() == [3, 0, 1, 2]
    assert ranks(None, 3).tolist() == [0, 1, 2]
    chain = edges((0, 1, 0.99), (1, 2, 0.98), (3, 4, 0.97))
    rank = np.array([2, 1, 0, 4, 3])
    for policy, wanted in (("component", [2, 2, 2, 4, 4]), ("greedy", [0, 0, 2, 4, 4])):
        rows, none = np.arange(5), np.zeros(5, bool)
        found = decide(torch.eye(5), chain, rows, rank, none, policy=policy, largest=0.05, epsilon=0.05)  # type: ignore[arg-type]
        assert found.keeper.tolist() == wanted, policy


def test_ranges_of_clusters_hold_enough_rows_and_no_cluster_is_lost():
    bounds = np.array([0, 1, 2, 5, 5])
    assert [list(some) for some in even_ranges(bounds, 2)] == [[0, 1], [2], [3]]
    with pytest.raises(ShapeError, match="one more than centers"):
        cluster_pairs(torch.ones(5, 2), bounds, torch.ones(2, 2), range(1), epsilon=0.1)
