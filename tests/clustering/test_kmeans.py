from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from rayclust.clustering import kmeans, row_stats, seeding
from rayclust.clustering.kmeans import KMeansResult, Partitions, half_squares, in_parts, nearest
from rayclust.clustering.seeding import kmeans_plusplus
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.features import FeatureTransform
from rayclust.metrics import external
from rayclust.settings import KMeansOptions, Metric
from tests.clustering.sharded import LINE, moved, planted
from tests.references import greedy_seeds, lloyd


def fitted(x: Tensor, block: int = 10**9, seed: int = 0, init: Tensor | None = None, **options) -> KMeansResult:
    return kmeans.fit(lambda: x.split(block), KMeansOptions(**options), seed=seed, init=init)


def test_worked_by_hand_on_a_line():
    # 0 1 2 | 9 10 11 14 from centres 0 and 2: {0,1} {2,9,10,11,14} → ½, 9.2; {0,1,2} {9,10,11,14} → 1, 11; stays.
    x = torch.tensor([[0.0], [1], [2], [9], [10], [11], [14]])
    result = fitted(x, clusters=2, metric="euclidean", init=torch.tensor([[0.0], [2]]))
    assert result.centers.flatten().tolist() == pytest.approx([1.0, 11.0])
    assert result.inertia == pytest.approx(1 + 0 + 1 + 4 + 1 + 0 + 9)
    assert result.n_iter == 3
    assert result.converged


def test_every_start_gives_its_own_partition():
    # The same line, far from zero, from two pairs of centres in opposite order.
    x = 1000 + torch.tensor([[0.0], [1], [2], [9], [10], [11], [14]])
    options = KMeansOptions(clusters=2, metric="euclidean")
    labels, inertia = kmeans.fit_all(x, options, 0, 1000 + torch.tensor([[[0.0], [2]], [[14], [0]]]))
    assert labels.tolist() == [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]
    assert inertia.tolist() == pytest.approx([16 / 7, 16 / 7])


