from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rayclust.errors import ConfigError, ShapeError
from rayclust.kernels.screening import screen
from rayclust.search import knn
from rayclust.search.knn import RunningTopK, TopKInt64, agreeing_neighbors, pack_keys, top_k, unpack_keys
from tests.references import nearest_rows


def unit_rows(count: int, width: int, seed: int = 0) -> Tensor:
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


def grid(side: int) -> Tensor:
    """Points of a square grid on a sphere's cap, unit rows: neighbours of a point are often equally near."""
    a, b = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x = torch.stack([a.flatten(), b.flatten(), torch.full((side * side,), side)], 1).float()
    return torch.nn.functional.normalize(x, dim=1)


def equal_up_to_draws(ids: Tensor, similarity: Tensor, expected: list[list[tuple[float, int]]], tolerance=1e-6) -> None:
    """Each list holds the same similarities, and the same ids but for those that tie with its last."""
    for found, values, truth in zip(ids.tolist(), similarity.tolist(), expected, strict=True):
        assert np.allclose(values, [s for s, _ in truth], atol=tolerance)
        cut = truth[-1][0] + 2 * tolerance
        assert {i for i, s in zip(found, values, strict=True) if s > cut} == {i for s, i in truth if s > cut}
        assert len(set(found)) == len(found)


def test_worked_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    ids, similarity = top_k(x, x, 2, query_ids=torch.arange(4))
    assert ids.tolist() == [[1, 2], [2, 0], [1, 0], [2, 1]]
    expected = torch.tensor([[0.6, 0.0], [0.8, 0.6], [0.8, 0.0], [0.0, -0.6]])
    assert torch.allclose(similarity, expected)


@pytest.mark.parametrize("side", [3, 7, 12])
def test_no_row_of_a_grid_finds_itself_whatever_the_blocks(side: int):
    x = grid(side)
    count = len(x)
    expected = nearest_rows(x.double().numpy(), x.double().numpy(), 8, list(range(count)), list(range(count)))
    for block in [1, 2, 5, 64, count - 1, count, count + 1, None]:
        ids, similarity = top_k(x, x, 8, query_ids=torch.arange(count), block=block)
        assert not (ids == torch.arange(count)[:, None]).any()
        equal_up_to_draws(ids, similarity, expected)


def test_queries_and_database_beyond_the_inner_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 13)
    monkeypatch.setattr(knn, "_SCORES_ON_CPU", 300)
    x = unit_rows(150, 6)
    expected = nearest_rows(x.double().numpy(), x.double().numpy(), 5, list(range(150)), list(range(150)))
    equal_up_to_draws(*top_k(x, x, 5, query_ids=torch.arange(150)), expected)


@pytest.mark.parametrize("block", [1, 7, 50, None])
def test_ids_of_any_order_and_foreign_queries(block: int | None):
    x, queries = unit_rows(120, 5), unit_rows(9, 5, seed=1)
    ids = torch.randperm(10**6, generator=torch.Generator().manual_seed(0))[:120]
    expected = nearest_rows(queries.double().numpy(), x.double().numpy(), 20, [-1] * 9, ids.tolist())
    equal_up_to_draws(*top_k(queries, x, 20, database_ids=ids, block=block), expected)
    own = ids[:9]
    expected = nearest_rows(x[:9].double().numpy(), x.double().numpy(), 20, own.tolist(), ids.tolist())
    equal_up_to_draws(*top_k(x[:9], x, 20, query_ids=own, database_ids=ids, block=block), expected)


@pytest.mark.parametrize("block", [1, 3, 4, 10, None])
def test_ties_go_to_the_smaller_id(block: int | None):
    # Whole numbers have exact products: rows 0 and 5 … are equal, and only ids can order them.
    x = torch.eye(5)[torch.arange(40) % 5]
    ids, similarity = top_k(x, x, 10, query_ids=torch.arange(40), block=block)
    for row in range(40):
        same = [i for i in range(40) if i % 5 == row % 5 and i != row]
        other = [i for i in range(40) if i % 5 != row % 5]
        assert ids[row].tolist() == (same + other)[:10]
    assert similarity[0].tolist() == [1.0] * 7 + [0.0] * 3
    backward = torch.arange(39, -1, -1)
    turned, _ = top_k(x[backward], x[backward], 10, query_ids=backward, database_ids=backward, block=block)
    assert torch.equal(turned, ids[backward])


