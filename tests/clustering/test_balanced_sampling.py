from __future__ import annotations

import numpy as np
import pytest
import torch

from rayclust.clustering import balanced_sampling
from rayclust.clustering.balanced_sampling import (
    Levels,
    Points,
    allocate,
    cut,
    draw,
    fit_levels,
    key_hashes,
    quotas,
    resampled_kmeans,
)
from rayclust.errors import ConfigError

SIZES = np.array([100, 10, 5, 1])


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return key_hashes([f"image-{i}" for i in range(count)], seed)


def two_levels(*parents: tuple[int, ...]) -> Levels:
    """Leaves of the given sizes below each parent."""
    sizes = [size for children in parents for size in children]
    leaves = np.repeat(np.arange(len(sizes)), sizes)
    parent = np.repeat(np.arange(len(parents)), [len(children) for children in parents])
    return Levels(leaves, (parent,), (len(sizes), len(parents)), np.zeros(len(leaves), np.float32))


@pytest.mark.parametrize(
    ("total", "x", "found"),
    [
        (20, 7, [7, 7, 5, 1]),
        (22, 8, [8, 8, 5, 1]),
        (30, 14, [14, 10, 5, 1]),
        (116, 100, [100, 10, 5, 1]),
        (500, 100, [100, 10, 5, 1]),
        (0, 0, [0, 0, 0, 0]),
    ],
)
def test_the_cut_and_its_quotas(total: int, x: int, found: list[int]):
    assert cut(SIZES, total) == x
    assert quotas(SIZES, total, hashes(4)).tolist() == found


def test_what_the_cut_leaves_goes_to_one_of_the_larger():
    assert cut(SIZES, 21) == 7
    seen = {tuple(quotas(SIZES, 21, hashes(4, seed)).tolist()) for seed in range(20)}
    assert seen == {(8, 7, 5, 1), (7, 8, 5, 1)}


def test_quotas_by_the_slow_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 30, rng.integers(1, 8))
        total = int(rng.integers(0, sizes.sum() + 3))
        fitting = [x for x in range(int(sizes.max()) + 1) if np.minimum(sizes, x).sum() <= total]
        assert cut(sizes, total) == max(fitting)
        found = quotas(sizes, total, rng.integers(0, 99, len(sizes)).astype(np.uint64))
        assert found.sum() == min(total, sizes.sum())
        assert (found <= sizes).all()
        assert (found - np.minimum(sizes, max(fitting)) <= 1).all()


def test_two_levels_divide_at_the_top_first():
    levels, drawn = two_levels((100, 10), (5, 1)), hashes(116)
    leaf, top = allocate(levels, 12, drawn)
    assert top.tolist() == [6, 6]
    assert leaf.tolist() == [3, 3, 5, 1]
    flat = quotas(SIZES, 12, hashes(4))
    assert flat[3] == 1
    assert sorted(flat[:3].tolist()) == [3, 4, 4]


def test_every_quota_is_the_sum_of_those_below_and_within_capacity():
    rng = np.random.default_rng(1)
    parents = (rng.integers(0, 20, 100), rng.integers(0, 4, 20))
    leaves = rng.integers(0, 100, 3000)
    levels = Levels(leaves, parents, (100, 20, 4), np.zeros(3000, np.float32))
    capacity = levels.sums(np.bincount(leaves, minlength=100))
    for total, copies in ((500, 1), (5000, 2), (99_999, 3)):
        found = allocate(levels, total, hashes(3000), copies)
        assert found[-1].sum() == min(total, 3000 * copies)
        for level, parent in enumerate(parents):
            np.testing.assert_array_equal(np.bincount(parent, found[level], len(found[level + 1])), found[level + 1])
        assert all((quota <= copies * rows).all() for quota, rows in zip(found, capacity, strict=True))
        copied = draw(levels, found[0], hashes(3000))
        np.testing.assert_array_equal(np.bincount(leaves, copied, 100), found[0])
        assert copied.max() <= copies


def test_names_of_clusters_and_the_order_of_rows_do_not_change_what_is_drawn():
    rng = np.random.default_rng(2)
    leaves, parents = rng.integers(0, 12, 400), rng.integers(0, 3, 12)
    keys = [f"image-{i}" for i in range(400)]
    rename, rename_top, shuffled = rng.permutation(12), rng.permutation(3), rng.permutation(400)
    other_parents = np.empty(12, np.int64)
    other_parents[rename] = rename_top[parents]
    flat = np.zeros(400, np.float32)
    drawn = set[str]()
    for levels, names in (
        (Levels(leaves, (parents,), (12, 3), flat), keys),
        (Levels(rename[leaves[shuffled]], (other_parents,), (12, 3), flat), [keys[i] for i in shuffled]),
    ):
        found = key_hashes(names, 5)
        copies = draw(levels, allocate(levels, 77, found)[0], found)
        chosen = {name for name, number in zip(names, copies, strict=True) if number}
        assert not drawn or chosen == drawn
        drawn = chosen
    assert len(drawn) == 77