def test_directions_worked_by_hand():
    # Lengths play no part: two rows lie along each axis, and the bisectors' cosines to them are known.
    x = torch.tensor([[3.0, 0.3], [0.5, -0.05], [0.1, 1.0], [-4.0, 40.0]])
    result = fitted(x, clusters=2, metric="cosine", init=torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert torch.allclose(result.centers, torch.eye(2), atol=1e-6)
    assert result.inertia == pytest.approx(4 * 2 * (1 - 10 / np.sqrt(101)), rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("clusters", [2, 7, 40])
def test_euclidean_agrees_with_scikit_learn_from_the_same_centres(clusters: int, offset: float):
    x = planted(1500, 7, offset=offset)
    init = x[:clusters].clone()
    result = fitted(x, 400, clusters=clusters, metric="euclidean", init=init)
    theirs = KMeans(clusters, init=init.numpy(), n_init=1).fit(x.numpy())
    labels, distances = kmeans.assign(x, result.centers)
    # Far from zero float32 centres are coarse, and a row half-way between two may go to either.
    assert (labels.numpy() != theirs.labels_).sum() <= (3 if offset else 0)
    assert abs(result.n_iter - theirs.n_iter_) <= (2 if offset else 0)
    assert result.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    assert distances.sum().item() == pytest.approx(theirs.inertia_, rel=1e-4)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_agrees_with_the_slow_form(metric: Metric, dtype: torch.dtype):
    x = planted(300, 5, dtype=dtype)
    init = x[10:15].to(torch.float32 if dtype == torch.float16 else dtype)
    result = fitted(x, 64, clusters=5, metric=metric, tolerance=0, init=init)
    centers, labels, inertia = lloyd(x.double().numpy(), init.double().numpy(), metric)
    rows = torch.nn.functional.normalize(x.to(init.dtype), dim=1) if metric == "cosine" else x.to(init.dtype)
    assert np.array_equal(kmeans.assign(rows, result.centers)[0], labels)
    assert np.allclose(result.centers, centers, atol=1e-5)
    assert result.inertia == pytest.approx(inertia, rel=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("block", [1, 17, 256, 299])
def test_blocks_of_any_size_equal_the_whole(metric: Metric, block: int):
    x = planted(300, 12)
    whole = fitted(x, clusters=12, metric=metric, restarts=3)
    parts = fitted(x, block, clusters=12, metric=metric, restarts=3)
    assert torch.allclose(parts.centers, whole.centers, atol=1e-6)
    assert parts.inertia == pytest.approx(whole.inertia, rel=1e-6)
    assert (parts.n_iter, parts.converged) == (whole.n_iter, whole.converged)


def test_restarts_do_not_touch_each_other():
    x = planted(400, 9)
    three = fitted(x, clusters=9, restarts=3, seed=5)
    assert fitted(x, clusters=9, restarts=1, seed=5).inertia == pytest.approx(three.inertias[0])
    assert three.inertia == min(three.inertias)


def test_order_of_rows_does_not_matter():
    x = planted(500, 6)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    a = fitted(x, clusters=6, init=x[:6])
    b = fitted(x[order], clusters=6, init=x[:6])
    assert torch.allclose(a.centers, b.centers, atol=1e-6)


def test_empty_clusters_move_to_the_farthest_rows():
    # All rows go to the first centre. The farthest rows, 20 and then −8, move into clusters 1 and 2; 0…4 stay.
    x = torch.tensor([[0.0], [1], [2], [3], [4], [20], [-8]], dtype=torch.float64)
    init = torch.tensor([[2.0], [1000], [2000]], dtype=torch.float64)
    result = fitted(x, clusters=3, metric="euclidean", init=init)
    assert result.centers.flatten().tolist() == pytest.approx([2.0, 20.0, -8.0])
    theirs = KMeans(3, init=init.numpy(), n_init=1).fit(x.numpy())
    assert result.inertia == pytest.approx(theirs.inertia_)


def test_no_cluster_stays_empty_where_rows_differ():
    x = planted(60, 3)
    result = fitted(x, clusters=40, metric="euclidean", init=x[:1].repeat(40, 1))
    assert len(kmeans.assign(x, result.centers)[0].unique()) == 40


def test_fewer_distinct_rows_than_clusters():
    x = torch.tensor([[1.0, 0], [0, 1]]).repeat(5, 1)
    result = fitted(x, clusters=4, restarts=2)
    assert result.inertia == pytest.approx(0.0, abs=1e-6)
    assert bool(result.centers.isfinite().all())


def test_as_many_clusters_as_rows():
    x = planted(6, 3)
    result = fitted(x, clusters=6, metric="euclidean")
    assert sorted(kmeans.assign(x, result.centers)[0].tolist()) == list(range(6))
    assert result.inertia == pytest.approx(0.0, abs=1e-4)


def test_a_zero_row_is_no_trouble():
    x = torch.cat([planted(50, 3), torch.zeros(1, 8)])
    result = fitted(x, clusters=3)
    assert torch.allclose(result.centers.norm(dim=1), torch.ones(3))


def test_goes_on_from_any_state():
    x = planted(700, 10)
    options = KMeansOptions(clusters=10, restarts=3)
    stats = row_stats.compute(lambda: x.split(128), "cosine")
    states = [kmeans.start(stats, options, seed=2)]
    states += list(kmeans.advance(stats, options, states[0]))
    whole = kmeans.finish(stats, states[-1])
    for state in states[:: max(1, len(states) // 4)]:
        last = kmeans.KMeansState(**{name: value.clone() for name, value in vars(state).items()})
        for reached in kmeans.advance(stats, options, last):
            last = reached
        result = kmeans.finish(stats, last)
        assert torch.allclose(result.centers, whole.centers, atol=1e-6)
        assert (result.n_iter, result.converged) == (whole.n_iter, whole.converged)


def test_inertia_never_rises():
    x = planted(500, 10)
    stats = row_stats.compute(lambda: [x], "cosine")
    options = KMeansOptions(clusters=10, restarts=4)
    inertias = torch.stack([s.inertia for s in kmeans.advance(stats, options, kmeans.start(stats, options, 0))])
    assert bool((inertias.diff(dim=0) <= 1e-4).all())


def test_stops_after_max_iterations():
    result = fitted(planted(500, 10), clusters=10, restarts=2, max_iterations=2)
    assert result.n_iter == 2
    assert not result.converged


def test_ties_go_to_the_smaller_id():
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 0.0]])
    labels, distances = kmeans.assign(x, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    assert labels.tolist() == [0, 0, 1]
    assert distances.tolist() == pytest.approx([2.0, 2.0, 1.0])


def test_refuses_what_cannot_be():
    x = planted(5, 2)
    with pytest.raises(ConfigError, match="clusters = 6: at most the number of rows, 5"):
        fitted(x, clusters=6)
    with pytest.raises(DataError, match="NaN"):
        fitted(torch.full((5, 2), torch.nan), clusters=2)
    with pytest.raises(DataError, match="rows = 0"):
        fitted(x[:0], clusters=2)
    with pytest.raises(ShapeError, match="init has shape"):
        fitted(x, clusters=2, init=x[:2, :3])
    with pytest.raises(ShapeError, match="width"):
        kmeans.assign(x, x[:2, :3])


def test_reaches_what_is_known_of_real_features(shared_data):
    features = np.load(shared_data / "imagenette_val3k" / "features_mnv2a_f16.npy")
    truth = np.load(shared_data / "imagenette_val3k" / "labels.npy")
    x = torch.from_numpy(FeatureTransform.fitted(features, center=True, standardize=False, normalize=True)(features))
    result = fitted(x, clusters=10)
    labels = kmeans.assign(x, result.centers)[0].numpy()
    assert external.accuracy(truth, labels) > 0.92
    assert external.nmi(truth, labels) > 0.865


ZERO = torch.zeros(4, dtype=torch.float64)


def rows_and_centers(restarts: int = 3, clusters: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 4, generator=generator), torch.randn(restarts, clusters, 4, generator=generator)


def slow_sums(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    members = torch.nn.functional.one_hot(labels, clusters).double()  # [N R K]
    return torch.einsum("nrk,nd->rkd", members, x.double()), members.sum(0).long()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_nearest_is_the_least_distance(offset: float):
    x, centers = rows_and_centers()
    origin = torch.full((4,), offset, dtype=torch.float64)
    far = x + offset
    scores, labels = nearest(far, centers, half_squares(centers, origin))
    distances = (x[:, None, None].double() - centers.double()).square().sum(-1)
    assert torch.equal(labels, distances.argmin(-1))
    squares = x.double().square().sum(1, keepdim=True)
    assert torch.allclose(squares - 2 * scores, distances.min(-1)[0], atol=1e-2 if offset else 1e-5)


def test_of_equally_near_centres_the_first_is_taken():
    centers = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]])
    bias = half_squares(centers, torch.zeros(2, dtype=torch.float64))
    assert nearest(torch.tensor([[0.0, 3.0], [2.0, 0.0], [-2.0, 0.0]]), centers, bias)[1].tolist() == [[0], [0], [1]]


@pytest.mark.parametrize("by_product", [False, True, None])
@pytest.mark.parametrize("block", [1, 33, 300])
def test_sums_stay_right_while_centres_move(by_product: bool | None, block: int, monkeypatch: pytest.MonkeyPatch):
    if by_product is not None:
        add = Partitions._add
        monkeypatch.setattr(Partitions, "_add", lambda *moved, **_: add(*moved, by_product=by_product))
    monkeypatch.setattr(kmeans, "_MOVED_AT_ONCE", 7)
    monkeypatch.setattr(kmeans, "_MULTIPLIED_AT_ONCE", 50)
    x, centers = rows_and_centers()
    partitions = Partitions(centers)
    for step in range(4):
        shifted = centers + 0.3 * step
        sums, counts, total = partitions.assign_and_sum(lambda: x.split(block), shifted, ZERO)
        scores, labels = nearest(x, shifted, half_squares(shifted, ZERO))
        expected = slow_sums(x, labels, 5)
        assert torch.allclose(sums, expected[0], atol=1e-12)
        assert torch.equal(counts, expected[1])
        assert torch.allclose(total, scores.double().sum(0), rtol=1e-5)
        assert torch.equal(torch.cat(partitions.labels).long(), labels)


def test_both_ways_to_add_agree_and_are_both_taken(monkeypatch: pytest.MonkeyPatch):
    taken, add = list[bool](), Partitions._add
    monkeypatch.setattr(
        Partitions, "_add", lambda *a, by_product: (taken.append(by_product), add(*a, by_product=by_product))
    )
    x, centers = rows_and_centers()
    partitions = Partitions(centers)
    for step in (0.0, 0.01):
        sums, _, _ = partitions.assign_and_sum(lambda: [x], centers + step, ZERO)
    assert taken == [True, False]
    labels = nearest(x, centers + 0.01, half_squares(centers + 0.01, ZERO))[1]
    assert torch.allclose(sums, slow_sums(x, labels, 5)[0], atol=1e-12)


def test_dropped_partitions_leave_the_others_as_they_were():
    x, centers = rows_and_centers()
    partitions = Partitions(centers)
    partitions.assign_and_sum(lambda: x.split(60), centers, ZERO)
    chosen = torch.tensor([True, False, True])
    partitions.keep(chosen)
    sums, counts, _ = partitions.assign_and_sum(lambda: x.split(60), centers[chosen] + 0.2, ZERO)
    labels = nearest(x, centers[chosen] + 0.2, half_squares(centers[chosen] + 0.2, ZERO))[1]
    expected = slow_sums(x, labels, 5)
    assert torch.allclose(sums, expected[0], atol=1e-12)
    assert torch.equal(counts, expected[1])


def test_parts_hold_all_rows_in_order_as_wide_floats():
    x = torch.arange(20_000, dtype=torch.float64)[:, None]
    parts = list(in_parts(lambda: x.split(9000), columns=2000))
    assert torch.equal(torch.cat(parts), x)
    assert max(len(part) for part in parts) * 2000 <= max(2**20, 256 * 2000)
    assert [part.dtype for part in in_parts(lambda: [x[:5].half()], 1)] == [torch.float32]
    assert np.array_equal([len(part) for part in in_parts(lambda: [x[:0]], 1)], [0])


def test_relocation_worked_by_hand():
    # Centre 1 has all rows; 9 is farthest, then the first of the two at −5. The empty clusters 0 and 2 get them.
    for block in (1, 3, 100):
        sums, counts = moved(LINE, torch.tensor([[[100.0], [1.0], [200.0]]]), block)
        assert counts.tolist() == [[1, 5, 1]]
        assert torch.allclose(sums.flatten(), torch.tensor([9.0, 1.0, -5.0], dtype=torch.float64))


def test_each_partition_has_its_own_empty_clusters():
    centers = torch.tensor([[[1.0], [100.0], [200.0]], [[0.0], [9.0], [100.0]], [[1.0], [9.0], [-5.0]]])
    sums, counts = moved(LINE, centers)
    assert counts.tolist() == [[5, 1, 1], [5, 1, 1], [4, 1, 2]]
    assert sums[:, :, 0].tolist() == [[1.0, 9.0, -5.0], [1.0, 9.0, -5.0], [6.0, 9.0, -10.0]]


def test_rows_alone_or_on_their_centre_stay():
    x = torch.tensor([[0.0], [0.0], [50.0]])
    _, counts = moved(x, torch.tensor([[[0.0], [40.0], [100.0]]]))
    assert counts.tolist() == [[2, 1, 0]]


def grouped(count: int = 120, offset: float = 0.0) -> Tensor:
    rng = np.random.default_rng(0)
    centers = 4.0 * rng.normal(size=(8, 5))
    return torch.from_numpy(centers[rng.integers(8, size=count)] + rng.normal(size=(count, 5)) + offset).float()


@pytest.mark.parametrize("clusters", [1, 2, 8, 30])
def test_seeds_agree_with_the_slow_form(clusters: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seeding, "_DISTANCES_AT_ONCE", 500)
    x = grouped()
    found = kmeans_plusplus(x, clusters, [0, (1, 2), 3])
    expected = [greedy_seeds(x.double().numpy(), clusters, seed) for seed in (0, (1, 2), 3)]
    assert found.tolist() == expected


def test_seeds_lie_in_different_clusters_when_those_are_far_apart():
    labels = torch.arange(60) % 6
    x = 100.0 * torch.eye(6)[labels] + torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    chosen = kmeans_plusplus(x, 6, range(20))
    assert all(len(labels[row].unique()) == 6 for row in chosen)


def test_better_than_seeds_at_random():
    x = grouped(500)
    chosen = kmeans_plusplus(x, 8, range(30))
    random = torch.from_numpy(np.stack([np.random.default_rng(s).choice(500, 8, False) for s in range(30)]))

    def inertia(seeds: Tensor) -> float:
        return float(np.mean([torch.cdist(x, x[row]).min(1)[0].square().sum() for row in seeds]))

    assert inertia(chosen) < 0.7 * inertia(random)


def test_far_from_zero_the_same_rows_are_drawn():
    assert torch.equal(kmeans_plusplus(grouped(), 8, range(5)), kmeans_plusplus(grouped(offset=500.0), 8, range(5)))


def test_never_draws_a_row_twice_while_others_differ():
    for row in kmeans_plusplus(grouped(40), 40, range(5)):
        assert len(row.unique()) == 40


def test_seeds_of_equal_rows():
    chosen = kmeans_plusplus(torch.ones(5, 2), 3, [0])
    assert chosen.shape == (1, 3)


def test_seeding_refuses_more_clusters_than_rows():
    with pytest.raises(ConfigError, match="clusters = 6: at most the number of rows, 5"):
        kmeans_plusplus(torch.ones(5, 2), 6, [0])


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_screened_centres_are_those_of_float32_products(offset: float, monkeypatch: pytest.MonkeyPatch):
    x = planted(2000, 30, dtype=torch.float32, offset=offset)
    x = torch.cat([x, torch.randn(2000, 128 - x.shape[1], generator=torch.Generator().manual_seed(0))], dim=1)
    centers, origin = torch.stack([x[:600], x[600:1200]]), x.double().mean(0)
    centers[:, 599] = centers[:, 0]  # a tie, which goes to the smaller id
    centers = (centers.double() - origin).float()
    bias = half_squares(centers, origin)
    monkeypatch.setattr(kmeans, "has_fast_bf16", lambda device: True)
    scores, labels = nearest(x, centers, bias, kmeans.round_centers(centers, bias))
    expected, ids = nearest(x, centers, bias)
    assert torch.allclose(scores, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(labels, ids)
    assert not (labels == 599).any()


def test_centres_that_rounding_cannot_tell_apart_are_compared_in_float32(monkeypatch: pytest.MonkeyPatch):
    x = planted(600, 5, width=128)
    centers = x[:1] + 1e-5 * x[None, :600]
    bias = half_squares(centers, torch.zeros(128, dtype=torch.float64))
    monkeypatch.setattr(kmeans, "has_fast_bf16", lambda device: True)
    found, expected = nearest(x, centers, bias, kmeans.round_centers(centers, bias)), nearest(x, centers, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_seeds_in_rounds_are_rows_once_each_and_as_good_as_one_by_one():
    draw = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(300, 16, generator=draw)[torch.arange(4000) % 300] + 0.3 * torch.randn(4000, 16, generator=draw)
    seeds = kmeans_plusplus(x, 300, [0, 1])
    assert seeds.shape == (2, 300)
    assert all(len(one.unique()) == 300 for one in seeds)
    alone = kmeans_plusplus(x, 300, [1], torch.ones(len(x), dtype=torch.float64))
    assert torch.equal(alone[0], seeds[1])

    def inertia(init: Tensor) -> float:
        return float(kmeans.assign(x, init)[1].sum())

    # Rows at random miss every third group; an eighth at once misses few (0.21).
    assert inertia(x[seeds[0]]) < 0.3 * inertia(x[torch.randperm(4000, generator=draw)[:300]])


def test_seeds_of_many_rows_first_move_in_the_sample():
    x = planted(6000, 10)
    result = fitted(x, 1000, clusters=10, restarts=2, seeding_rows=500, max_iterations=1)
    cold = fitted(x, 1000, clusters=10, restarts=2, seeding_rows=6000, max_iterations=1)
    assert result.inertia < cold.inertia