def test_equal_copies_everywhere():
    x = torch.ones(300, 1)
    ids, _ = top_k(x, x, 3, query_ids=torch.arange(300), block=97)
    assert ids[:4].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert (ids[4:] == torch.arange(3)).all()


def test_streamed_in_any_order_with_blocks_narrower_than_k():
    x = unit_rows(60, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    best = RunningTopK(x[:10], torch.arange(10), 12)
    for part in order.split(5):
        best.update(x[part], part)
    ids, similarity = best.result()
    expected, values = top_k(x[:10], x, 12, query_ids=torch.arange(10))
    assert torch.equal(ids, expected)
    assert torch.allclose(similarity, values)


def test_fewer_rows_than_asked_end_in_minus_one():
    x = unit_rows(4, 3)
    best = RunningTopK(x, torch.arange(4), 5)
    best.update(x, torch.arange(4))
    ids, similarity = best.result()
    assert (ids[:, 3:] == -1).all()
    assert (similarity[:, 3:] == -torch.inf).all()
    assert (ids[:, :3].sort(dim=1)[0] == torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])).all()


def test_half_precision_rows_are_compared_in_float32():
    x = unit_rows(50, 16).half()
    ids, similarity = top_k(x, x, 5, query_ids=torch.arange(50))
    expected, values = top_k(x.float(), x.float(), 5, query_ids=torch.arange(50))
    assert torch.equal(ids, expected)
    assert torch.equal(similarity, values)


def test_no_queries():
    ids, similarity = top_k(torch.zeros(0, 3), unit_rows(5, 3), 2)
    assert ids.shape == similarity.shape == (0, 2)


@pytest.mark.gpu
def test_gpu_finds_what_the_cpu_finds():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = unit_rows(3000, 32)
    ids = torch.arange(3000)
    expected = nearest_rows(x[:50].double().numpy(), x.double().numpy(), 10, list(range(50)), list(range(3000)))
    found, similarity = top_k(x[:50].cuda(), x.cuda(), 10, query_ids=ids[:50], block=777)
    equal_up_to_draws(found.cpu(), similarity.cpu(), expected)


def test_refuses_what_cannot_be():
    x = unit_rows(5, 3)
    with pytest.raises(ConfigError, match="k = 5: at most 4 of 5 rows"):
        top_k(x, x, 5, query_ids=torch.arange(5))
    assert top_k(x, x, 5)[0].shape == (5, 5)
    with pytest.raises(ConfigError, match="k = 0"):
        top_k(x, x, 0)
    with pytest.raises(ShapeError, match="width 3"):
        top_k(x[:, :2], x, 1)
    with pytest.raises(ShapeError, match="one id for each of 5 queries"):
        top_k(x, x, 1, query_ids=torch.arange(4))
    with pytest.raises(ShapeError, match="one id for each of 5 rows"):
        RunningTopK(x, None, 1).update(x, torch.arange(4))