@pytest.mark.parametrize(("quota", "copies"), [(5, [2, 3]), (6, [3, 3])])
def test_copies_of_a_small_leaf(quota: int, copies: list[int]):
    levels = Levels(np.zeros(2, np.int64), (), (1,), np.zeros(2, np.float32))
    [found] = allocate(levels, quota, hashes(2), copies=3)
    assert sorted(draw(levels, found, hashes(2)).tolist()) == copies
    assert allocate(levels, 99, hashes(2), copies=3)[0].tolist() == [6]


def test_nearest_and_diverse_draws():
    angles = np.array([0.0, 0.1, 0.25, 1.0, 1.4])
    x = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    distances = (x - x[1]).square().sum(1).numpy()
    levels = Levels(np.zeros(5, np.int64), (), (1,), distances)
    assert draw(levels, np.array([2]), hashes(5), "nearest").tolist() == [1, 1, 0, 0, 0]
    points = Points(x.flip(0), np.arange(5)[::-1].copy())
    assert draw(levels, np.array([2]), hashes(5), "diverse", points).tolist() == [0, 1, 0, 0, 1]
    assert draw(levels, np.array([3]), hashes(5), "diverse", points).tolist() == [0, 1, 0, 1, 1]
    with pytest.raises(ConfigError, match="needs the rows"):
        draw(levels, np.array([1]), hashes(5), "diverse")


def arc(seed: int) -> torch.Tensor:
    """900 rows on the first half of an arc and 100 on the second."""
    rng = np.random.default_rng(seed)
    angles = np.concatenate([rng.uniform(0, 0.5, 900), rng.uniform(0.5, 1, 100)])
    return torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))


def test_resampling_evens_out_the_centroids():
    shares = np.zeros(4)
    for seed in range(10):
        for place, steps in enumerate((0, 1, 2, 4)):
            centers = resampled_kmeans(Points(arc(seed)), 40, steps, seed).centers
            angles = torch.atan2(centers[:, 1], centers[:, 0])
            shares[place] += float((angles < 0.5).double().mean()) / 10
    assert (np.diff(shares) < 0).all(), shares
    assert shares[0] > 0.7
    assert shares[-1] > 0.5


def test_levels_are_nested_and_each_centroid_counts_once():
    points = Points(arc(0))
    levels = fit_levels(points, (40, 10, 3), steps=(0, 2, 2))
    assert levels.clusters == (40, 10, 3)
    assert [len(parent) for parent in levels.parents] == [40, 10]
    paths = levels.paths(np.array([0, 999]))
    assert paths.shape == (2, 3)
    assert paths[0, 2] == levels.leaves[0]
    assert paths[0, 0] == levels.parents[1][levels.parents[0][levels.leaves[0]]]
    again = fit_levels(Points(arc(0), np.arange(1000)), (40, 10, 3), steps=(0, 2, 2))
    assert again.leaves.tobytes() == levels.leaves.tobytes()
    first = resampled_kmeans(points, 40, 0, 0)
    above = resampled_kmeans(Points(first.centers), 10, 2, 1)
    assert above.labels.tolist() == levels.parents[0].tolist()
    by_rows = fit_levels(points, (40, 10), steps=(0, 0), weights="rows")
    assert by_rows.leaves.tolist() == levels.leaves.tolist()
    for wrong in ((10, 20), (2000, 3), ()):
        with pytest.raises(ConfigError, match="must fall"):
            fit_levels(points, wrong, steps=(0,) * len(wrong))


def test_many_clusters_are_split_in_two_levels(monkeypatch: pytest.MonkeyPatch):
    whole = resampled_kmeans(Points(arc(1)), 50, 0, 0)
    monkeypatch.setattr(balanced_sampling, "_SPLIT_ABOVE", 10)
    split = resampled_kmeans(Points(arc(1)), 50, 0, 0)
    assert split.centers.shape == (50, 2)
    assert sorted(np.unique(split.labels)) == list(range(50))
    assert split.distances.sum() < 2 * whole.distances.sum()
    np.testing.assert_allclose(
        split.distances, (arc(1) - split.centers[split.labels]).square().sum(1).numpy(), atol=1e-6
    )
