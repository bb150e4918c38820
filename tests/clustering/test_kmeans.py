from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from rayclust.clustering import kmeans
from rayclust.clustering.kmeans import KMeansOptions, KMeansResult
from rayclust.clustering.population import Metric
from rayclust.errors import ConfigError, DataError, ShapeError
from rayclust.features import FeatureTransform
from rayclust.metrics import external
from tests.references import lloyd
from tests.workers import on_two_workers


def planted(
    count: int, clusters: int, width: int = 8, seed: int = 0, offset: float = 0.0, dtype=torch.float32
) -> Tensor:
    """Rows around centres, close enough that k-means needs a while."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, width))
    x = centers[rng.integers(clusters, size=count)] + 0.8 * rng.normal(size=(count, width)) + offset
    return torch.tensor(x, dtype=dtype)


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
@pytest.mark.parametrize("block", [1, 17, 256, 999])
def test_blocks_of_any_size_equal_the_whole(metric: Metric, block: int):
    x = planted(1000, 12)
    whole = fitted(x, clusters=12, metric=metric, restarts=3)
    parts = fitted(x, block, clusters=12, metric=metric, restarts=3)
    assert torch.allclose(parts.centers, whole.centers, atol=1e-6)
    assert parts.inertia == pytest.approx(whole.inertia, rel=1e-6)
    assert (parts.n_iter, parts.converged) == (whole.n_iter, whole.converged)


Case = tuple[Metric, list[int], int, Tensor | None]


def sharded_fits(rank: int, world: int, x: Tensor, cases: list[Case]) -> list[KMeansResult]:
    results = []
    for metric, bounds, sample, init in cases:
        own = x[bounds[rank] : bounds[rank + 1]]
        blocks = own.split(100) if len(own) else (own,)
        options = KMeansOptions(clusters=12, metric=metric, restarts=2, seeding_rows=sample)
        results.append(kmeans.fit(lambda blocks=blocks: blocks, options, seed=3, init=init))
    return results


def test_two_workers_equal_one():
    x = planted(900, 12)
    empties = torch.cat([x[:6], x[:6] + 100.0])  # half of the centres attract nothing at first
    cases: list[Case] = []
    for metric in ("cosine", "euclidean"):
        cases += [(metric, [0, 300, 900], 65_536, None), (metric, [0, 900, 900], 200, None)]
        cases += [(metric, [0, 777, 900], 65_536, empties)]
    both = on_two_workers(sharded_fits, x, cases)
    for (metric, _, sample, init), *found in zip(cases, *both, strict=True):
        options = KMeansOptions(clusters=12, metric=metric, restarts=2, seeding_rows=sample)
        alone = kmeans.fit(lambda: [x], options, seed=3, init=init)
        for result in found:
            assert torch.allclose(result.centers, alone.centers, atol=1e-6)
            assert result.inertia == pytest.approx(alone.inertia, rel=1e-6)
            assert result.n_iter == alone.n_iter


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
    population = kmeans.survey(lambda: x.split(128), "cosine")
    states = [kmeans.start(population, options, seed=2)]
    states += list(kmeans.advance(population, options, states[0]))
    whole = kmeans.finish(population, states[-1])
    for state in states[:: max(1, len(states) // 4)]:
        last = kmeans.KMeansState(**{name: value.clone() for name, value in state.tensors().items()})
        for reached in kmeans.advance(population, options, last):
            last = reached
        result = kmeans.finish(population, last)
        assert torch.allclose(result.centers, whole.centers, atol=1e-6)
        assert (result.n_iter, result.converged) == (whole.n_iter, whole.converged)


def test_inertia_never_rises():
    x = planted(500, 10)
    population = kmeans.survey(lambda: [x], "cosine")
    options = KMeansOptions(clusters=10, restarts=4)
    inertias = torch.stack(
        [s.inertia for s in kmeans.advance(population, options, kmeans.start(population, options, 0))]
    )
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


@pytest.mark.parametrize(
    ("folder", "accuracy", "nmi"), [("cifar10_test", 0.455, 0.360), ("imagenette_val3k", 0.92, 0.865)]
)
def test_reaches_what_is_known_of_real_features(shared_data, folder: str, accuracy: float, nmi: float):
    features = np.load(shared_data / folder / "features_mnv2a_f16.npy")
    truth = np.load(shared_data / folder / "labels.npy")
    x = torch.from_numpy(FeatureTransform.fitted(features, center=True, standardize=False, normalize=True)(features))
    result = fitted(x, clusters=10)
    labels = kmeans.assign(x, result.centers)[0].numpy()
    assert external.accuracy(truth, labels) > accuracy
    assert external.nmi(truth, labels) > nmi
