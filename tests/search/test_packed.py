from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.search import packed
from rayclust.search.knn import top_k
from rayclust.search.packed import PackedTopK, pack, unpack


def rows_of(kind: str, count: int) -> Tensor:
    """Float32[N 8]: no two alike, or of few directions so that most rows tie, or one row again and again."""
    random = np.random.default_rng(0)
    x = {
        "all different": random.normal(size=(count, 8)),
        "ties": random.integers(-1, 2, size=(count, 8)).astype(float),
        "one row": np.ones((count, 8)),
        "zeros": np.zeros((count, 8)),
    }[kind]
    # Lengths that are powers of two make the products of tied rows the same to the bit.
    lengths = np.linalg.norm(x, axis=1, keepdims=True) if kind == "all different" else 4.0
    return torch.from_numpy((x / lengths).astype(np.float32))


def in_blocks(x: Tensor, ids: Tensor, k: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """All rows as queries of all rows, which come in blocks, to half of the queries in another order."""
    best = PackedTopK(len(x), k)
    everyone = torch.arange(len(x))
    for places, order in ((everyone[::2], everyone), (everyone[1::2], everyone.flip(0))):
        start, turn = 0, 0
        while start < len(x):
            some = order[start : start + sizes[turn % len(sizes)]]
            best.update(places, x[places], ids[places], x[some], ids[some])
            start, turn = start + len(some), turn + 1
    return unpack(best.keys)


@pytest.mark.parametrize("sizes", [[1], [7, 64], [400], [1000]])
@pytest.mark.parametrize("kind", ["all different", "ties", "one row", "zeros"])
def test_the_same_as_exact_search_whatever_the_blocks_and_ties(kind: str, sizes: list[int]):
    x = rows_of(kind, 400)
    ids = torch.from_numpy(np.random.default_rng(1).permutation(400)) * 1000
    found, similarity = in_blocks(x, ids, 6, sizes)
    expected, near = top_k(x, x, 6, query_ids=ids, database_ids=ids)
    assert torch.allclose(similarity, near, atol=1e-6)
    assert (found == expected).float().mean() > (0.999 if kind == "all different" else 0.9999999)


def test_many_scores_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch):
    x, ids = rows_of("ties", 200), torch.arange(200)
    whole = in_blocks(x, ids, 5, [200])
    monkeypatch.setattr(packed, "_SCORES_AT_ONCE", 1)
    assert torch.equal(in_blocks(x, ids, 5, [200])[0], whole[0])


def test_fewer_rows_than_wanted_leave_places_empty():
    x = torch.eye(3)
    best = PackedTopK(3, 4)
    best.update(torch.arange(3), x, torch.arange(3), x[:0], torch.arange(0))
    assert unpack(best.keys)[0].tolist() == [[-1] * 4] * 3
    best.update(torch.arange(3), x, torch.arange(3), x, torch.arange(3))
    ids, similarity = unpack(best.keys)
    assert ids.tolist() == [[1, 2, -1, -1], [0, 2, -1, -1], [0, 1, -1, -1]]
    assert similarity[:, 2:].eq(-torch.inf).all()
    assert similarity[:, :2].eq(0).all()


def test_keys_hold_what_was_packed_and_order_as_neighbours_do():
    ids = torch.tensor([0, 5, 2**32 + 7, 2**37 - 1])
    similarity = torch.tensor([1.0, -1.0, 0.123456789, 0.0])
    found, near = unpack(pack(similarity, ids))
    assert torch.equal(found, ids)
    assert torch.allclose(near, similarity, rtol=0, atol=2**-25)
    assert pack(torch.tensor([0.5, 0.5, 0.25, -0.5]), torch.tensor([3, 9, 0, 1])).diff().lt(0).all()
    assert unpack(pack(torch.tensor([1.25, -1.25]), torch.tensor([1, 2**37 - 1])))[1].tolist() == [1.25, -1.25]