def screened(count: int, k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Neighbours of rows in tight groups by way of bf16 products, and by float32 products alone; ids in any order."""
    monkeypatch.setattr(knn, "has_fast_bf16", lambda device: True)
    x = unit_rows(40, 64)[torch.arange(count) % 40] + 0.3 * unit_rows(count, 64, seed=1)
    x = torch.nn.functional.normalize(x, dim=1)
    x[count // 2 :: 7] = x[: len(x[count // 2 :: 7])].clone()  # equal rows far from each other
    ids = torch.randperm(10**6, generator=torch.Generator().manual_seed(0))[:count]
    found = [top_k(x, x, k, query_ids=ids, database_ids=ids, block=block)]
    monkeypatch.setattr(knn, "has_fast_bf16", lambda device: False)
    return [*found, top_k(x, x, k, query_ids=ids, database_ids=ids, block=block)]


@pytest.mark.parametrize("block", [1400, 3000])
def test_screened_rows_are_those_of_float32_products(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knn, "_SCREENED_ROWS", 1024)
    monkeypatch.setattr(knn, "_SCREENED_QUERIES", 600)
    monkeypatch.setattr(knn, "_MAX_WAITING", 50_000)
    called = []
    monkeypatch.setattr(knn, "screen", lambda *given: called.append(1) or screen(*given))
    (ids, similarity), (expected, near) = screened(3000, 20, block, monkeypatch)
    assert called
    assert torch.allclose(similarity, near, rtol=0, atol=1e-6)
    differ = ids != expected
    # Only rows that tie but for the rounding of float32 may change places.
    assert bool((near - similarity)[differ].abs().max() < 1e-6) if differ.any() else True
    assert differ.float().mean() < 0.02


def test_rows_that_rounding_cannot_tell_apart_are_compared_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knn, "has_fast_bf16", lambda device: True)
    x = torch.nn.functional.normalize(1.0 + 1e-4 * unit_rows(1500, 64), dim=1)
    ids, similarity = top_k(x, x, 5, query_ids=torch.arange(1500))
    monkeypatch.setattr(knn, "has_fast_bf16", lambda device: False)
    expected, near = top_k(x, x, 5, query_ids=torch.arange(1500))
    assert torch.equal(ids, expected)
    assert torch.equal(similarity, near)


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


def test_nearest_others_are_by_angle_and_not_the_row_itself():
    x = torch.tensor([[9.0, 0.1], [1.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    assert knn.nearest_others(x, 2).tolist() == [[1, 3], [0, 3], [3, 0], [0, 1]]


def in_blocks(x: Tensor, ids: Tensor, k: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """All rows as queries of all rows, which come in blocks, to half of the queries in another order."""
    best = TopKInt64(len(x), k)
    everyone = torch.arange(len(x))
    for places, order in ((everyone[::2], everyone), (everyone[1::2], everyone.flip(0))):
        start, turn = 0, 0
        while start < len(x):
            some = order[start : start + sizes[turn % len(sizes)]]
            best.update(places, x[places], ids[places], x[some], ids[some])
            start, turn = start + len(some), turn + 1
    return unpack_keys(best.keys)


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
    monkeypatch.setattr(knn, "_KEYED_SCORES_AT_ONCE", 1)
    assert torch.equal(in_blocks(x, ids, 5, [200])[0], whole[0])


def test_fewer_rows_than_wanted_leave_places_empty():
    x = torch.eye(3)
    best = TopKInt64(3, 4)
    best.update(torch.arange(3), x, torch.arange(3), x[:0], torch.arange(0))
    assert unpack_keys(best.keys)[0].tolist() == [[-1] * 4] * 3
    best.update(torch.arange(3), x, torch.arange(3), x, torch.arange(3))
    ids, similarity = unpack_keys(best.keys)
    assert ids.tolist() == [[1, 2, -1, -1], [0, 2, -1, -1], [0, 1, -1, -1]]
    assert similarity[:, 2:].eq(-torch.inf).all()
    assert similarity[:, :2].eq(0).all()


def test_keys_hold_what_was_packed_and_order_as_neighbours_do():
    ids = torch.tensor([0, 5, 2**32 + 7, 2**37 - 1])
    similarity = torch.tensor([1.0, -1.0, 0.123456789, 0.0])
    found, near = unpack_keys(pack_keys(similarity, ids))
    assert torch.equal(found, ids)
    assert torch.allclose(near, similarity, rtol=0, atol=2**-25)
    assert pack_keys(torch.tensor([0.5, 0.5, 0.25, -0.5]), torch.tensor([3, 9, 0, 1])).diff().lt(0).all()
    assert unpack_keys(pack_keys(torch.tensor([1.25, -1.25]), torch.tensor([1, 2**37 - 1])))[1].tolist() == [
        1.25,
        -1.25,
    ]


def test_neighbors_that_all_spaces_list_by_hand():
    ids = [torch.tensor([[4, 1, 2, 7], [0, 2, 3, 5]]), torch.tensor([[1, 7, 3, 4], [8, 9, 6, 2]])]
    cosines = [torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]])] * 2
    # Row 0: 1 has (.8 + .9) / 2, 4 (.9 + .6) / 2, 7 (.6 + .8) / 2. Row 1: 2 alone, then 0 and 8, which one list has.
    found, mean = agreeing_neighbors(ids, cosines, k=4)
    assert found.tolist() == [[1, 4, 7, -1], [2, 0, 8, -1]]
    torch.testing.assert_close(mean, torch.tensor([[0.85, 0.75, 0.7, -1], [0.7, 0.9, 0.9, -1]]))
    assert agreeing_neighbors(ids, cosines, k=2)[0].tolist() == [[1, 4], [2, 0]]
    assert agreeing_neighbors(ids, cosines, k=4, least=0)[0].tolist() == [[1, 4, 7, -1], [2, -1, -1, -1]]
    one = agreeing_neighbors([ids[0][:, :1]] * 2, [cosines[0][:, :1]] * 2, k=3)
    assert one[0].tolist() == [[4, -1, -1], [0, -1, -1]]
